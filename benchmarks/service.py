"""Requests a second that `musiclm serve` answers on the loopback, with one client and with fifty.

    python benchmarks/service.py

A server in a process of its own, with the model that ships, and the clients in this one, which share the cores. Each
client sends the next request when the last one is answered, over a connection that it keeps. A request embeds one text
of a few words; all are different. The latents are checked against the model's own first. Beside it stands the same
model without a service, in this process: one text after another, and all in one call. The median of the rounds counts.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import statistics
import subprocess
import sys
import time

import httpx
import torch
from results import add_out, write_results  # beside this file

from musiclm_pytorch.evaluation.evaluator import load_mulan
from musiclm_pytorch.inference import BatchInferenceEngine

WORDS = ['slow', 'fast', 'low', 'high', 'calm', 'dark', 'happy', 'organ', 'flute', 'piano', 'drums', 'and', 'minor']


async def ask(address: str, texts: list[str], clients: int) -> tuple[float, list[list[float]], list[float]]:
    """Seconds for all, the latents, and the seconds of each request."""
    latents: list = [None] * len(texts)
    took = [0.0] * len(texts)
    waiting = iter(range(len(texts)))

    async def client() -> None:
        async with httpx.AsyncClient(base_url=address, timeout=60) as http:
            await http.get('/health')  # connects
            ready.release()
            await begin.wait()
            for index in waiting:
                start = time.perf_counter()
                answer = await http.post('/embed', json={'texts': [texts[index]]})
                took[index] = time.perf_counter() - start
                answer.raise_for_status()
                latents[index] = answer.json()['text_latents'][0]

    ready, begin = asyncio.Semaphore(0), asyncio.Event()
    tasks = [asyncio.ensure_future(client()) for _ in range(clients)]
    for _ in tasks:
        await ready.acquire()
    start = time.perf_counter()
    begin.set()
    await asyncio.gather(*tasks)
    return time.perf_counter() - start, latents, took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--requests', type=int, default=1000, help='a round (default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=5, help='default: %(default)s')
    parser.add_argument('--clients', type=int, nargs='+', default=[1, 50], help='default: 1 50')
    add_out(parser, 'service')
    options = parser.parse_args()

    random.seed(0)
    texts = [' '.join(random.choices(WORDS, k=random.randint(3, 10))) + f' {i}' for i in range(options.requests)]
    engine = BatchInferenceEngine(load_mulan('tiny'))
    wanted = engine.embed_texts(texts)

    command = [sys.executable, '-m', 'musiclm_pytorch.cli', 'serve', '--port', '0', '--max-requests', '1000']
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as server:
        try:
            address = None
            for line in server.stderr:
                if found := re.search(r'running on (http://\S+)', line):
                    address = found[1]
                    break
            if address is None:
                raise SystemExit('the server did not start')
            rounds: dict[str, list[float]] = {}
            delays: dict[str, list[float]] = {}
            for number in range(options.rounds + 1):
                for clients in options.clients:
                    seconds, latents, took = asyncio.run(ask(address, texts, clients))
                    error = (torch.tensor(latents) - wanted).abs().max().item()
                    if error > 1e-5:
                        raise SystemExit(f"the latents differ from the model's by up to {error:.1e}")
                    if number:  # the first warms up
                        rounds.setdefault(f'clients: {clients}', []).append(len(texts) / seconds)
                        delays.setdefault(f'clients: {clients}', []).extend(took)
                start = time.perf_counter()
                for text in texts:
                    engine.embed_texts([text])
                alone = len(texts) / (time.perf_counter() - start)
                start = time.perf_counter()
                engine.embed_texts(texts)
                together = len(texts) / (time.perf_counter() - start)
                if number:
                    rounds.setdefault('no service, one by one', []).append(alone)
                    rounds.setdefault('no service, one call', []).append(together)
        finally:
            server.terminate()
            server.stderr.read()

    found = {}
    for name, rates in rounds.items():
        found[name] = it = dict(per_second=statistics.median(rates), lowest=min(rates), highest=max(rates))
        line = f'{name}: {it["per_second"]:.0f} a second ({it["lowest"]:.0f} to {it["highest"]:.0f})'
        if name in delays:
            cuts = statistics.quantiles(delays[name], n=20)
            it |= dict(median_ms=1e3 * cuts[9], p95_ms=1e3 * cuts[18])
            line += f'; an answer takes {it["median_ms"]:.1f} ms, 95 % at most {it["p95_ms"]:.1f} ms'
        print(line)
    write_results(options.out, found)


if __name__ == '__main__':
    main()
