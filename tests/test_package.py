"""The package as a whole: its metadata, what its files may import, and what none of its files may hold.

The rules on source files are functions of a folder. Each runs on the package, where it must find nothing, and on
folders with one planted violation, which it must find: a rule that no longer sees anything would pass for ever.
"""

import ast
import functools
import graphlib
import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = 'musiclm_pytorch'

# Shared by rooms above and below the folders they lie in, hence leaves: they import nothing from the package.
LEAVES = ['version', 'checks', 'atomic', 'allocation', 'locking', 'extras', 'distributed.collectives', 'data.audio']
# A job goes from a process to its own children in a private folder, pickled as multiprocessing does; it is no file that
# people keep or exchange. Nothing else may unpickle.
HANDS_OVER_BY_PICKLE = {'distributed/launch.py': {'pickle', 'cloudpickle'}}
# A file may import from the leaves, from its own room and from rooms above it. The longest prefix decides.
ROOMS = [
    'pretrained',
    'kernels',
    'mulan',
    'data',
    'waves',
    'audiolm',
    'codecs',
    'quantizer',
    'musiclm',
    'trainer',
    'distributed',
    'gallery',
    'evaluation',
    'inference',
    'open_clip',
    'cli_parts',
    'cli_training',
    'cli_generate',
    'cli_play',
    'cli_evaluate',
    'cli_search',
    'cli_serve',
    'cli_app',
    'cli',
]
# These only name the rest again, so they may import anything, and nothing may import from them.
FACADES = ['__init__', 'musiclm_pytorch']

UNPICKLERS = {'pickle', '_pickle', 'cPickle', 'cloudpickle', 'dill', 'joblib', 'marshal', 'shelve'}


# ---------------------------------------------------------------------------------------------------------------
# Reading source files


@functools.lru_cache(2)
def sources(folder: Path) -> list[tuple[str, ast.Module, list]]:
    """Each source file of the package in `folder`: its path, from the package on, its syntax tree and its imports."""
    paths = sorted((folder / PACKAGE).rglob('*.py'))
    parsed = ((it.relative_to(folder / PACKAGE).as_posix(), ast.parse(it.read_text(encoding='utf-8'))) for it in paths)
    return [(path, tree, list(imports(path, tree))) for path, tree in parsed]


def module_of(path: str) -> str:
    """`mulan/model.py` → `mulan.model`, `mulan/__init__.py` → `mulan`, the root's stays `__init__`."""
    return path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')


def imports(path: str, tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """Line, dotted name and whether it waits for a call, of all that a file imports: in functions, for type
    checkers, and by `import_module('…')` too. Names inside the package come without its own name in front."""
    folder = [PACKAGE, *path.split('/')[:-1]]

    def visit(node: ast.AST, waits: bool) -> Iterator[tuple[int, str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, waits) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else []
            base = '.'.join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f'{base}.{alias.name}'.removesuffix('.*'), waits) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split('.')[-1] in {'import_module', '__import__'}:
            literals = [it.value for it in node.args[:1] if isinstance(it, ast.Constant) and isinstance(it.value, str)]
            yield from ((node.lineno, name, waits) for name in literals)
        waits = (
            waits
            or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or (isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test))
        )
        for child in ast.iter_child_nodes(node):
            yield from visit(child, waits)

    for line, name, waits in visit(tree, False):
        inside = name == PACKAGE or name.startswith(f'{PACKAGE}.')
        yield line, name.removeprefix(PACKAGE).removeprefix('.') or '__init__' if inside else f'/{name}', waits


def outside(name: str) -> str | None:
    """The top-level package of an import from elsewhere, None of one from the package."""
    return name[1:].split('.')[0] if name.startswith('/') else None


# ---------------------------------------------------------------------------------------------------------------
# Rules on source files: each gives a line a violation


def rank(module: str) -> int | None:
    """The place of a module's room from above, 0 for a leaf, None if it stands in no room."""
    places = dict.fromkeys(LEAVES, 0)
    places |= {room: place for place, room in enumerate(ROOMS, 1)}
    places |= dict.fromkeys(FACADES, len(ROOMS) + 1)
    homes = [home for home in places if module == home or module.startswith(f'{home}.')]
    return places[max(homes, key=len)] if homes else None


def wrong_imports(folder: Path) -> Iterator[str]:
    for path, _, imported in sources(folder):
        module = module_of(path)
        own = rank(module)
        if own is None:
            yield f'{path} stands in no room: give it a place in ROOMS and in the documentation'
            continue
        for line, name, _ in imported:
            if outside(name) == 'audiolm_pytorch' and path != 'audiolm/convert.py':
                yield f'{path}:{line} imports audiolm_pytorch: only audiolm/convert.py does, which undoes its effects'
            if outside(name) in {'torchaudio', 'torchvision'} and path != 'audiolm/convert.py':
                yield f'{path}:{line} imports {outside(name)}, which does not load beside every torch'
            if outside(name):
                continue
            other = rank(name)
            other = rank('__init__') if other is None else other  # a name of the package itself
            leaf = next((it for it in LEAVES if f'{module}.'.startswith(f'{it}.')), module)
            if own == 0 and not f'{name}.'.startswith(f'{leaf}.'):
                yield f'{path}:{line} imports {name}: a leaf imports nothing from the package'
            elif other > own:
                yield f'{path}:{line} imports {name} from a room below its own'


def import_cycles(folder: Path) -> Iterator[str]:
    """Cycles among the imports that run when a module is loaded. Loading a.b.c loads a and a.b before."""
    modules = {module_of(path): imported for path, _, imported in sources(folder)}
    graph = {}
    for module, imported in modules.items():
        edges = graph.setdefault(module, set())
        for _, name, waits in imported:
            if waits or outside(name):
                continue
            parts = name.split('.')
            loaded = [prefix for i in range(len(parts)) if (prefix := '.'.join(parts[: i + 1])) in modules]
            # a package is half loaded while its own files load, which is no harm unless they ask for its names
            edges |= {it for it in loaded if it == loaded[-1] or not f'{module}.'.startswith(f'{it}.')}
        edges.discard(module)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        yield 'imports run in a circle: ' + ' → '.join(reversed(error.args[1]))


def unsafe_calls(folder: Path) -> Iterator[str]:
    for path, tree, imported in sources(folder):
        for line, name, _ in imported:
            if outside(name) in UNPICKLERS - HANDS_OVER_BY_PICKLE.get(path, set()):
                yield f'{path}:{line} imports {outside(name)}: loading never runs code from a file'
        local = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                local |= {alias.asname: alias.name for alias in node.names if alias.asname}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                local |= {alias.asname or alias.name: f'{node.module}.{alias.name}' for alias in node.names}
        safe = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                if getattr(keywords.get('weights_only'), 'value', None) is True:
                    safe.add(node.func)
                if 'allow_pickle' in keywords and getattr(keywords['allow_pickle'], 'value', None) is not False:
                    yield f'{path}:{node.lineno} allows pickle: loading never runs code from a file'
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute | ast.Name):
                first, _, rest = ast.unparse(node).partition('.')
                name = f'{local.get(first, first)}.{rest}'.removesuffix('.')
                if name in {'torch.load', 'torch.serialization.load'} and node not in safe:
                    yield f'{path}:{node.lineno} uses torch.load without weights_only=True'
                if name == 'print' and not re.match(r'cli(_|$)', module_of(path)):
                    yield f'{path}:{node.lineno} prints: library code logs or returns'


def foreign_text(name: str, text: str) -> Iterator[str]:
    """Paths of one machine, and hosts that only some machines reach. Spelt in parts, since this file counts too."""
    folders = '|'.join(('work', 'root', 'home'))
    hosts = [('pypi', 'org'), ('pythonhosted', 'org'), ('pytorch', 'org/whl'), ('npmjs', 'org'), ('debian', 'org')]
    path = re.compile(rf'(?<![\w.~-])/(?:{folders})(?![\w.-])')
    host = re.compile('|'.join(re.escape('.'.join(parts)) for parts in hosts), re.IGNORECASE)
    for number, line in enumerate(text.splitlines(), 1):
        if path.search(line):
            yield f'{name}:{number} holds a path of one machine'
        if host.search(line):
            yield f"{name}:{number} names a registry's host: leave it to pip's configuration"


SOURCE_RULES = [wrong_imports, import_cycles, unsafe_calls]


def test_package_keeps_every_rule():
    assert len(sources(ROOT)) > 5
    assert [found for rule in SOURCE_RULES for found in rule(ROOT)] == []


PLANTED = [
    # (rule, what it says, the file, its text)
    (wrong_imports, 'below', 'mulan/model.py', 'from musiclm_pytorch.trainer.loop import Loop'),
    (wrong_imports, 'below', 'mulan/model.py', 'def f():\n    import musiclm_pytorch.data.datasets'),
    (wrong_imports, 'below', 'mulan/model.py', 'if TYPE_CHECKING:\n    from musiclm_pytorch.musiclm import MusicLM'),
    (wrong_imports, 'below', 'mulan/model.py', 'from musiclm_pytorch import data'),
    (wrong_imports, 'below', 'mulan/model.py', 'from musiclm_pytorch import MuLaN'),
    (wrong_imports, 'below', 'mulan/model.py', 'import musiclm_pytorch'),
    (wrong_imports, 'below', 'mulan/model.py', 'from .. import data'),
    (wrong_imports, 'below', 'mulan/model.py', 'from ..data import collate'),
    (wrong_imports, 'below', 'mulan/__init__.py', 'from ..data import collate'),
    (wrong_imports, 'below', 'mulan/model.py', "x = import_module('musiclm_pytorch.cli')"),
    (wrong_imports, 'below', 'musiclm.py', 'from musiclm_pytorch.musiclm_pytorch import MuLaN'),
    (wrong_imports, 'below', 'trainer/loop.py', 'from musiclm_pytorch.distributed import launch'),
    (wrong_imports, 'below', 'trainer/loop.py', 'from musiclm_pytorch.distributed.launch import launch'),
    (wrong_imports, 'below', 'evaluation/report.py', 'from musiclm_pytorch.cli import main'),
    (wrong_imports, 'leaf', 'data/audio.py', 'from musiclm_pytorch.checks import check_audio'),
    (wrong_imports, 'leaf', 'checks.py', 'from .version import __version__'),
    (wrong_imports, 'leaf', 'distributed/collectives.py', 'from musiclm_pytorch.distributed import launch'),
    (wrong_imports, 'no room', 'helpers.py', ''),
    (wrong_imports, 'no room', 'mulan_more/model.py', ''),
    (wrong_imports, 'convert', 'audiolm/generate.py', 'def f():\n    from audiolm_pytorch.t5 import t5_encode_text'),
    (wrong_imports, 'convert', '__init__.py', 'import audiolm_pytorch as a'),
    (wrong_imports, 'every torch', 'mulan/model.py', 'from torchaudio.functional import resample'),
    (wrong_imports, 'every torch', 'mulan/model.py', 'def f():\n    import torchvision'),
    (wrong_imports, 'below', 'kernels/linear.py', 'from musiclm_pytorch.mulan.model import x'),
    (import_cycles, 'circle', 'mulan/model.py', 'from musiclm_pytorch.mulan.layers import x'),
    (import_cycles, 'circle', 'mulan/model.py', 'from musiclm_pytorch.data.audio import x'),
    (import_cycles, 'circle', 'mulan/loss.py', 'from musiclm_pytorch.mulan import y'),
    (unsafe_calls, 'pickle', 'data/tokens.py', 'def f():\n    import pickle'),
    (unsafe_calls, 'joblib', 'data/tokens.py', 'from joblib import load'),
    (unsafe_calls, 'joblib', 'distributed/launch.py', 'from joblib import load'),
    (unsafe_calls, 'cloudpickle', 'distributed/worker.py', 'def f():\n    import cloudpickle'),
    (unsafe_calls, 'cloudpickle', 'trainer/launch.py', 'import cloudpickle'),
    (unsafe_calls, 'pickle', 'data/tokens.py', "np.load('x.npy', allow_pickle=True)"),
    (unsafe_calls, 'weights_only', 'data/tokens.py', "import torch\ntorch.load('x')"),
    (unsafe_calls, 'weights_only', 'data/tokens.py', "import torch\ntorch.load('x', weights_only=False)"),
    (unsafe_calls, 'weights_only', 'data/tokens.py', "import torch as t\nt.load('x')"),
    (unsafe_calls, 'weights_only', 'data/tokens.py', "from torch import load as read\nread('x')"),
    (unsafe_calls, 'weights_only', 'data/tokens.py', 'import torch\nread = torch.load'),
    (unsafe_calls, 'prints', 'data/tokens.py', "def f():\n    print('x')"),
]


def plant(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding='utf-8')
    return folder


HARMLESS = {
    '__init__.py': "from importlib import import_module\nlazy = import_module('musiclm_pytorch.cli')",
    'musiclm_pytorch.py': 'from musiclm_pytorch.cli import main',
    'version.py': "__version__ = '1'",
    'checks.py': 'import torch',
    'distributed/collectives.py': 'import torch',
    'data/audio.py': 'import soundfile',
    'data/__init__.py': 'from musiclm_pytorch.data.datasets import z',
    'data/datasets.py': 'def f():\n    from musiclm_pytorch.data import z\nfrom musiclm_pytorch.mulan.model import x',
    'mulan/__init__.py': 'from .model import y',
    'mulan/layers.py': 'if TYPE_CHECKING:\n    from musiclm_pytorch.mulan.model import y\nimport torch',
    'audiolm/convert.py': 'import audiolm_pytorch, torchaudio',
    'distributed/launch.py': 'import cloudpickle\nfrom musiclm_pytorch.trainer import loop\nfrom . import collectives',
    'trainer/loop.py': "import torch\ntorch.load('x', weights_only=True)\nnp.load('x', allow_pickle=False)",
    'cli.py': "print(torch.loads, loop.load, 'print')\nfrom musiclm_pytorch import checks",
}
HARMLESS_MODEL = {
    'mulan/model.py': """
        from ..checks import x
        from musiclm_pytorch.distributed.collectives import gather
        from musiclm_pytorch.mulan.layers import z
    """
}
CLOSING = {  # what closes the circle with the import planted in that file
    'mulan/model.py': {'mulan/layers.py': 'from musiclm_pytorch.mulan.model import y'},
    'mulan/loss.py': {'mulan/__init__.py': 'from .loss import y'},
}


def test_harmless_package_passes_every_rule(tmp_path):
    plant(tmp_path, HARMLESS | HARMLESS_MODEL)
    assert [found for rule in SOURCE_RULES for found in rule(tmp_path)] == []


@pytest.mark.parametrize(('rule', 'says', 'name', 'text'), PLANTED)
def test_rule_finds_the_planted_violation(tmp_path, rule, says, name, text):
    closing = CLOSING[name] if rule is import_cycles else {}
    found = list(rule(plant(tmp_path, HARMLESS | HARMLESS_MODEL | closing | {name: text})))
    assert len(found) == 1
    assert says in found[0]


def tracked_files() -> list[Path]:
    listing = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip('not a git checkout')
    return [ROOT / name for name in listing.stdout.split('\0') if name and (ROOT / name).is_file()]


def test_no_tracked_file_is_bound_to_a_machine():
    found, read = [], 0
    for path in tracked_files():
        try:
            text = path.read_text(encoding='utf-8')
        except UnicodeDecodeError:
            continue  # not text
        read += 1
        found += foreign_text(path.relative_to(ROOT).as_posix(), text)
    assert read > 10
    assert found == []


def test_text_bound_to_a_machine_is_found():
    parts = {'root': 'root', 'home': 'home', 'work': 'work'}
    parts |= {'pypi': '.'.join(('pypi', 'org')), 'PYTHONHOSTED': '.'.join(('PYTHONHOSTED', 'ORG'))}
    bound = ['cache = "/{root}/.cache"', 'fairseq @ file:///{home}/someone/fairseq', 'cd /{work}']
    for text in [*bound, '--index-url https://{pypi}/simple', 'see HTTPS://FILES.{PYTHONHOSTED}/x']:
        assert len(list(foreign_text('file', 'first line\n' + text.format(**parts)))) == 1, text
    for text in ('tree/root/leaf', '~/work/x', '../home', '/workspace', 'homework', './work/', '/roots'):
        assert list(foreign_text('file', text)) == [], text


# ---------------------------------------------------------------------------------------------------------------
# Metadata and installation


def declared() -> list[Requirement]:
    return [Requirement(text) for text in importlib.metadata.requires('musiclm-pytorch')]


def always_needed() -> list[Requirement]:
    return [need for need in declared() if need.marker is None or need.marker.evaluate({'extra': ''})]


def test_version_and_typing_marker():
    version = runpy.run_path(str(ROOT / PACKAGE / 'version.py'))['__version__']
    assert str(Version(version)) == version  # PEP 440, in its normal form
    assert importlib.metadata.version('musiclm-pytorch') == version
    assert (ROOT / PACKAGE / 'py.typed').is_file()


def test_requirements_name_what_is_imported_and_one_address():
    names = {need.name for need in always_needed()}
    assert names >= {
        *('accelerate', 'audiolm-pytorch', 'beartype', 'einops', 'ema-pytorch', 'lion-pytorch', 'safetensors'),
        *('soundfile', 'torch', 'torchaudio', 'torchvision', 'tqdm', 'vector-quantize-pytorch', 'x-clip'),
    }
    assert [need.name for need in declared() if need.url] == ['fairseq']


def test_installed_versions_fit_the_requirements():
    for need in always_needed():
        installed = importlib.metadata.version(need.name)
        assert need.specifier.contains(installed, prereleases=True), f'{need} but {installed} is installed'
    assert '+' in importlib.metadata.version('fairseq'), 'the genuine fairseq is installed, not the stand-in'


def test_no_torchaudio_is_taken_that_does_not_load_beside_torch():
    (torch,) = [need for need in always_needed() if need.name == 'torch']
    (torchaudio,) = [need for need in always_needed() if need.name == 'torchaudio']
    # those of CUDA 13.0
    beside = [it for it in ('2.10.0', '2.11.0', '2.12.0', '2.14.1', '2.15.0') if it in torch.specifier]
    assert beside == ['2.11.0', '2.12.0', '2.14.1']
    assert [it for it in ('2.10.0', '2.11.0', '2.11.1') if it in torchaudio.specifier] == ['2.11.0']


def test_all_is_the_union_of_the_extras():
    extras = importlib.metadata.metadata('musiclm-pytorch').get_all('Provides-Extra')
    of = {extra: set() for extra in extras}
    for need in declared():
        for extra in extras:
            if need.marker and need.marker.evaluate({'extra': extra}) and not need.marker.evaluate({'extra': ''}):
                of[extra].add(f'{need.name}{need.specifier}')
    assert {'test', 'all'} <= set(extras)
    assert of['test']
    assert of['all'] == set.union(*(needs for extra, needs in of.items() if extra != 'all'))


@pytest.mark.parametrize('python', ['3.10', '3.11', '3.12'])
def test_constraints_pin_each_requirement_once(python):
    lines = (ROOT / 'constraints.txt').read_text(encoding='utf-8').splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith('#')]
    where = default_environment() | {'python_version': python, 'python_full_version': f'{python}.1'}
    for need in declared():
        if need.url:
            continue
        fitting = [
            pin for pin in pins if pin.name == need.name and (pin.marker is None or pin.marker.evaluate(dict(where)))
        ]
        assert len(fitting) == 1, f'{need.name} has {len(fitting)} pins for {python}: run `make constraints`'
        (specifier,) = fitting[0].specifier
        assert specifier.operator == '=='
        assert need.specifier.contains(specifier.version), f'{need} is pinned to {specifier.version}'


HEAVY = {'audiolm_pytorch', 'transformers', 'x_clip', 'accelerate', 'sklearn', 'wandb'}
IMPORTS = """
import sys
import musiclm_pytorch
print(*{name.split('.')[0] for name in sys.modules})
import audiolm_pytorch, x_clip, torch, torchaudio, torchvision, soundfile, safetensors, tqdm, beartype
import einops, ema_pytorch, lion_pytorch, accelerate, vector_quantize_pytorch, fairseq
print(*{name.split('.')[0] for name in sys.modules})
"""


@pytest.mark.slow
def test_import_pulls_in_nothing_heavy_and_what_is_required_imports_together(tmp_path):
    done = subprocess.run([sys.executable, '-c', IMPORTS], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *_, last = (set(line.split()) for line in done.stdout.splitlines())
    assert PACKAGE in first
    assert not HEAVY & first
    assert {'audiolm_pytorch', 'transformers', 'x_clip', 'accelerate'} <= HEAVY & last


@pytest.mark.slow
def test_generation_pulls_in_nothing_heavy(tmp_path):
    code = "from musiclm_pytorch import MusicLM; MusicLM.from_pretrained('tiny')('a piano', seconds=0.2)"
    code += '; import sys; print(*sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert PACKAGE in loaded
    heavy = HEAVY | {'librosa', 'torchao', 'torchvision', 'scipy', 'numba', 'vector_quantize_pytorch', 'torch._dynamo'}
    assert not heavy & loaded


# ---------------------------------------------------------------------------------------------------------------
# The address of the stand-in


@pytest.fixture
def checkout(tmp_path):
    """What setup.py reads, copied where it can be changed and removed."""
    copy = tmp_path / 'checkout'
    shutil.copytree(
        ROOT / 'compat', copy / 'compat', ignore=shutil.ignore_patterns('build', '*.egg-info', '__pycache__')
    )
    for name in ['setup.py', 'README.md', f'{PACKAGE}/version.py']:
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


def stand_in(checkout: Path, cache: Path, monkeypatch) -> Path:
    """Where the metadata that setup.py in `checkout` makes looks for the stand-in."""
    given = {}
    monkeypatch.setenv('XDG_CACHE_HOME', str(cache))
    monkeypatch.setattr('setuptools.setup', lambda **keywords: given.update(keywords))
    runpy.run_path(str(checkout / 'setup.py'))
    (need,) = (need for need in map(Requirement, given['install_requires']) if need.url)
    assert need.name == 'fairseq'
    assert urlparse(need.url).scheme == 'file'
    return Path(url2pathname(urlparse(need.url).path))


def test_stand_in_outlives_the_checkout(checkout, tmp_path, monkeypatch):
    (checkout / 'compat/fairseq/build').mkdir()
    (checkout / 'compat/fairseq/build/left_over.py').touch()
    source = {
        path.relative_to(checkout / 'compat').as_posix(): path.read_bytes()
        for path in (checkout / 'compat/fairseq').rglob('*')
        if path.is_file() and 'build' not in path.parts
    }
    archive = stand_in(checkout, tmp_path / 'cache', monkeypatch)
    shutil.rmtree(checkout)
    assert archive.is_relative_to(tmp_path / 'cache')
    with zipfile.ZipFile(archive) as bundle:
        assert {name: bundle.read(name) for name in bundle.namelist()} == source
    assert 'fairseq/setup.py' in source


def test_stand_in_is_named_by_its_content(checkout, tmp_path, monkeypatch):
    first = stand_in(checkout, tmp_path / 'cache', monkeypatch)
    written = first.stat().st_mtime_ns
    assert stand_in(checkout, tmp_path / 'cache', monkeypatch) == first
    assert first.stat().st_mtime_ns == written
    (checkout / 'compat/fairseq/fairseq/__init__.py').write_text('changed = True\n')
    second = stand_in(checkout, tmp_path / 'cache', monkeypatch)
    assert second != first
    assert sorted(os.listdir(first.parent)) == sorted([first.name, second.name])  # nothing half-written stays


def test_stand_in_without_a_cache_folder_is_the_checkout(checkout, tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    assert stand_in(checkout, tmp_path / 'file', monkeypatch) == checkout / 'compat' / 'fairseq'
