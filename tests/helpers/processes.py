"""Processes that a test starts beside its own, and a port where they may meet."""

import multiprocessing
import os
import socket

import torch.multiprocessing

# They fork from one process that has imported, once, by far most of what they need. As with spawn, nothing of the
# test's process is in them: what they run, and the file that it is in, they import by themselves.
METHOD = 'forkserver'
multiprocessing.set_forkserver_preload(
    ['torch._dynamo', 'accelerate', 'pytest', 'musiclm_pytorch.trainer.mulan', 'musiclm_pytorch.trainer.stages']
)


def start_processes(function, *arguments, count):
    """Run `function(rank, *arguments)` in `count` processes, and raise what goes wrong in one."""
    torch.multiprocessing.start_processes(function, args=arguments, nprocs=count, start_method=METHOD)


def join_world(rank, world=2, *, port=None):
    """Be one of several processes as a launcher starts them, with the cores of one."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    if port is not None:
        os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)


def found_elsewhere(function, *arguments):
    """What a function returns in a process where nothing has been done before, and strings have other hashes."""
    with multiprocessing.get_context(METHOD).Pool(1) as pool:
        return pool.apply(function, arguments)


def free_port():
    with socket.socket() as it:
        it.bind(('127.0.0.1', 0))
        return it.getsockname()[1]
