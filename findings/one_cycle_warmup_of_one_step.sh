#!/usr/bin/env bash
# torch 2.11.0: a short run under OneCycleLR, whose warm-up is one step.
#
# Expected: 20 steps with pct_start=0.05 warm up for one step, as 19 and 21 steps do for a little less and more.
# Seen: the scheduler of 20 steps cannot be built: ZeroDivisionError. Its first phase ends at `pct_start * total_steps - 1`,
# here at step 0, where it also begins, and the share of the phase that is over is 0 / 0. So is 10 with 0.1, 40 with 0.025 and
# 100 with 0.01, while their neighbours are fine: whoever shortens a run to try it meets it by chance.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet 'torch==2.11.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.optim.lr_scheduler import OneCycleLR


def builds(steps, share):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        OneCycleLR(optimizer, max_lr=1.0, total_steps=steps, pct_start=share)
    except ZeroDivisionError as error:
        print(f'{steps} steps, pct_start={share}: ZeroDivisionError: {error}')
        return False
    print(f'{steps} steps, pct_start={share}: built')
    return True


print('torch', torch.__version__)
fine = [builds(*it) for it in ((19, 0.05), (21, 0.05), (9, 0.1), (99, 0.01), (1000, 0.01))]
broken = [builds(*it) for it in ((20, 0.05), (10, 0.1), (40, 0.025), (100, 0.01))]
if not all(fine) or any(broken):
    sys.exit('OneCycleLR treats a warm-up of one step otherwise now')
PYTHON
