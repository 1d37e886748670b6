"""The Dockerfile, as far as it can be checked without Docker: what it copies is enough, and what it runs exists."""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.files import tracked_files
from helpers.models import tiny_mulan
from helpers.serving import served

from musiclm_pytorch.cli import main

ROOT = Path(__file__).resolve().parents[1]


def instructions(stage=None):
    """Name and rest of each instruction, lines joined; of all stages or of one."""
    text = re.sub(r'\\\n\s*', ' ', (ROOT / 'Dockerfile').read_text(encoding='utf-8'))
    found, number = [], -1
    for line in text.splitlines():
        if line and not line.startswith('#'):
            name, _, rest = line.partition(' ')
            number += name == 'FROM'
            if stage in (None, number):
                found.append((name, rest))
    return found


def copied():
    """The paths that the first stage takes from the checkout."""
    return [path for name, rest in instructions(0) if name == 'COPY' for path in rest.split()[:-1]]


def is_ignored(path):
    """Whether .dockerignore leaves a path out: the last line that fits decides."""
    ignored = False
    for line in (ROOT / '.dockerignore').read_text(encoding='utf-8').splitlines():
        pattern = line.removeprefix('!').removeprefix('**/')
        if not pattern or line.startswith('#'):
            continue
        parts = path.split('/')
        if '**/' in line:
            fits = any(fnmatch.fnmatch(part, pattern) for part in parts)
        else:  # a folder stands for all in it
            fits = any(fnmatch.fnmatch('/'.join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
        if fits:
            ignored = not line.startswith('!')
    return ignored


def test_what_is_copied_is_there_and_sent():
    assert 'setup.py' in copied()
    for path in copied():
        assert (ROOT / path).exists(), path
        assert not is_ignored(path)
    tops = set(copied())
    sent = [path for file in tracked_files() if not is_ignored(path := file.relative_to(ROOT).as_posix())]
    assert sent
    assert all(path.split('/')[0] in tops for path in sent)  # and nothing else
    for path in ('.git', 'tests/conftest.py', 'compat/fairseq/build/a.py', 'musiclm_pytorch/__pycache__/a.pyc'):
        assert is_ignored(path)


@pytest.mark.slow
def test_what_is_copied_is_enough_for_the_wheel(tmp_path):
    source = tmp_path / 'source'
    names = [file.relative_to(ROOT).as_posix() for file in tracked_files()]
    names = [name for name in names if not is_ignored(name)]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path, source]
    cache = os.environ | {'XDG_CACHE_HOME': str(tmp_path / 'cache')}
    done = subprocess.run(command, capture_output=True, text=True, env=cache)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob('*.whl')
    with zipfile.ZipFile(wheel) as file:
        packed = set(file.namelist())
        (metadata,) = (name for name in packed if name.endswith('/METADATA'))
        told = file.read(metadata).decode()
    assert {name for name in names if name.startswith('musiclm_pytorch/')} <= packed
    assert 'Provides-Extra: serve' in told
    assert 'fairseq @ file://' in told


def test_the_service_is_installed_pinned_and_run_by_no_root(capsys):
    (install,) = (rest for name, rest in instructions() if name == 'RUN' and 'pip install' in rest)
    words = shlex.split(install)
    assert words[-1] == '.[serve]'
    assert words[words.index('-c') + 1] in copied()
    last = dict(instructions(1))
    assert last['USER'] not in ('root', '0')
    start = json.loads(last['ENTRYPOINT'])
    assert start[0] == 'musiclm'
    with pytest.raises(SystemExit) as stopped:  # the options exist
        main([*start[1:], '--help'])
    assert stopped.value.code == 0
    port = start[start.index('--port') + 1]
    assert last['EXPOSE'] == port
    assert f'127.0.0.1:{port}/health' in last['HEALTHCHECK']
    assert '--host' in start


def test_the_health_check_tells_sick_from_well():
    command = json.loads(dict(instructions(1))['HEALTHCHECK'].partition('CMD ')[2])
    assert command[0] == 'python'

    def check(port):
        words = [word.replace(':8000/', f':{port}/') for word in command[1:]]
        return subprocess.run([sys.executable, *words], capture_output=True).returncode

    with served(tiny_mulan(dict(audio_sample_rate=8000), dict(num_tokens=49408))) as service:
        port = service.address[1]
        assert check(port) == 0
    assert check(port) == 1
