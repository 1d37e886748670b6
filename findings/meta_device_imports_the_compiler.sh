#!/usr/bin/env bash
# torch 2.13.0: the first sum of two tensors on the meta device.
#
# Expected: to learn the shape of a result without computing it costs next to nothing: no data, no kernel.
# Seen: the first operation on device='meta' that torch computes in Python, `a + b` is one, imports torch's compiler with all
# that it needs, some 800 modules with sympy and the ONNX exporter among them: a second of processor time and 70 MB for a
# shape. `torch.empty` and views on the meta device do not. Programs that only check or build a model there, to start
# quickly, pay for torch.compile without using it; the same is seen in 2.11.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet 'torch==2.13.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PYTHON'
import resource
import sys
import time

import torch


def look(what, compute):
    before, start = len(sys.modules), time.process_time()
    shape = tuple(compute().shape)
    print(
        f'{what}: shape {shape}, {len(sys.modules) - before} modules more, {time.process_time() - start:.2f} s, '
        f'{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MB at most so far, '
        f'compiler imported: {"torch._dynamo" in sys.modules}'
    )
    return 'torch._dynamo' in sys.modules


print('torch', torch.__version__)
a = torch.empty(3, 4, device='meta')
early = [look('empty', lambda: torch.empty(10**9, device='meta')), look('a view', lambda: a.T)]
late = look('a + a', lambda: a + a)
if any(early) or not late or not {'sympy', 'torch.onnx'} <= sys.modules.keys():
    sys.exit('the meta device and the compiler are otherwise connected now')
PYTHON
