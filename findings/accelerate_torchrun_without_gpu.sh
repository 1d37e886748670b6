#!/usr/bin/env bash
# accelerate 1.15.0, torch 2.11.0: how many processes does an Accelerator see under torchrun where there is no GPU?
#
# Expected: two. torchrun sets RANK, WORLD_SIZE and the address of the first process, gloo works on a CPU, and with a GPU
# each Accelerator() joins the group from these alone.
# Seen: without a GPU, Accelerator() is process 0 of 1 in both, DistributedType.NO, and says nothing. Each takes itself
# for the main process: both train alone, on all the data, and write the same checkpoints and logs; gather gives back what
# it was given. Accelerator(cpu=True), the variable ACCELERATE_USE_CPU=1 and `accelerate launch --cpu` make two of them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'accelerate==1.15.0' 'torch==2.11.0' 'numpy==2.4.6'
cat >"$folder/show.py" <<'PYTHON'
import os
import sys

import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True) if sys.argv[1:] == ['cpu=True'] else Accelerator()
gathered = accelerator.gather(torch.tensor([float(os.environ['RANK'])])).tolist()
kind, number, count = accelerator.distributed_type, accelerator.process_index, accelerator.num_processes
rank = f'RANK {os.environ["RANK"]} of {os.environ["WORLD_SIZE"]}'
sys.stdout.write(f'{rank}: {kind}, process {number} of {count}, gathered {gathered}\n')  # two write here: a line at once
accelerator.end_training()
PYTHON
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
show() {
    local said try
    for try in 1 2 3; do # the launcher itself fails now and then on a busy machine
        said=$("$folder/venv/bin/torchrun" --nproc-per-node 2 "$folder/show.py" "$@" 2>/dev/null) && break
    done
    sort <<<"$said"
}
echo 'Accelerator():' && show | tee "$folder/plain"
echo 'Accelerator(cpu=True):' && show cpu=True | tee "$folder/cpu"
echo 'Accelerator() with ACCELERATE_USE_CPU=1:' && ACCELERATE_USE_CPU=1 show | tee "$folder/variable"
test "$(grep -c 'process 0 of 1' "$folder/plain")" = 2 || { echo 'Accelerator() joins the group now' >&2; exit 1; }
for way in cpu variable; do
    test "$(grep -c 'of 2, gathered \[0.0, 1.0\]' "$folder/$way")" = 2 || { echo "$way does not help now" >&2; exit 1; }
done
