"""The pages of the reference, made when the site is built: the names of the stubs by room, as docstrings tell them."""

import ast
import functools
import importlib
import inspect
import types
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / 'musiclm_pytorch'
# the rest are re-exports, and what is only there for code of 0.2.8
ROOMS = {
    'musiclm': 'MusicLM',
    'waves': 'What MusicLM returns',
    'mulan': 'MuLaN',
    'quantizer': 'Quantizer',
    'audiolm': 'Stages, tokens, sampling',
    'codecs': 'Codecs',
    'data': 'Data',
    'trainer': 'Training',
    'distributed': 'Several processes',
    'evaluation': 'Evaluation',
    'inference': 'Inference',
    'open_clip': 'OpenCLIP',
}


def public_names() -> dict[str, list[str]]:
    """The full paths of the public names of each room, in the order of the stubs."""
    found = {room: [] for room in ROOMS}
    for stub in sorted(PACKAGE.rglob('*.pyi')):
        home = stub.parent.relative_to(PACKAGE.parent).parts
        for node in ast.parse(stub.read_text(encoding='utf-8')).body:
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            module = (
                [*home[: len(home) - node.level + 1], *node.module.split('.')] if node.level else node.module.split('.')
            )
            room = module[1] if len(module) > 1 else ''
            for name in node.names:
                path = '.'.join([*module, name.name])
                if room in found and path not in found[room] and not name.name.startswith('_'):
                    found[room].append(path)
    return found


def found_at(path: str) -> object:
    module, name = path.rsplit('.', 1)
    return getattr(importlib.import_module(module), name)


def inherited(shown: object, public: list[object]) -> list[str]:
    """What a class has from others of the package; what public ones and those of torch give is told there."""
    if not inspect.isclass(shown):
        return []
    bases = [it for it in shown.__mro__[1:] if it.__module__.split('.')[0] == PACKAGE.name and it not in public]
    members = {name: it for base in reversed(bases) for name, it in vars(base).items()}
    methods = (types.FunctionType, property, functools.cached_property, classmethod, staticmethod)
    told = [name for name, it in members.items() if isinstance(it, methods) and it.__doc__ and name[0] != '_']
    return [name for name in told if name not in vars(shown)]


def on_config(config):
    config.nav.append({'Reference': [{title: f'reference/{room}.md'} for room, title in ROOMS.items()]})
    return config


def on_files(files, config):
    from mkdocs.structure.files import File  # there where the site is built

    rooms = {room: {path: found_at(path) for path in paths} for room, paths in public_names().items()}
    public = [shown for paths in rooms.values() for shown in paths.values()]
    for room, paths in rooms.items():
        content = [f'# {ROOMS[room]}']
        for path, shown in paths.items():
            content.append(f'::: {path}\n    options:\n      inherited_members: {inherited(shown, public)}')
        files.append(File.generated(config, f'reference/{room}.md', content='\n\n'.join(content) + '\n'))
    return files
