"""Classes that fairseq checkpoints name, replaced by ones that hold data and run nothing.

`torch.load(..., weights_only=True)` builds only what is registered as safe. For a registered class it may
call the constructor (pickle's REDUCE and NEWOBJ) and `__setstate__` (BUILD) with whatever the file says. So a
class is fit to be registered if neither does more than store its arguments.
"""

import argparse
import collections
import importlib.util
import typing

import torch


class Inert:
    """An object of a checkpoint, kept as data.

    args: what the pickle passed to the constructor.
    state: what the pickle passed to `__setstate__`, or None. Kept whole under one name, not spread over the
        attributes, so that a file cannot overwrite any attribute or method of the object.
    """

    __slots__ = ('args', 'state')
    stands_for = ''

    def __new__(cls, *args):
        self = super().__new__(cls)
        self.args = args
        self.state = None
        return self

    def __setstate__(self, state):
        self.state = state

    def __repr__(self):
        return f'<inert {self.stands_for}>'


# fairseq's HuBERT checkpoints hold their label dictionaries (`task_state`). Those saved from a structured
# configuration also name the dataclasses it was made of; enumerations are saved as plain strings.
CONFIGS = (
    *('Checkpoint', 'Common', 'CommonEval', 'Dataset', 'DistributedTraining', 'EMA', 'EvalLM', 'FairseqBMUF'),
    *('Fairseq', 'Generation', 'Interactive', 'Optimization'),
)
FAIRSEQ_NAMES = (
    'fairseq.data.dictionary.Dictionary',
    'fairseq.criterions.hubert_criterion.HubertCriterionConfig',
    *(f'fairseq.dataclass.configs.{name}Config' for name in CONFIGS),
    'fairseq.models.hubert.hubert.HubertConfig',
    'fairseq.optim.adam.FairseqAdamConfig',
    'fairseq.optim.lr_scheduler.polynomial_decay_schedule.PolynomialDecayLRScheduleConfig',
    'fairseq.tasks.hubert_pretraining.HubertPretrainingConfig',
)

NODES = ('Any', 'Boolean', 'Bytes', 'Enum', 'Float', 'Integer', 'Path', 'String', 'Value')
OMEGACONF_NAMES = (
    '_operator.getitem',  # how its metadata writes a type such as List[int]
    *(f'omegaconf.base.{name}' for name in ('ContainerMetadata', 'Metadata', 'UnionNode')),
    'omegaconf.dictconfig.DictConfig',
    'omegaconf.listconfig.ListConfig',
    *(f'omegaconf.nodes.{name}Node' for name in NODES),
)

# What a Namespace of arguments and omegaconf's metadata (types of keys and elements, a cache) refer to. The
# real objects, not inert ones: they run no code of the file, and other libraries register the same ones, so
# nobody is displaced.
STANDARD_GLOBALS = {
    'argparse.Namespace': argparse.Namespace,
    'builtins.bool': bool,
    'builtins.dict': dict,
    'builtins.float': float,
    'builtins.int': int,
    'builtins.list': list,
    'builtins.str': str,
    'builtins.tuple': tuple,
    'collections.defaultdict': collections.defaultdict,
    'typing.Any': typing.Any,
    'typing.Dict': typing.Dict,  # noqa: UP006 - the very objects, by the names that pickles have for them
    'typing.List': typing.List,  # noqa: UP006
    'typing.Tuple': typing.Tuple,  # noqa: UP006
}


def register_safe_globals() -> None:
    """Registers the classes of this module with torch; names that are registered already stay as they are."""
    # torch keeps one class a name and, where two claim it, chooses by the order of a set. So where omegaconf
    # is installed its names are not touched: a program that has it may register the real classes later, as
    # many that load other checkpoints do, and must get them. Registering the real ones here would be worse:
    # they resolve interpolations by whatever resolvers the program has, which is for the program to allow.
    names = FAIRSEQ_NAMES
    if importlib.util.find_spec('omegaconf') is None:
        names += OMEGACONF_NAMES

    candidates = {**STANDARD_GLOBALS, **{name: _inert_class(name) for name in names}}
    taken = _registered_names()
    torch.serialization.add_safe_globals([(value, name) for name, value in candidates.items() if name not in taken])


def _inert_class(name: str) -> type[Inert]:
    """A class of its own for each name: torch recognises what it may build by identity."""
    return type(name.rpartition('.')[2], (Inert,), {'__slots__': (), 'stands_for': name})


def _registered_names() -> set[str]:
    return {
        entry[1] if isinstance(entry, tuple) else f'{entry.__module__}.{entry.__qualname__}'
        for entry in torch.serialization.get_safe_globals()
    }
