"""Two processes train as one does on the same global batches."""

import os

import pytest
import torch
import torch.multiprocessing as mp
from conftest import tiny_mulan
from test_trainer import Tones

from musiclm_pytorch.trainer import MuLaNTrainer

RUNS = {
    'plain': dict(batch_size=8),
    'chunks': dict(batch_size=8, grad_cache_chunk_size=3),
    'accumulated': dict(batch_size=4, grad_accum_every=2),
}


class StillTones(Tones):
    def __getitem__(self, index):
        wave = torch.sin((index + 1) * torch.arange(1200) * 0.1)
        return wave, torch.tensor([index + 1, 50, index + 1])


def train(folder, name, processes):
    torch.manual_seed(3)
    still = dict(patch_dropout_prob=0.0, spec_aug_stretch_factor=1, spec_aug_freq_mask=0, spec_aug_time_mask=0)
    mulan = tiny_mulan(dict(depth=1, **still), dict(depth=1), hierarchical_contrastive_loss=True)
    keywords = dict(RUNS[name])
    keywords['batch_size'] //= processes
    if 'grad_cache_chunk_size' in keywords and processes > 1:
        keywords['grad_cache_chunk_size'] = 2
    trainer = MuLaNTrainer(
        mulan,
        StillTones(),
        lr=1e-3,
        valid_frac=0.25,
        use_ema=True,
        results_folder=f'{folder}/{name}',
        accelerate_kwargs=dict(cpu=True),
        progress=False,
        **keywords,
    )
    results = trainer.train(num_train_steps=6)
    return mulan.state_dict(), results


def worker(rank, folder):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT='29577'
    )
    torch.set_num_threads(1)
    for name in RUNS:
        torch.save(train(folder, name, 2), f'{folder}/{name}.{rank}.pt')


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    mp.start_processes(worker, args=(str(tmp_path),), nprocs=2, start_method='spawn')
    for name in RUNS:
        weights, results = train(tmp_path / 'alone', name, 1)
        for rank in range(2):
            found, found_results = torch.load(tmp_path / f'{name}.{rank}.pt', weights_only=True)
            assert found_results['valid_score'] == pytest.approx(results['valid_score'], abs=1e-4)
            assert found_results['loss'] == pytest.approx(results['loss'], abs=1e-3)
            for key, tensor in weights.items():
                if 'pos_bias_mlp.4.bias' not in key:  # no gradient but rounding
                    torch.testing.assert_close(found[key], tensor, atol=5e-5, rtol=1e-3, msg=f'{name} {rank} {key}')
        assert len(list((tmp_path / name / 'checkpoints').iterdir())) == 1
