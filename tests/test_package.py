"""The package as a whole: its metadata, what its files may import, and what none of its files may hold.

Which room may import from which, and that the package does not print, is in pyproject.toml, for import-linter and ruff.
Each rule runs on the package, where it must find nothing, and on planted violations, which it must find: a rule that no
longer sees anything would pass for ever.
"""

import ast
import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest
from helpers.files import ROOT, tracked_files
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.version import Version

PACKAGE = 'musiclm_pytorch'


# ---------------------------------------------------------------------------------------------------------------
# Rules on source files


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    """What import-linter says of the package in `folder`, by its contracts in pyproject.toml."""
    code = 'from importlinter.cli import lint_imports; exit(lint_imports(no_cache=True))'
    environment = os.environ | {'COLUMNS': '300', 'PYTHONPATH': str(folder)}
    return subprocess.run([sys.executable, '-c', code], cwd=folder, env=environment, capture_output=True, text=True)


def test_imports_keep_every_contract():
    linted = lint_imports(ROOT)
    assert linted.returncode == 0, linted.stdout + linted.stderr
    assert '5 kept, 0 broken' in linted.stdout


PLANTED = {
    # the file: its import, and how it is called
    'kernels/processor.py': (
        'from musiclm_pytorch.mulan.model import x',
        'kernels.processor -> musiclm_pytorch.mulan.model',
    ),
    'mulan/lora.py': ('def f():\n    import musiclm_pytorch.trainer', 'mulan.lora -> musiclm_pytorch.trainer'),
    'data/cells.py': (
        'if TYPE_CHECKING:\n    from ..musiclm import MusicLM',
        'data.cells -> musiclm_pytorch.musiclm',
    ),
    'checks.py': ('from .version import __version__', 'checks -> musiclm_pytorch.version'),
    'helpers.py': ('', 'not listed as layers:\n\n- musiclm_pytorch.helpers'),
    'mulan/layers.py': ('def f():\n    from musiclm_pytorch.mulan.model import y', '.layers -> .model (1 import)'),
    'gallery.py': ('from musiclm_pytorch import MuLaN', 'gallery -> musiclm_pytorch (l.'),
    'waves.py': ('def f():\n    import audiolm_pytorch.t5', 'waves -> audiolm_pytorch'),
    'data/collate.py': ('from torchaudio.functional import resample', 'data.collate -> torchaudio'),
    'data/rates.py': ('def f():\n    import pickle', 'data.rates -> pickle'),
    'distributed/launch.py': ('from joblib import load', 'distributed.launch -> joblib'),
}


def test_contracts_find_planted_imports(tmp_path):
    ignored = shutil.ignore_patterns('__pycache__', '*.safetensors')
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=ignored)
    shutil.copy(ROOT / 'pyproject.toml', tmp_path)
    for name, (text, _) in PLANTED.items():
        with open(tmp_path / PACKAGE / name, 'a') as file:
            file.write(f'\n{text}\n')
    said = lint_imports(tmp_path).stdout
    assert '0 kept, 5 broken' in said
    assert [named for _, named in PLANTED.values() if named not in said] == []


def test_only_convert_loads_audiolm_pytorch_by_name():
    """Modules loaded by import_module are no imports to import-linter."""
    named = re.compile(r"""import_module\(['"]|['"](?:audiolm_pytorch|torchaudio|torchvision)\b""")
    files = [it for it in (ROOT / PACKAGE).rglob('*.py') if named.search(it.read_text(encoding='utf-8'))]
    assert files == [ROOT / PACKAGE / 'audiolm' / 'convert.py']


def unsafe_loads(text: str) -> list[str]:
    """Uses of `torch.load` but for calls with weights_only=True, and of pickle in numpy's files."""
    code = re.sub(r'`[^`\n]*`|(?m:^ *#.*)', '', text)
    uses = re.findall(r'torch\.(?:serialization\.)?load\b(?!\([^\n]*weights_only=True\)).*', code)
    uses += re.findall(r'from torch(?:\.serialization)? import .*\bload\b.*|import torch as .*', code)
    return uses + re.findall(r'allow_pickle(?!=False).*', code)


def test_loading_never_runs_code_from_a_file():
    texts = {path: path.read_text(encoding='utf-8') for path in (ROOT / PACKAGE).rglob('*.py')}
    safe = {path.relative_to(ROOT / PACKAGE).as_posix() for path, text in texts.items() if 'weights_only=True' in text}
    assert safe == {'distributed/launch.py', 'mulan/checkpoint.py'}
    assert {path: found for path, text in texts.items() if (found := unsafe_loads(text))} == {}


@pytest.mark.parametrize(
    'text',
    [
        "torch.load('x')",
        "torch.load('x', weights_only=False)",
        'read = torch.load',
        "torch.serialization.load('x')",
        'from torch import nn, load as read',
        "import torch as t\nt.load('x')",
        "np.load('x', allow_pickle=True)",
    ],
)
def test_loading_that_runs_code_is_found(text):
    assert len(unsafe_loads(text)) == 1


def test_library_code_that_prints_is_found():
    def linted(name: str) -> str:
        command = [sys.executable, '-m', 'ruff', 'check', '--stdin-filename', f'{PACKAGE}/{name}', '-']
        return subprocess.run(command, cwd=ROOT, input="print('x')\n", capture_output=True, text=True).stdout

    assert 'T201' in linted('data/tokens.py')
    assert 'T201' not in linted('cli/generate.py')


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


def test_no_test_file_imports_another():
    files = [*Path(__file__).parent.glob('*.py')]
    found = [(it.name, *re.findall(r'^ *(?:from|import) (test_\w+|conftest)', it.read_text(), re.M)) for it in files]
    # which their own worker processes may do
    assert [it for it in found if {*it[1:]} - {it[0].removesuffix('.py')}] == []


def taken_names(tree: ast.AST) -> Iterator[str]:
    """The lines by which a script takes names from this package, but where it asks first which version it meets."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == PACKAGE:
            yield ast.unparse(node)
        elif not isinstance(node, ast.If):
            yield from taken_names(node)


def test_scripts_import_what_there_is():
    scripts = [it for folder in ('benchmarks', 'examples', 'docs') for it in sorted((ROOT / folder).glob('*.py'))]
    lines = {line for path in scripts for line in taken_names(ast.parse(path.read_text()))}
    assert len(lines) > 100
    for line in sorted(lines):
        exec(line, {})  # an ImportError tells which


def test_taken_names_are_found():
    found = taken_names(
        ast.parse('def f():\n  from musiclm_pytorch.x import y\nif old:\n  from musiclm_pytorch import z')
    )
    assert list(found) == ['from musiclm_pytorch.x import y']


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
print(*sys.modules)
for name in ('tiny', 'small'):
    musiclm_pytorch.MusicLM.from_pretrained(name)('a piano', seconds=0.2)
print(*sys.modules)
import audiolm_pytorch, x_clip, torch, torchaudio, torchvision, soundfile, safetensors, tqdm, beartype
import einops, ema_pytorch, lion_pytorch, accelerate, vector_quantize_pytorch, fairseq
print(*sys.modules)
"""


@pytest.mark.slow
def test_import_and_generation_pull_in_nothing_heavy_and_what_is_required_imports_together(tmp_path):
    done = subprocess.run([sys.executable, '-c', IMPORTS], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported, generated, *_, last = (set(line.split()) for line in done.stdout.splitlines())
    assert PACKAGE in imported
    assert not HEAVY & imported
    heavy = HEAVY | {'librosa', 'torchao', 'torchvision', 'scipy', 'numba', 'vector_quantize_pytorch', 'torch._dynamo'}
    assert not heavy & generated
    assert {'audiolm_pytorch', 'transformers', 'x_clip', 'accelerate'} <= HEAVY & last


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
