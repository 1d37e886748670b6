"""Music that is heard while it is made: `GET /stream`, and other prompts for it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ConfigDict
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from musiclm_pytorch.audiolm.streaming import MusicStream
from musiclm_pytorch.inference.service.requests import (
    RETRY_AFTER,
    Body,
    ServiceError,
    check_texts,
    header_of,
    invalid,
    music_model,
    read_json,
    schema,
    stopping,
    validated,
)
from musiclm_pytorch.waves import pcm_bytes, wav_header

AHEAD = 4.0  # seconds that are made ahead of what can be heard by now

router = APIRouter()


class Stream(Body):
    """What to play, in the address; `seconds` ends it, by default it has no end. Numbers as MusicLM takes them, one for
    all stages."""

    model_config = ConfigDict(strict=False)

    prompt: str
    negative: str | None = None
    seconds: float | None = None
    seed: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    cond_scale: float | None = None
    negative_scale: float | None = None


class NextPrompt(Body):
    """prompt: what a stream goes on with."""

    prompt: str


def query_schema(kind: type[Body]) -> list[dict[str, Any]]:
    told = kind.model_json_schema()
    return [
        {'name': name, 'in': 'query', 'required': name in told['required'], 'schema': it}
        for name, it in told['properties'].items()
    ]


@router.get('/stream', openapi_extra={'parameters': query_schema(Stream)})
async def stream(request: Request) -> StreamingResponse:
    """Music without end, or `seconds` of it, as a WAV that grows while it is made, a few seconds ahead of its hearers.
    The header X-Stream tells its name."""
    musiclm, config = music_model(request), request.app.state.config
    query = validated(Stream, dict(request.query_params)).model_dump(exclude_none=True)
    for name in ('prompt', 'negative'):
        check_texts([query[name]] if name in query else [], config, name)
    worker = request.app.state.worker
    streams = worker.streams
    if worker.is_stopping:
        raise stopping()
    if len(streams) >= config.max_streams:
        message = f'{len(streams)} streams are playing already; try again in a while'
        raise ServiceError(503, 'overloaded', message, {'Retry-After': str(RETRY_AFTER)})
    name, prompt = secrets.token_urlsafe(8), query.pop('prompt')
    streams[name] = None  # its place, until it is there
    try:
        streams[name] = made = await run_in_threadpool(musiclm.stream, prompt, **query)
        if worker.is_stopping:
            made.close()
            streams[name] = None
            raise stopping()
    except (ValueError, OverflowError) as error:
        raise invalid(str(error)) from error
    finally:
        if streams[name] is None:
            del streams[name]
    headers = {'X-Stream': name, 'X-Seed': str(made.seed)}
    if warning := musiclm.prompt_warnings([prompt])[0]:
        headers['X-Warning'] = header_of(warning)
    return Playing(made, query.get('seconds'), headers, ended=partial(streams.pop, name))


@router.post('/stream/{name}', openapi_extra={'requestBody': {'content': schema(NextPrompt)}})
async def change(request: Request, name: str) -> JSONResponse:
    """Another prompt for a stream that plays."""
    state = request.app.state
    prompt = (await read_json(request, NextPrompt)).prompt
    check_texts([prompt], state.config, 'prompt')
    playing = state.worker.streams.get(name)
    if playing is None:
        raise ServiceError(404, 'not_found', f'no stream {name:.80} is playing; its header X-Stream tells its name')
    try:
        await run_in_threadpool(playing.set_prompt, prompt)
    except ValueError as error:
        raise invalid(str(error)) from error
    warning = state.worker.musiclm.prompt_warnings([prompt])[0]
    return JSONResponse({'stream': name, 'warnings': {prompt: warning} if warning else {}})


class Playing(StreamingResponse):
    """The WAV of a stream, made in a thread of its own, which ends when this does, however that is."""

    def __init__(self, stream: MusicStream, seconds: float | None, headers: dict[str, str], ended: Callable[[], Any]):
        super().__init__(self._played(), media_type='audio/wav', headers=headers)
        self.stream, self.ended = stream, ended
        self.samples = None if seconds is None else round(seconds * stream.sample_rate)
        self.pool = ThreadPoolExecutor(1, thread_name_prefix='stream')

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ended()
            self.stream.close()
            self.pool.shutdown(wait=False)

    async def _played(self) -> AsyncIterator[bytes]:
        loop, rate = asyncio.get_running_loop(), self.stream.sample_rate
        yield wav_header(rate, self.samples)
        start, seconds = loop.time(), 0.0
        while (wave := await loop.run_in_executor(self.pool, next, self.stream, None)) is not None:
            yield pcm_bytes(wave)
            seconds += len(wave) / rate
            await asyncio.sleep(start + seconds - AHEAD - loop.time())
