"""Several processes train as one does, and survive the loss of one."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers.models import tiny_mulan
from helpers.processes import free_port, join_world, start_processes
from helpers.training import assert_same, weights
from torch.utils.data import Dataset

from musiclm_pytorch import MuLaN
from musiclm_pytorch.distributed import (
    DistributedConfig,
    DistributedMuLaNTrainer,
    create_distributed_config,
    run_distributed_training,
)
from musiclm_pytorch.distributed.trainer import WorldTrainer
from musiclm_pytorch.trainer import MuLaNTrainer, TrainingConfig, checkpoints
from musiclm_pytorch.trainer.metrics_logger import Journal

TESTS = Path(__file__).parent
# a constant in a softmax has no gradient but rounding, which Adam blows up to full steps
ROUNDING_ALONE = 'pos_bias_mlp.4.bias'


class StillTones(Dataset):
    """Tones without anything random, of as many pitches as there are items."""

    def __init__(self, size=28):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.sin((index + 1) * torch.arange(1200) * 0.1), torch.tensor([index + 1, 50, index + 1])


def still_mulan(**keywords):
    """A model that draws nothing at random in training."""
    torch.manual_seed(3)
    still = dict(patch_dropout_prob=0.0, spec_aug_stretch_factor=1, spec_aug_freq_mask=0, spec_aug_time_mask=0)
    return tiny_mulan(dict(depth=1, **still), dict(depth=1), **keywords)


def largest_difference(found, expected):
    assert found.keys() == expected.keys()
    return max((found[name] - tensor).abs().max() for name, tensor in expected.items() if ROUNDING_ALONE not in name)


STEPS = 8
EVERY = dict(checkpoint_every=STEPS, log_every=STEPS // 2)
COMMON = dict(lr=1e-4, valid_frac=0.25, progress=False, drop_last=False, **EVERY)


def train_alone(folder, *, data=None, mulan=None, steps=STEPS, **keywords):
    mulan = mulan or still_mulan(hierarchical_contrastive_loss=True)
    trainer = MuLaNTrainer(
        mulan, data or StillTones(), results_folder=folder, accelerate_kwargs=dict(cpu=True), **COMMON, **keywords
    )
    return weights(trainer.model), trainer.train(num_train_steps=steps), weights(mulan)


# ---- equality: all runs of a world in one start of its processes ----

# name: batch size over all processes; config; keywords of the trainer; config of the second half of the run
RUNS = {
    'plain': (8, dict(), dict(use_ema=True, log_with='tensorboard'), None),
    'chunks': (8, dict(), dict(grad_cache_chunk_size=3), None),
    'accumulated': (8, dict(gradient_accumulation_steps=2), dict(), None),
    'recomputed': (8, dict(gradient_checkpointing=True, bucket_cap_mb=0.01), dict(), None),
    'sharded': (8, dict(use_fsdp=True, gradient_accumulation_steps=2), dict(), dict(use_fsdp=True)),
    'sharded then not': (8, dict(use_fsdp=True, gradient_checkpointing=True), dict(grad_cache_chunk_size=2), dict()),
}
# of two processes: 21 pairs to train on, batches of 8, 8 and 5, which make different numbers of chunks;
# of four: 19 pairs, 8, 8 and 3, of which one process gets none. More than two shards take too long on CPUs for a test.
SIZES = {2: 28, 4: 25}
NAMES = {2: list(RUNS), 4: ['plain', 'chunks', 'accumulated']}


def in_world(rank, world, folder, function, *arguments):
    """Run a function in a process of a world, as a launcher would start it."""
    join_world(rank, world)
    Journal.draw = lambda self: None  # takes long, and has no part in it
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=world)
    result = function(folder, world, *arguments)
    torch.save(result, f'{folder}/{rank}.pt')
    os._exit(0)  # as the worker does: taking a process group apart can deadlock in torch 2.11


def run_world(folder, world, function, *arguments):
    """What a function returns in each process of a world."""
    start_processes(in_world, world, str(folder), function, *arguments, count=world)
    return [torch.load(folder / f'{rank}.pt', weights_only=True) for rank in range(world)]


def train_runs(folder, world):
    found = {'small': train_small_world(folder, world), 'stopped': stop_by_one_signal(folder, world)}
    for name in NAMES[world]:
        batch_size, first, keywords, second = RUNS[name]
        mulan = still_mulan(hierarchical_contrastive_loss=True)
        halves = [first] if second is None else [first, second]
        for i, fields in enumerate(halves):
            config = DistributedConfig(world_size=world, backend='gloo', **(first | dict(use_fsdp=False) | fields))
            trainer = DistributedMuLaNTrainer(
                mulan,
                StillTones(SIZES[world]),
                config,
                results_folder=f'{folder}/{name}',
                resume=i > 0,
                batch_size=batch_size // world,
                **(COMMON | dict(validate_every=STEPS // 2) | keywords),
            )
            assert trainer.step == i * STEPS // 2
            results = trainer.train(num_train_steps=STEPS * (i + 1) // len(halves))
        ema = trainer.trainer.ema
        found[name] = (weights(mulan), {} if ema is None else weights(ema.ema_model), results)
    return found


def train_small_world(folder, world):
    """As few held-out pairs as fit: fewer than processes, where there are more than two; no batch size is told."""
    config = DistributedConfig(backend='gloo', use_amp=True)
    assert config.world_size == world
    keywords = COMMON | dict(valid_frac=0.0, valid_dataset=StillTones(2), results_folder=f'{folder}/small')
    trainer = DistributedMuLaNTrainer(
        still_mulan(hierarchical_contrastive_loss=True), StillTones(20), config, **keywords
    )
    results = trainer.train(num_train_steps=1)
    with pytest.raises(ValueError, match=f'world_size={world + 1}, but {world} processes were started'):
        DistributedMuLaNTrainer(still_mulan(), StillTones(), DistributedConfig(world_size=world + 1, backend='gloo'))
    trained = trainer.mulan.text.trained_tokens.nonzero()[:, 0].tolist()
    return dict(batch_size=trainer.trainer.batches.batch_size, valid_loss=results['valid_loss'], trained_tokens=trained)


def stop_by_one_signal(folder, world):
    """A signal that reaches the last process alone."""
    trainer = DistributedMuLaNTrainer(
        still_mulan(), StillTones(), DistributedConfig(backend='gloo'), results_folder=f'{folder}/stopped', **COMMON
    )

    def log(metrics):
        if trainer.step == 2 and int(os.environ['RANK']) == world - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        trainer.train(num_train_steps=5, log_fn=log)
    (path,) = checkpoints.steps(Path(folder) / 'stopped' / 'checkpoints')
    return dict(step=trainer.step, written=path.name, code=stopped.value.code)


@pytest.mark.slow
@pytest.mark.parametrize('world', [2, 4])
def test_several_processes_equal_one(tmp_path, world):
    of_rank = run_world(tmp_path, world, train_runs)
    assert [found['stopped'] for found in of_rank] == [dict(step=2, written='step-000000002', code=143)] * world
    alone = {}
    assert [found['small']['batch_size'] for found in of_rank] == [20 // world] * world
    assert len({found['small']['valid_loss'] for found in of_rank}) == 1
    # each has read a part of the texts of the step, and knows of all
    assert [found['small']['trained_tokens'] for found in of_rank] == [[*range(1, 21), 50]] * world
    assert math.isfinite(of_rank[0]['small']['valid_loss'])
    for name in NAMES[world]:
        batch_size, config, keywords, _ = RUNS[name]
        accumulate, use_ema = kind = config.get('gradient_accumulation_steps', 1), keywords.get('use_ema', False)
        if kind not in alone:
            alone[kind] = train_alone(
                tmp_path / f'alone {accumulate} {use_ema}',
                data=StillTones(SIZES[world]),
                batch_size=batch_size,
                grad_accum_every=accumulate,
                use_ema=use_ema,
                validate_every=STEPS // 2,
            )
        start, expected_results, expected = alone[kind]
        assert largest_difference(expected, start) > 4e-4  # it moved
        for found in of_rank:
            found_weights, average, results = found[name]
            assert largest_difference(found_weights, expected) <= 1e-5, name
            assert results['loss'] == pytest.approx(expected_results['loss'], abs=1e-5)
            assert results['valid_loss'] == pytest.approx(expected_results['valid_loss'], abs=1e-4)
            # a mean of precisions at ranks: rounding, which differs between processors, may swap two clips
            assert results['valid_score'] == pytest.approx(expected_results['valid_score'], abs=0.01)
            if use_ema:
                written = checkpoints.read(tmp_path / 'alone 1 True' / 'checkpoints' / f'step-{STEPS:09d}')['ema']
                ema = {key.removeprefix('ema_model.'): tensor for key, tensor in written.items() if 'ema_model.' in key}
                assert largest_difference(average, ema) <= 1e-5
        # what one process keeps is there once, and what a world has written one process can read
        lines = [json.loads(line) for line in (tmp_path / name / 'metrics.jsonl').read_text().splitlines()]
        assert [line['step'] for line in lines if line['part'] == 'train'] == [STEPS // 2, STEPS]
        assert [line['step'] for line in lines if line['part'] == 'valid'] == [STEPS // 2, STEPS]
        folder = tmp_path / name
        processes = {path.name.split('.')[-2] for path in folder.rglob('events.out.tfevents.*')}
        assert len(processes) == ('log_with' in keywords)
        again = MuLaNTrainer(
            still_mulan(hierarchical_contrastive_loss=True),
            StillTones(SIZES[world]),
            batch_size=batch_size,
            resume=True,
            results_folder=folder,
            accelerate_kwargs=dict(cpu=True),
            **COMMON,
        )
        assert again.step == STEPS
        trained = MuLaN.from_pretrained(folder / 'last').text.trained_tokens
        assert torch.equal(again.mulan.text.trained_tokens, trained)
        assert torch.equal(MuLaN.from_pretrained(folder / 'best').text.trained_tokens, trained)
        alone_folder = tmp_path / f'alone {accumulate} {use_ema}'
        assert torch.equal(MuLaN.from_pretrained(alone_folder / 'last').text.trained_tokens, trained)
        assert largest_difference(weights(again.mulan), of_rank[0][name][0]) == 0


# ---- wherever it is called ----


class Tones(StillTones):
    """Tones of random phase; process 1 is killed once, in its `fatal`-th item."""

    def __init__(self, flag=None, fatal=None):
        super().__init__()
        self.flag = flag
        self.fatal = fatal
        self.visits = 0

    def __getitem__(self, index):
        self.visits += 1
        if self.visits == self.fatal and os.environ['RANK'] == '1' and not Path(self.flag).exists():
            Path(self.flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        wave, text = super().__getitem__(index)
        return wave + torch.rand(()), text


def lively_mulan():
    torch.manual_seed(3)
    return tiny_mulan(dict(depth=1, attn_dropout=0.1), dict(depth=1, ff_dropout=0.1))


LIVELY = dict(batch_size=4, valid_frac=0.25, lr=1e-3, progress=False, checkpoint_every=2, use_ema=True)


def train_undisturbed(folder, world):
    config = DistributedConfig(world_size=world, backend='gloo')
    trainer = DistributedMuLaNTrainer(lively_mulan(), Tones(), config, results_folder=f'{folder}/calm', **LIVELY)
    results = trainer.train(num_train_steps=10)
    return weights(trainer.mulan), trainer.mulan.text.trained_tokens, results['loss'], results['valid_score']


@pytest.mark.slow
def test_a_killed_process_costs_nothing_but_time(tmp_path):
    """Called plainly, in two parts with a process killed in the first, as undisturbed; and with a faulty data set."""
    expected, trained_tokens, *found = run_world(tmp_path, 2, train_undisturbed)[0]
    config = DistributedConfig(world_size=2, backend='gloo', max_restarts=1)
    mulan, steps, flag, folder = lively_mulan(), [], tmp_path / 'flag', tmp_path / 'results'
    before, handler, threads = weights(mulan), signal.getsignal(signal.SIGINT), set(threading.enumerate())
    folder.mkdir()
    (folder / 'earlier').touch()
    # two batches of four an epoch, and four held-out items after each: the 15th item is in step 3
    trainer = DistributedMuLaNTrainer(mulan, Tones(flag, 15), config, results_folder=folder, **LIVELY)
    assert [path.name for path in folder.iterdir()] == ['earlier']  # nothing is started, nothing written
    trainer.train(num_train_steps=5)
    assert flag.exists()
    assert [path.name for path in (tmp_path / 'results.1').iterdir()] == ['earlier']
    results = trainer.train(num_train_steps=10, log_fn=lambda metrics: steps.append(metrics['loss']))
    assert trainer.step == 10
    assert steps[-1] == results['loss']
    assert len(steps) == 5
    assert set(threading.enumerate()) <= threads
    assert signal.getsignal(signal.SIGINT) is handler
    assert not torch.distributed.is_initialized()
    assert largest_difference(weights(mulan), before) > 1e-3
    assert [results['loss'], results['valid_score']] == found
    assert_same(weights(mulan), expected)
    assert mulan.text.trained_tokens.any()
    assert torch.equal(mulan.text.trained_tokens, trained_tokens)

    alone = dataclasses.replace(config, world_size=1)
    with pytest.raises(IndexError, match='item 3 is not there'):
        DistributedMuLaNTrainer(mulan, Faulty(), alone, results_folder=tmp_path / 'faulty', **LIVELY).train(1)


class Faulty(StillTones):
    def __getitem__(self, index):
        if index == 3:
            raise IndexError('item 3 is not there')
        return super().__getitem__(index)


PROGRAM = """
import os
import sys
import torch
from musiclm_pytorch.distributed import *
sys.path.insert(0, {tests!r})
from test_distributed_training import COMMON, still_mulan

class Own(torch.utils.data.Dataset):
    def __len__(self):
        return 28

    def __getitem__(self, index):
        return torch.sin((index + 1) * torch.arange(1200) * 0.1), torch.tensor([index + 1, 50, index + 1])

port, *node = sys.argv[1:]
nodes = dict(num_nodes=2, node_rank=int(node[0]), master_addr='127.0.0.1', master_port=int(port)) if node else dict()
mulan = still_mulan(hierarchical_contrastive_loss=True)
config = create_distributed_config(world_size=2, backend='gloo', **nodes)
trainer = DistributedMuLaNTrainer(mulan, Own(), config, batch_size=4, results_folder='results', **COMMON)
trainer.train(num_train_steps=3)
mulan.save_pretrained('trained' + ''.join(node) + os.environ.get('RANK', ''))
"""


@pytest.mark.slow
@pytest.mark.parametrize('launcher', ['accelerate', 'itself on two nodes'])
def test_one_program_under_every_launcher(tmp_path, launcher):
    """The data set is a class of the program itself, which nothing guards against being run again; all get the weights
    of one process. `test_contract.py` does the same as one does interactively."""
    (tmp_path / 'program.py').write_text(PROGRAM.format(tests=str(TESTS)), encoding='utf-8')
    port = str(free_port())
    # which runs torchrun's own function
    accelerate = ['-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes=2', '--main_process_port=0']
    commands = {
        'accelerate': [[*accelerate, 'program.py', port]],
        'itself on two nodes': [['program.py', port, node] for node in '01'],
    }[launcher]
    running = [subprocess.Popen([sys.executable, *command], cwd=tmp_path) for command in commands]
    assert {it.wait() for it in running} == {0}
    _, _, expected = train_alone(tmp_path / 'alone', steps=3, batch_size=8)
    for number in '01':
        trained = MuLaN.from_pretrained(tmp_path / f'trained{number}')
        assert largest_difference(weights(trained), expected) <= 1e-5


# ---- settings ----


def test_config_resolves_what_is_left_open(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    config = DistributedConfig(use_amp=True)
    assert (config.world_size, config.backend, config.use_ddp, config.amp_dtype) == (1, 'gloo', True, 'bf16')
    assert DistributedConfig(use_fsdp=True).use_ddp is False
    assert DistributedConfig(world_size=4).processes_a_node == 4
    assert create_distributed_config(gradient_clipping=1.0).gradient_clipping == 1.0
    assert not create_distributed_config().use_amp
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.world_size = 2
    for name, value in dict(RANK='1', LOCAL_RANK='1', WORLD_SIZE='6', LOCAL_WORLD_SIZE='3').items():
        monkeypatch.setenv(name, value)
    assert create_distributed_config().world_size == 6
    assert DistributedConfig().processes_a_node == 3


def test_config_on_a_machine_with_gpus(monkeypatch):
    """What is decided from the number of GPUs; nothing runs on them here."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: False)
    config = create_distributed_config()
    assert (config.world_size, config.backend, config.use_amp, config.amp_dtype) == (2, 'nccl', True, 'fp16')
    assert 2 <= config.num_workers <= 8
    assert DistributedConfig(num_nodes=3, master_addr='a').world_size == 6
    assert DistributedConfig(world_size=5, backend='gloo').device_type == 'cpu'
    with pytest.raises(ValueError, match='3 processes need as many GPUs, but there are 2; lower world_size'):
        DistributedConfig(world_size=3)
    with pytest.raises(ValueError, match='fp16.* with use_ddp only'):
        DistributedConfig(use_fsdp=True, use_amp=True)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        (dict(world_size=0), 'world_size must be greater than 0'),
        (dict(gradient_accumulation_steps=0), 'gradient_accumulation_steps'),
        (dict(gradient_clipping=-1.0), 'gradient_clipping'),
        (dict(bucket_cap_mb=0), 'bucket_cap_mb'),
        (dict(backend='mpi'), "unknown backend 'mpi'"),
        (dict(backend='nccl'), 'nccl.* needs CUDA'),
        (dict(use_ddp=True, use_fsdp=True), 'choose one'),
        (dict(world_size=2, use_ddp=False), 'needs use_ddp or use_fsdp'),
        (dict(use_amp=True, amp_dtype='fp16'), 'fp16.* works on CUDA'),
        (dict(use_amp=True, amp_dtype='fp8'), "unknown amp_dtype 'fp8'"),
        (dict(amp_dtype='bf16'), 'does nothing without use_amp'),
        (dict(prefetch_factor=2), 'prefetch_factor=2 needs num_workers'),
        (dict(num_workers=-1), 'must be at least 0, got -1'),
        (dict(max_restarts=-1), 'must be at least 0, got -1'),
        (dict(world_size=3, num_nodes=2, master_addr='a'), 'cannot be shared evenly'),
        (dict(world_size=2, num_nodes=2), 'needs master_addr'),
        (dict(node_rank=1), 'node_rank must lie in'),
        (dict(master_port=70000), 'master_port'),
        (dict(use_fsdp=True, find_unused_parameters=True), 'find_unused_parameters is a setting of DDP'),
        (dict(use_fsdp=True, sync_batchnorm=True), 'sync_batchnorm works with use_ddp only'),
        (dict(use_fsdp=True, compile=True), 'compile works with use_ddp only'),
    ],
)
def test_config_refuses_what_it_cannot_honour(monkeypatch, fields, message):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ValueError, match=message):
        DistributedConfig(**fields)


def test_wrong_settings_of_the_trainer(tmp_path):
    config = DistributedConfig(world_size=2, backend='gloo', sync_batchnorm=True)

    def refused(error, match, build=DistributedMuLaNTrainer, **keywords):
        with pytest.raises(error, match=match):
            build(still_mulan(), StillTones(), **keywords)

    refused(TypeError, "unknown keyword 'batchsize'", batchsize=4)
    refused(ValueError, 'is decided by gradient_accumulation_steps', config=TrainingConfig(grad_accum_every=2))
    refused(ValueError, 'is decided by gradient_accumulation_steps', grad_accum_every=4)
    refused(ValueError, 'a TrainingConfig goes into Dist', run_distributed_training, config=TrainingConfig())
    given = dict(world_size=2, distributed_config=config)
    refused(ValueError, 'distributed_config or its fields, not both; got world_size', run_distributed_training, **given)
    refused(ValueError, 'no launcher has started this process', WorldTrainer, distributed_config=config)
    for wrong in (dict(wrong=1), dict(world_size='two')):
        with pytest.raises(TypeError):
            DistributedConfig(**wrong)
    DistributedMuLaNTrainer(still_mulan(), StillTones(), config)  # no BatchNorm, nothing to synchronise
    normed = still_mulan()
    normed.text_to_latents = torch.nn.Sequential(normed.text_to_latents, torch.nn.BatchNorm1d(16))
    with pytest.raises(ValueError, match='the model has text_to_latents.1; pass sync_batchnorm=False'):
        DistributedMuLaNTrainer(normed, StillTones(), config)
    data = StillTones()
    data.lock = threading.Lock()
    trainer = DistributedMuLaNTrainer(still_mulan(), data, results_folder=tmp_path)
    with pytest.raises(TypeError, match='cannot be sent to other processes'):
        trainer.train(num_train_steps=1)


# ---- what a field does to one process ----


def kept_bytes(function):
    """Bytes that autograd keeps for the backward pass of what a function computes."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return function(), sum(kept.values())


def test_recomputing_changes_memory_not_gradients():
    torch.manual_seed(3)
    dropout = dict(depth=3, attn_dropout=0.2, ff_dropout=0.2)
    mulan = tiny_mulan(dropout | dict(support_variable_length=True), dropout, hierarchical_contrastive_loss=True)
    wavs, texts = torch.randn(3, 1500), torch.randint(0, 100, (3, 7))
    lengths = torch.tensor([1500, 900, 1201])
    found = []
    for recompute in (False, True):
        for tower in (mulan.audio, mulan.text):
            tower.transformer.checkpoint_activations = recompute
        mulan.zero_grad()
        torch.manual_seed(5)
        loss, kept = kept_bytes(lambda: mulan(wavs, texts, audio_lengths=lengths))
        loss.backward()
        found.append((loss.detach(), kept, {name: p.grad.clone() for name, p in mulan.named_parameters()}))
    (loss, kept, gradients), (again, kept_less, gradients_again) = found
    assert torch.equal(loss, again)
    assert kept_less < 0.6 * kept
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_trainers_of_several_precisions_in_one_process(tmp_path):
    """Each keeps its own, whatever was built after it."""
    expected = {name: train_alone(tmp_path / name, steps=3, batch_size=8, mixed_precision=name)[2] for name in DTYPES}
    assert largest_difference(expected['no'], expected['bf16']) > 1e-6
    trainers, models = {}, {}
    for name in DTYPES:
        models[name] = still_mulan(hierarchical_contrastive_loss=True)
        trainers[name] = MuLaNTrainer(
            models[name],
            StillTones(),
            batch_size=8,
            mixed_precision=name,
            results_folder=tmp_path / f'{name} again',
            accelerate_kwargs=dict(cpu=True),
            **COMMON,
        )
    for steps in (1, 2, 3):
        for trainer in trainers.values():
            trainer.train(num_train_steps=steps)
    for name in DTYPES:
        assert largest_difference(weights(models[name]), expected[name]) == 0


DTYPES = ('no', 'bf16')
