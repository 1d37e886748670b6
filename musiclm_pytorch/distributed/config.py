"""What several processes share and how: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from musiclm_pytorch.checks import check_choice, check_not_negative, check_positive, typechecked
from musiclm_pytorch.kernels.processor import half_precision

BACKENDS = {'nccl': 'cuda', 'gloo': 'cpu'}
AMP_DTYPES = ('bf16', 'fp16')


@typechecked
@dataclass(frozen=True)
class DistributedConfig:
    """How many processes train, on what, and how they share the work. Fields left None are resolved when it is made.

    Attributes:
        world_size: processes in all; by default what the launcher says (WORLD_SIZE), else one for each GPU, else 1.
        use_ddp: each process holds the whole model and averages gradients (DistributedDataParallel). The default
            unless `use_fsdp`.
        use_fsdp: each process holds a part of the parameters, gradients and optimizer states (FSDP2, `fully_shard`).
        use_amp: mixed precision; master weights stay float32.
        amp_dtype: 'bf16' or, on CUDA only, 'fp16'; by default bf16 where the device computes in it.
        gradient_accumulation_steps: micro-batches a step; a step is one contrast over all of them.
        gradient_clipping: largest norm of the gradients, None for no clipping.
        sync_batchnorm: BatchNorm modules, if the model has any, take their statistics over all processes (CUDA only).
        backend: 'nccl' trains on GPUs, 'gloo' on CPUs; by default nccl where there is CUDA.
        bucket_cap_mb: MiB of gradients that DDP sends at a time.
        find_unused_parameters: let DDP look for parameters that a step did not use.
        gradient_checkpointing: recompute the layers of both towers in the backward pass, for memory.
        compile: run both towers through torch.compile.
        num_workers: processes a training process that read data.
        prefetch_factor: batches that each of them reads ahead; by default 2.
        max_restarts: how often the launcher starts all processes again after one died, from the newest checkpoint.
        num_nodes: machines. Each of them has to run the program, with `world_size / num_nodes` processes.
        node_rank: which of them this one is, from 0.
        master_addr, master_port: where they meet: address and a free port of node 0.

    Raises:
        ValueError: a value that cannot be honoured, here or at all.
    """

    world_size: int | None = None
    use_ddp: bool | None = None
    use_fsdp: bool = False
    use_amp: bool = False
    amp_dtype: str | None = None
    gradient_accumulation_steps: int = 1
    gradient_clipping: float | None = 0.5
    sync_batchnorm: bool = False
    backend: str | None = None
    bucket_cap_mb: float = 25
    find_unused_parameters: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    num_workers: int = 0
    prefetch_factor: int | None = None
    max_restarts: int = 3
    num_nodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int = 29400

    def __post_init__(self):
        check_positive(
            world_size=self.world_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            gradient_clipping=self.gradient_clipping,
            bucket_cap_mb=self.bucket_cap_mb,
            num_nodes=self.num_nodes,
            prefetch_factor=self.prefetch_factor,
        )
        check_not_negative(num_workers=self.num_workers, max_restarts=self.max_restarts)
        if self.prefetch_factor is not None and self.num_workers == 0:
            raise ValueError(f'prefetch_factor={self.prefetch_factor} needs num_workers of at least 1')
        self._resolve_backend()
        self._resolve_world()
        self._resolve_parallelism()
        self._resolve_precision()

    @property
    def device_type(self) -> str:
        return BACKENDS[self.backend]

    @property
    def processes_a_node(self) -> int:
        """Processes on this machine: the launcher's number, where one has started this process."""
        here = os.environ.get('LOCAL_WORLD_SIZE') if is_launched() else None
        return self.world_size // self.num_nodes if here is None else int(here)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _resolve_backend(self) -> None:
        cuda = torch.cuda.is_available()
        if self.backend is None:
            self._set(backend='nccl' if cuda else 'gloo')
        check_choice(BACKENDS, backend=self.backend)
        if self.backend == 'nccl' and not cuda:
            raise ValueError("backend='nccl' needs CUDA, which is not available; use 'gloo'")

    def _resolve_world(self) -> None:
        if self.world_size is None:
            gpus = torch.cuda.device_count() * self.num_nodes if self.backend == 'nccl' else 1
            self._set(world_size=launched_world_size() or max(1, gpus))
        if self.world_size % self.num_nodes != 0:
            raise ValueError(f'{self.world_size} processes cannot be shared evenly by num_nodes={self.num_nodes}')
        if not 0 <= self.node_rank < self.num_nodes:
            raise ValueError(f'node_rank must lie in [0, {self.num_nodes}), got {self.node_rank}')
        if self.num_nodes > 1 and self.master_addr is None and not is_launched():
            raise ValueError(f'num_nodes={self.num_nodes} needs master_addr, the address of the first node')
        if not 0 < self.master_port < 65536:
            raise ValueError(f'master_port must lie between 1 and 65535, got {self.master_port}')
        if self.backend == 'nccl' and self.processes_a_node > torch.cuda.device_count():
            raise ValueError(
                f'{self.processes_a_node} processes need as many GPUs, but there are {torch.cuda.device_count()}; '
                "lower world_size, set num_nodes, or train on CPUs with backend='gloo'"
            )

    def _resolve_parallelism(self) -> None:
        if self.use_ddp and self.use_fsdp:
            raise ValueError('use_ddp and use_fsdp are two ways to share a model; choose one')
        if self.use_ddp is None:
            self._set(use_ddp=not self.use_fsdp)
        if self.world_size > 1 and not (self.use_ddp or self.use_fsdp):
            raise ValueError(f'world_size={self.world_size} needs use_ddp or use_fsdp: without, processes drift apart')
        if self.use_fsdp and self.find_unused_parameters:
            raise ValueError('find_unused_parameters is a setting of DDP; FSDP does not wait for unused parameters')
        for name in ('compile', 'sync_batchnorm'):
            if getattr(self, name) and self.use_fsdp:
                raise ValueError(f'{name} works with use_ddp only')

    def _resolve_precision(self) -> None:
        if not self.use_amp:
            if self.amp_dtype is not None:
                raise ValueError(f'amp_dtype={self.amp_dtype!r} does nothing without use_amp=True')
            return
        if self.amp_dtype is None:
            self._set(amp_dtype=half_precision(self.device_type))
        check_choice(AMP_DTYPES, amp_dtype=self.amp_dtype)
        if self.amp_dtype == 'fp16' and (self.device_type == 'cpu' or self.use_fsdp):
            raise ValueError("amp_dtype='fp16' works on CUDA with use_ddp only; use 'bf16'")


def create_distributed_config(**fields: Any) -> DistributedConfig:
    """A `DistributedConfig` that suits this machine, or the launcher that started this process.

    One process for each GPU, mixed precision and two to eight readers of data each; without a GPU one process, float32
    and no readers. Under torchrun or `accelerate launch` the world is theirs. `fields` override what is chosen.

    Raises TypeError for an unknown field, ValueError for what `DistributedConfig` refuses.
    """
    chosen: dict[str, Any] = {}
    if fields.get('backend', 'nccl' if torch.cuda.is_available() else 'gloo') == 'nccl' and torch.cuda.is_available():
        chosen['use_amp'] = True
        processes = max(1, DistributedConfig(**{k: v for k, v in fields.items() if k in _WORLD}).processes_a_node)
        chosen['num_workers'] = min(8, max(2, (os.cpu_count() or 1) // processes - 1))
    return DistributedConfig(**(chosen | fields))


_WORLD = ('world_size', 'num_nodes', 'node_rank', 'master_addr', 'master_port', 'backend')


def is_launched() -> bool:
    """Whether torchrun, `accelerate launch` or another launcher has started this process as one of a world."""
    return all(name in os.environ for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'))


def launched_world_size() -> int | None:
    return int(os.environ['WORLD_SIZE']) if is_launched() else None
