"""`musiclm serve --workers`: several processes at one port, of which one may die, and which end together."""

import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest
from helpers.serving import WAITS

from musiclm_pytorch.cli.serve import load_model
from musiclm_pytorch.inference import ServiceConfig
from musiclm_pytorch.inference.service.workers import serve_together

COMMAND = [sys.executable, '-m', 'musiclm_pytorch.cli', 'serve', '--port', '0', '--workers', '2', '--max-texts', '2']


@contextmanager
def serving(log):
    with log.open('w') as file, subprocess.Popen(COMMAND, stderr=file) as process:
        try:
            while not (found := re.search(r'2 workers running on (http://127\.0\.0\.1:\d+)', log.read_text())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            yield process, found[1]
        finally:
            process.terminate()


def post(address, path, **body):
    return httpx.post(address + path, json=body, timeout=WAITS)


def workers_at(address):
    """Those that answer; each connection is another one's chance."""
    told = [httpx.get(f'{address}/health', timeout=WAITS).json() for _ in range(24)]
    assert {it['workers'] for it in told} == {2}
    return {it['worker'] for it in told}


def children_of(process):
    found = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    return [pid for pid in found if 'spawn_main' in Path(f'/proc/{pid}/cmdline').read_text()]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='needs the connections of Linux, and /proc')
def test_two_workers_share_a_port_and_one_is_started_again(tmp_path):
    log = tmp_path / 'log'
    with serving(log) as (process, address), ThreadPoolExecutor() as pool:
        assert workers_at(address) == {0, 1}
        assert post(address, '/embed', texts=['a'] * 3).status_code == 422
        # the one that plays a stream is found, whichever is asked
        query = dict(prompt='a flute', seconds=600)
        with httpx.stream('GET', f'{address}/stream', params=query, timeout=WAITS) as playing:
            name = playing.headers['X-Stream']
            answers = {post(address, f'/stream/{name}', prompt=f'drums {number}').status_code for number in range(8)}
            assert answers == {200}
        assert post(address, '/stream/9.none', prompt='drums').status_code == 404

        killed, other = children_of(process)
        subprocess.run(['kill', '-9', killed], check=True)
        while f'worker [{killed}] died (-9)' not in log.read_text():
            assert process.poll() is None
        while (found := workers_at(address)) != {0, 1}:  # until it is there again, the other one answers
            assert len(found) == 1
        assert other in children_of(process)
        assert killed not in children_of(process)

        music = [pool.submit(post, address, '/generate', prompt='a flute', seconds=2, seed=1) for _ in range(6)]
        while sum(httpx.get(f'{address}/health', timeout=WAITS).json()['requests'] > 0 for _ in range(8)) < 4:
            assert not all(it.done() for it in music)
        process.send_signal(signal.SIGTERM)
        answers = [it.result() for it in music]
        assert {it.status_code for it in answers} <= {200, 503}
        assert {it.content for it in answers if it.status_code == 200} == {
            next(it.content for it in answers if it.status_code == 200)
        }
        assert process.wait() == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f'{address}/health')
    assert 'Traceback' not in log.read_text()


@pytest.mark.slow
def test_what_keeps_workers_from_serving_is_told(tmp_path):
    """By the command in a line, as of one process."""
    (tmp_path / 'config.json').write_text('{"model": "MuLaN"')
    load = partial(load_model, str(tmp_path), dtype=None)
    with pytest.raises(ValueError, match=r'config\.json'):
        serve_together(load, ServiceConfig(), 1, host='127.0.0.1', port=0)
