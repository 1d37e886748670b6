#!/usr/bin/env bash
# numba 0.68.1: do two processes that compile the same generalised ufunc with cache=True leave files that fit each other?
#
# Expected: what is kept depends on the source, the signature and the processor, which make its key; it is written by a
# rename, "race condition-free", and so it does not matter which process wrote a file last.
# Seen: guvectorize keeps two files under fixed names, the function and the wrapper that calls it, each renamed on its
# own. The wrapper calls the function by a symbol that holds how many functions its process had compiled before: v1 in
# the one, v6 in the other, under the same key and file name. A process that finds the function of one and the wrapper of
# another takes both. With librosa 0.11.0 (`librosa.beat`, compiled on first use), two processes that began at once left
# such a pair in 6 of 8 tries, and each process after them ended by a segmentation fault, until the files were removed.
# This script looks into the files of two processes that ran one after the other, each with a folder of its own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'numba==0.68.1' 'llvmlite==0.50.0' 'numpy==2.4.6'
cd "$folder"
cat > kept.py <<'PYTHON'
import sys

import numpy as np
from numba import guvectorize, njit

for _ in range(int(sys.argv[1])):  # what else this process has compiled before
    njit(lambda x: x)(1)


@guvectorize(['void(float64[:], float64[:])'], '(n)->()', cache=True, nopython=True)
def total(x, result):
    result[0] = 0
    for i in range(x.shape[0]):
        result[0] += x[i]


assert total(np.arange(4.0)) == 6
PYTHON
NUMBA_CACHE_DIR="$folder/first" venv/bin/python kept.py 0
NUMBA_CACHE_DIR="$folder/other" venv/bin/python kept.py 5
venv/bin/python - <<'PYTHON'
import re
from pathlib import Path

import numba

print('numba', numba.__version__)


def kept(process):
    """File names of what a process kept, with the versions of `total` that each names."""
    files = sorted(Path(process).rglob('*.nbc'))
    return {it.name: set(re.findall(rb'5totalB\d+(v\d+)B', it.read_bytes())) for it in files}


first, other = kept('first'), kept('other')
for name in first:
    print(f'  {name}: first {first[name]}, other {other.get(name)}')
assert len(first) == 2 and set(first) == set(other), 'the names of the files have changed'
assert all(len(versions) == 1 for versions in [*first.values(), *other.values()]), 'the symbols have changed'
assert len(set(map(frozenset, first.values()))) == 1, 'the files of one process fit each other'
assert set.union(*first.values()).isdisjoint(set.union(*other.values())), 'the files of two processes fit now'
print('the wrapper of either process calls a function that the file of the other does not have')
PYTHON
