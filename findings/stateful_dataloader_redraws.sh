#!/usr/bin/env bash
# torchdata 0.11.0 on torch 2.11.0: is a run that resumes from a StatefulDataLoader's state the run that was stopped?
#
# Expected: the loader exists for this. Its state is taken in the middle of an epoch with two workers and given to a new
# loader of the same data set, generator and two workers; the items that are left come in the same order, and what they
# draw at random (a crop, a caption, noise) is what they would have drawn.
# Seen: the order is the same to the last item, the draws are those of the first items of the epoch, over again: the state
# holds the base seed of the workers, which begin anew with it, and nothing winds their generators forward past the items
# that were read before. Every resumed epoch augments its rest as it did its beginning. Without workers the draws differ,
# too, unless the program restores the generators of its own process. Nothing shows in a data set without augmentation.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.11.0' 'torchdata==0.11.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

print('torch', torch.__version__, 'torchdata', version('torchdata'))


class Crops(Dataset):
    """An item is its index, and where a crop of it begins, drawn at random."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return index, float(torch.rand(()))


def loader():
    torch.manual_seed(1)
    order = torch.Generator().manual_seed(5)
    return StatefulDataLoader(Crops(), batch_size=2, num_workers=2, shuffle=True, generator=order)


def rows(batches):
    return [(int(index), float(crop)) for indices, crops in batches for index, crop in zip(indices, crops)]


whole, again = rows(loader()), rows(loader())
print('two whole epochs of one seed are the same:', whole == again)

stopped = loader()
steps = iter(stopped)
head = rows([next(steps) for _ in range(4)])
state = stopped.state_dict()
del steps
resumed = loader()
resumed.load_state_dict(state)
tail = rows(resumed)

same_order = [index for index, _ in head + tail] == [index for index, _ in whole]
same_draws = sum(a == b for a, b in zip(tail, whole[len(head) :]))
repeated = [crop for _, crop in tail] == [crop for _, crop in whole[: len(tail)]]
print('resumed, the order is the same:', same_order)
print(f'resumed, draws that are the same: {same_draws} of {len(tail)}')
print('resumed, draws are those of the first items again:', repeated)
assert whole == again
assert head == whole[: len(head)]
assert same_order
assert same_draws == 0
assert repeated
PYTHON
