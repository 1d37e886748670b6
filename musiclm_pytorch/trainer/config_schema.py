"""The schema of recipes: sections of keywords, checked against the signatures of what they are keywords of.

The signatures are all there is to declare: Python's `inspect` reads them, and beartype checks values by their hints.
jsonargparse (4.53) was tried in its place: to tell `--help` it has to load the constructors, hence torch; it takes a
key given twice without a word, names neither file nor nearest key, and knows no option with a dash.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from musiclm_pytorch.atomic import check_nesting, parsed_json
from musiclm_pytorch.checks import fitted, keywords_of, shown, shown_hint
from musiclm_pytorch.data.cells import once
from musiclm_pytorch.trainer.config import nearest, shipped_recipes


@dataclass(frozen=True)
class Section:
    """What a section may hold.

    Attributes:
        targets: functions and classes whose keywords it holds; the first that has a name tells its type.
        refused: keywords of theirs that cannot stand in a file, and why.
        more: types of further keys.
        groups: keys that are ways to say one thing, of which a section holds one at most.
    """

    targets: tuple[Callable, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    groups: tuple[frozenset[str], ...] = ()

    @property
    def types(self) -> dict[str, Any]:
        """The type of each valid key."""
        types = dict(self.more)
        for target in self.targets:
            for name, hint in keywords_of(target).items():
                types.setdefault(name, hint)
        return {name: hint for name, hint in types.items() if name not in self.refused}

    def described(self) -> dict[str, tuple[str, Any]]:
        """The type of each valid key, in words, and its default."""
        defaults = {}
        for target in self.targets:
            for name, it in inspect.signature(target).parameters.items():
                defaults.setdefault(name, it.default)
        return {
            name: (shown_hint(hint), defaults.get(name, inspect.Parameter.empty)) for name, hint in self.types.items()
        }

    def alternatives(self, key: str) -> set[str]:
        """Other keys that say the same thing."""
        return {other for group in self.groups if key in group for other in group} - {key}


class Word(str):
    """A word of the command line, and what it says in YAML: `no` is a word or a truth value, as its key wants it."""

    def __new__(cls, word: str, parsed: Any):
        made = super().__new__(cls, word)
        made.parsed = parsed
        return made


def check_sections(content: Any, sections: Mapping[str, Section], source: str) -> dict[str, dict[str, Any]]:
    """The sections of a recipe with their values as the signatures want them: tuples for lists, numbers for '5e-4'.

    Raises ValueError for an unknown section or key, with the nearest that exists, TypeError for a value of another
    type; all name `source`, the section and the key.
    """
    if not isinstance(content, Mapping):
        raise TypeError(f'{source} must hold the sections {", ".join(sections)}, got {shown(content)}')
    for name in content:
        if name not in sections:
            owners = [section for section in sections if name in sections[section].types]
            hint = f'it is a key of section {owners[0]!r}' if owners else nearest(name, sections)
            raise ValueError(f'{source}: unknown section {name!r}; {hint}')
    return {name: check_section(content.get(name), name, sections, source) for name in sections}


def check_section(values: Any, name: str, sections: Mapping[str, Section], source: str) -> dict[str, Any]:
    values = getattr(values, 'parsed', values)
    if values is None:  # a heading with nothing below it
        return {}
    if not isinstance(values, Mapping):
        raise TypeError(f'{source}: section {name!r} must hold keys and values, got {shown(values)}')
    section = sections[name]
    types = section.types
    checked = {}
    for key, value in values.items():
        where = f'{source}: {name}.{key}'
        if key in section.refused:
            raise ValueError(f'{where} cannot stand in a recipe: {section.refused[key]}')
        if key not in types:
            owners = [other for other in sections if key in sections[other].types]
            hint = f'it belongs to section {owners[0]!r}' if owners else nearest(key, types)
            raise ValueError(f'{source}: unknown key {key!r} in section {name!r}; {hint}')
        both = section.alternatives(key) & {other for other, it in values.items() if says_something(it)}
        if both and says_something(value):
            raise ValueError(f'{where} and {name}.{min(both)} say the same thing in two ways; keep one')
        checked[key] = as_wanted(value, types[key], where)
    return checked


def as_wanted(value: Any, hint: Any, where: str) -> Any:
    """A value as a type hint wants it; of a word of the command line, what it says in YAML or else the word itself."""
    if not isinstance(value, Word):
        return fitted(value, hint, where)
    try:
        return fitted(value.parsed, hint, where)
    except TypeError:
        if str not in (hint, *typing.get_args(hint)):
            raise
        return str(value)


def says_something(value: Any) -> bool:
    """Whether a value of a key in a group decides what the group is about: null and false leave it open."""
    value = getattr(value, 'parsed', value)
    return value is not None and value is not False


def read_content(path: str | Path) -> Any:
    """What a YAML or JSON file, or the recipe of that name in the package, holds. Nothing in it is run, and a key
    given twice is an error.

    Raises FileNotFoundError if there is none, ValueError for a file of another kind or one with a fault in it.
    """
    shipped = shipped_recipes()
    path = Path(path) if Path(path).exists() else shipped.get(str(path), Path(path))
    if not path.suffix and not path.exists():
        raise FileNotFoundError(f'there is no recipe {path}, neither a file nor in the package: {", ".join(shipped)}')
    if path.suffix.lower() not in ('.yaml', '.yml', '.json'):
        raise ValueError(f'{path} must end in .yaml, .yml or .json to be read as a recipe')
    if not path.is_file():
        raise FileNotFoundError(f'no recipe at {path}')
    try:
        text = path.read_text(encoding='utf-8')
        if path.suffix.lower() == '.json':
            return parsed_json(text, object_pairs_hook=once)
        content = yaml.load(text, Loader=_Loader)  # a SafeLoader
        check_nesting(content)
        return content
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8: {error.reason} at byte {error.start}') from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f'{path} cannot be read: {" ".join(str(error).split())}') from error
    except RecursionError as error:
        raise ValueError(f'{path} cannot be read: lists and sections in it are nested too deep') from error


class _Loader(yaml.SafeLoader):
    pass


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    try:
        # its own keys alone: one that `<<` brings along may be given anew
        own = [key for key, _ in node.value if key.tag != 'tag:yaml.org,2002:merge']
        once([(loader.construct_object(key), None) for key in own])
        loader.flatten_mapping(node)
        return {loader.construct_object(key): loader.construct_object(it, deep=True) for key, it in node.value}
    except (TypeError, ValueError) as error:
        raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
