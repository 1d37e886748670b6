#!/usr/bin/env bash
# torch 2.11.0: torch.optim.Muon on weights that FSDP2 shares out, two processes, gloo.
#
# Expected: Muon makes the singular values of a whole matrix alike, and a process holds some rows of it: the optimizer, which
# is not told of other processes, orthogonalises those rows, a different step, or refuses.
# Seen: it takes the step of one process. Its matrix products run on DTensors, which add the parts up over the processes, so
# that the step differs by the rounding of these sums in bfloat16 alone (cosine 0.999), rows that do not divide evenly, 21
# over 2 processes, too; each shard orthogonalised by itself would point elsewhere (cosine 0.85).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install --quiet 'torch==2.11.0' 'numpy==2.4.6'
cat > "$folder/run.py" <<'PYTHON'
import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def build():
    torch.manual_seed(0)
    return nn.Linear(12, 21, bias=False)


def step(model, inputs):
    before = build().weight.detach()
    model(inputs).square().sum().backward()
    torch.optim.Muon(model.parameters(), lr=0.1, weight_decay=0.0).step()
    weight = model.weight
    return (weight.full_tensor() if hasattr(weight, 'full_tensor') else weight.detach()) - before


def of_shards(inputs, sizes):
    """What the step would be if each part of the rows were a matrix by itself, brought to the length of the whole's."""
    model = build()
    model(inputs).square().sum().backward()
    parts = []
    for gradient, weight in zip(model.weight.grad.split(sizes), model.weight.detach().split(sizes)):
        part = nn.Parameter(weight.clone())
        part.grad = gradient.clone()
        torch.optim.Muon([part], lr=0.1, weight_decay=0.0).step()
        parts.append(part.detach() - weight)
    return torch.cat(parts)


def work(rank, file):
    os.environ.update(RANK=str(rank), WORLD_SIZE='2', LOCAL_RANK=str(rank))
    dist.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=2)
    mesh = init_device_mesh('cpu', (2,))
    inputs = torch.randn(16, 12, generator=torch.Generator().manual_seed(1))
    whole = step(build(), inputs)
    shared = step(fully_shard(build(), mesh=mesh), inputs)
    cosine = nn.functional.cosine_similarity
    found = cosine(shared.flatten(), whole.flatten(), dim=0).item()
    apart = cosine(of_shards(inputs, [11, 10]).flatten(), whole.flatten(), dim=0).item()
    if rank == 0:
        print('torch', torch.__version__)
        print(f'cosine with the step of one process: shared out {found:.4f}, each shard by itself {apart:.4f}')
    dist.destroy_process_group()
    if not (found > 0.998 and apart < 0.97):
        sys.exit('Muon takes another step of shared weights now')


if __name__ == '__main__':
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (f'{folder}/store',), 2)
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
