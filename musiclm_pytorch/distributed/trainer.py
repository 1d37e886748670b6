"""Training MuLaN on several processes: started from here, by torchrun, or by `accelerate launch`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object
from torch import Tensor, nn

from musiclm_pytorch.checks import typechecked
from musiclm_pytorch.collectives import gather_sizes
from musiclm_pytorch.distributed.config import (
    DistributedConfig,
    create_distributed_config,
    is_launched,
    launched_world_size,
)
from musiclm_pytorch.mulan.model import MuLaN, PairLatents
from musiclm_pytorch.mulan.pretrained_towers import check_own
from musiclm_pytorch.trainer.config import TrainingConfig
from musiclm_pytorch.trainer.metrics_logger import check_trackers
from musiclm_pytorch.trainer.mulan import MuLaNTrainer
from musiclm_pytorch.trainer.resumable_loader import mixed_seed, seed_everything
from musiclm_pytorch.trainer.sharding import Sharing

MARKER = '.launcher'  # in a results folder: who has started the processes that write there

# keywords of MuLaNTrainer that a field of DistributedConfig decides here
DECIDED = {
    'grad_accum_every': 'gradient_accumulation_steps',
    'max_grad_norm': 'gradient_clipping',
    'mixed_precision': 'use_amp and amp_dtype',
    'use_mixed_precision': 'use_amp',
    'compile_model': 'compile',
    'num_workers': 'num_workers',
    'prefetch_factor': 'prefetch_factor',
}


class WorldTrainer(Sharing, MuLaNTrainer):
    """One process of a world that a launcher has started.

    Args:
        mulan, dataset: as in `MuLaNTrainer`. With FSDP a sharded copy of `mulan` is trained; `mulan` itself stays whole
            and is given the weights at each validation and at the end.
        distributed_config: how the processes share the work.
        further keywords: those of `MuLaNTrainer` that it does not decide.
    """

    def __init__(
        self,
        mulan: MuLaN,
        dataset: Any,
        distributed_config: DistributedConfig,
        *,
        resume: bool = False,
        results_folder: str | Path = './results',
        accelerate_kwargs: dict[str, Any] | None = None,
        seed: int = 42,
        **keywords: Any,
    ):
        config = distributed_config
        _check_world(config)
        if config.use_fsdp and keywords.get('use_ema'):
            raise ValueError('use_ema=True needs the whole model in every process; use_fsdp=True shares it out')
        self.whole_model = mulan
        if config.sync_batchnorm:
            _check_batchnorm(mulan, config.device_type)
            nn.SyncBatchNorm.convert_sync_batchnorm(mulan)
        self.sharded = config.use_fsdp
        model = copy.deepcopy(mulan) if self.sharded else mulan
        if config.gradient_checkpointing or config.use_fsdp:
            name = 'gradient_checkpointing' if config.gradient_checkpointing else 'use_fsdp'
            check_own(model.audio, model.text, what=f'{name}=True')
        for tower in (model.audio, model.text):
            if hasattr(tower, 'transformer'):  # not of others
                tower.transformer.checkpoint_activations = config.gradient_checkpointing

        accelerate_kwargs = dict(accelerate_kwargs or {})
        _join_world(config, accelerate_kwargs.get('kwargs_handlers', []))
        # dropout masks differ between processes, and are the same whenever these are started again
        process_seed = mixed_seed(seed, int(os.environ.get('RANK', 0)))
        torch.manual_seed(process_seed)
        seed_everything(process_seed)
        self.marker = Path(results_folder) / MARKER
        super().__init__(
            model,
            dataset,
            # a launcher that starts its processes again wants them to go on
            resume=resume or _is_restart(self.marker),
            results_folder=results_folder,
            accelerate_kwargs=_accelerate_keywords(config, accelerate_kwargs),
            seed=seed,
            grad_accum_every=config.gradient_accumulation_steps,
            max_grad_norm=config.gradient_clipping,
            mixed_precision=config.amp_dtype if config.use_amp else 'no',
            compile_model=config.compile,
            num_workers=config.num_workers,
            prefetch_factor=config.prefetch_factor,
            **keywords,
        )
        steps = gather_object([self.step])
        if len(set(steps)) > 1:
            raise RuntimeError(
                f'the processes found different checkpoints, of steps {steps}; results_folder={results_folder} must be '
                'on a file system that all nodes share'
            )

    # sharing out

    def parts_to_shard(self) -> list[nn.Module]:
        towers = (self.model.audio, self.model.text)
        return [part for tower in towers for layer in tower.transformer.layers for part in layer]

    def split(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        chunks = super().split(batches)
        if self.sharded:
            # gathering a layer takes all processes, so each runs it equally often
            missing = max(gather_sizes(len(chunks), self.device)) - len(chunks)
            first = {name: value[:1] for name, value in chunks[0].items()}
            chunks = chunks + [self.as_dummy(first)] * missing
        return chunks

    def encode(self, chunk: dict[str, Any]) -> PairLatents:
        return self.encode_last(chunk) if self.sharded else super().encode(chunk)

    def loss_of(self, latents: PairLatents) -> Tensor:
        return self.step_module(None, latents=latents) if self.sharded else super().loss_of(latents)

    def refresh_whole_model(self) -> None:
        super().refresh_whole_model()
        if self.sharded:
            self.whole_model.text.trained_tokens = self.model.text.trained_tokens

    @contextlib.contextmanager
    def opening_results(self) -> Iterator[None]:
        with super().opening_results():
            yield
        if self.is_main:
            self.marker.parent.mkdir(parents=True, exist_ok=True)  # as for metrics
            self.marker.write_text(_launcher(), encoding='utf-8')


class DistributedMuLaNTrainer:
    """Trains a MuLaN on several processes, wherever it is called.

    - Called plainly, from a script or a notebook, `train` starts the processes with torch's elastic launcher and brings
      the trained weights back into `mulan`. Nothing has to be guarded by `if __name__ == '__main__'`, and a data set
      may be defined in the script or notebook. If a process dies, all start again from the newest checkpoint, up to
      `max_restarts` times; so `checkpoint_every` bounds what is lost.
    - Under torchrun or `accelerate launch`, each process trains in the world that is there. Processes that such a
      launcher starts again find the newest checkpoint likewise.

    Validation, averages, checkpoints, logs and trackers are kept once, by the first process. The results folder must be
    on a file system that all nodes share.

    Args:
        mulan: the model; it holds the trained weights afterwards.
        dataset: as in `MuLaNTrainer`.
        distributed_config: by default what `create_distributed_config` chooses.
        config, further keywords: as of `MuLaNTrainer`, but for what the other config decides (accumulation, clipping,
            precision, compilation, readers). `batch_size` is that of one process: a micro-batch has
            `batch_size * world_size` pairs.

    Raises:
        TypeError: an unknown keyword. ValueError: a keyword that the config decides, or a world of another size than
        the launcher's.
    """

    @typechecked
    def __init__(
        self,
        mulan: MuLaN,
        dataset: Any,
        distributed_config: DistributedConfig | None = None,
        *,
        config: TrainingConfig | None = None,
        **keywords: Any,
    ):
        keywords = ({} if config is None else config.changed) | keywords
        for name in keywords:
            if name in DECIDED:
                raise ValueError(f'{name} is decided by {DECIDED[name]} of the DistributedConfig')
            if name not in _trainer_keywords():
                raise TypeError(f'unknown keyword {name!r}; those of MuLaNTrainer are {sorted(_trainer_keywords())}')
        told = {name: it for name, it in keywords.items() if it is not None and name in vars(TrainingConfig())}
        told = TrainingConfig(**told)
        config = create_distributed_config() if distributed_config is None else distributed_config
        if config.sync_batchnorm:
            _check_batchnorm(mulan, config.device_type)

        self.mulan = mulan
        self.dataset = dataset
        self.config = config
        self.results_folder = Path(told.results_folder).absolute()
        self.resume = told.resume
        self.clear = bool(told.force_clear_prev_results)
        ours = ('resume', 'force_clear_prev_results')
        self.keywords = {name: it for name, it in keywords.items() if name not in ours}
        self.keywords['results_folder'] = self.results_folder
        self.finished_steps = 0
        self.launched = False
        self.trainer: WorldTrainer | None = None
        if is_launched() or dist.is_initialized():
            self.trainer = WorldTrainer(
                mulan, dataset, config, resume=self.resume, force_clear_prev_results=self.clear, **self.keywords
            )

    @property
    def step(self) -> int:
        """Steps of the optimizer so far."""
        return self.finished_steps if self.trainer is None else self.trainer.step

    def train(
        self,
        num_epochs: int | None = None,
        num_train_steps: int | None = None,
        with_validation: bool = True,
        log_fn: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Train up to a step of the whole run, as `Trainer.train` does.

        Returns the last metrics. Raises what a process raised, if starting again would not have helped; RuntimeError
        when the restarts are used up. `log_fn` is called in this process, shortly after each step; once more for
        steps that a restart repeats.
        """
        lengths = dict(num_epochs=num_epochs, num_train_steps=num_train_steps, with_validation=with_validation)
        if self.trainer is not None:
            return self.trainer.train(**lengths, log_fn=log_fn)

        from musiclm_pytorch.distributed.launch import launch

        if self.config.node_rank == 0:
            check_trackers(self.keywords.get('log_with'), self.results_folder)
        # called again, this goes on, if the first call came so far that the results folder was its own
        resume = self.resume or (self.launched and _is_own(self.results_folder / MARKER))
        self.launched = True
        keywords = self.keywords | dict(resume=resume, force_clear_prev_results=self.clear)
        job = dict(mulan=self.mulan, dataset=self.dataset, config=self.config, keywords=keywords, train=lengths)
        outcome = launch(job, self.config, log_fn)
        self.mulan.load_state_dict(outcome['weights'])
        self.mulan.text.trained_tokens = outcome['trained_tokens']
        self.finished_steps = outcome['step']
        return outcome['results']


def run_distributed_training(
    model: MuLaN,
    dataset: Any,
    num_epochs: int = 1,
    batch_size: int = 32,
    learning_rate: float = 3e-4,
    world_size: int | None = None,
    *,
    distributed_config: DistributedConfig | None = None,
    **keywords: Any,
) -> dict[str, Any]:
    """Train `model` in place on several processes; see `DistributedMuLaNTrainer`.

    Args:
        model, dataset: what to train, and on what.
        num_epochs: passes over the data.
        batch_size: pairs a micro-batch and process.
        learning_rate: of the optimizer.
        world_size: processes.
        distributed_config: all of how; or leave it out, and
        further keywords: fields of `DistributedConfig` and keywords of `MuLaNTrainer`.

    Returns:
        the last metrics of training and validation.
    """
    names = {field.name for field in dataclasses.fields(DistributedConfig)}
    fields = {name: keywords.pop(name) for name in list(keywords) if name in names}
    if world_size is not None:
        fields['world_size'] = world_size
    if 'config' in keywords:
        raise ValueError(
            'learning_rate and batch_size are said here; a TrainingConfig goes into DistributedMuLaNTrainer'
        )
    if distributed_config is not None and fields:
        raise ValueError(f'pass distributed_config or its fields, not both; got {", ".join(sorted(fields))} too')
    config = create_distributed_config(**fields) if distributed_config is None else distributed_config
    trainer = DistributedMuLaNTrainer(model, dataset, config, lr=learning_rate, batch_size=batch_size, **keywords)
    return trainer.train(num_epochs=num_epochs)


def _trainer_keywords() -> set[str]:
    return {*inspect.signature(MuLaNTrainer).parameters} - {'mulan', 'dataset', 'config'}


def _check_world(config: DistributedConfig) -> None:
    """Raise ValueError unless the world of this process is the one that the config describes."""
    found = dist.get_world_size() if dist.is_initialized() else launched_world_size()
    if found is None:
        raise ValueError('no launcher has started this process; use DistributedMuLaNTrainer, which starts processes')
    if found != config.world_size:
        raise ValueError(
            f'the config says world_size={config.world_size}, but {found} processes were started; make them equal, or '
            'leave world_size out'
        )


def _join_world(config: DistributedConfig, handlers: list[Any]) -> None:
    if not dist.is_initialized():
        keywords = {}
        for handler in handlers:
            if isinstance(handler, InitProcessGroupKwargs):
                keywords = {name: value for name, value in handler.to_kwargs().items() if name == 'timeout'}
        store, rank, world_size = next(dist.rendezvous('env://', **keywords))
        if os.environ.get('LOCAL_WORLD_SIZE') == os.environ['WORLD_SIZE']:
            # torchrun keeps its store when it starts processes again, and with it the addresses of those that died
            store = dist.PrefixStore(f'attempt {os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}', store)
        dist.init_process_group(config.backend, store=store, rank=rank, world_size=world_size, **keywords)
    if dist.get_backend() != config.backend:
        raise ValueError(
            f'the process group of this program uses {dist.get_backend()!r}, but the config says {config.backend!r}'
        )


def _accelerate_keywords(config: DistributedConfig, given: dict[str, Any]) -> dict[str, Any]:
    cpu = config.device_type == 'cpu'
    if given.get('cpu', cpu) != cpu:
        raise ValueError(f'accelerate_kwargs say cpu={given["cpu"]}, but backend={config.backend!r} does not')
    ddp = DistributedDataParallelKwargs(
        bucket_cap_mb=config.bucket_cap_mb, find_unused_parameters=config.find_unused_parameters
    )
    return given | dict(cpu=cpu, kwargs_handlers=[ddp, *given.get('kwargs_handlers', [])])


def _check_batchnorm(mulan: MuLaN, device_type: str) -> None:
    found = [name for name, module in mulan.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if found and device_type != 'cuda':
        raise ValueError(
            f'sync_batchnorm=True: torch synchronises BatchNorm on CUDA only, and the model has {found[0]}; '
            'pass sync_batchnorm=False, or replace them by GroupNorm'
        )


def _launcher() -> str:
    """What tells one run of a launcher from another, and stays the same when it starts its processes again."""
    return f'{os.environ.get("TORCHELASTIC_RUN_ID", "")} {os.getppid()}'


def _is_restart(marker: Path) -> bool:
    """Whether the launcher has started these processes again, after they had made this results folder theirs."""
    restarts = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))
    return restarts > 0 and marker.is_file() and marker.read_text(encoding='utf-8') == _launcher()


def _is_own(marker: Path) -> bool:
    """Whether it was this process that started those which made a results folder theirs."""
    return marker.is_file() and marker.read_text(encoding='utf-8').split()[-1] == str(os.getpid())
