"""Music that is heard while it is made: `GET /stream`, and other prompts for it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ConfigDict
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from musiclm_pytorch.audiolm.streaming import MusicStream
from musiclm_pytorch.checks import described
from musiclm_pytorch.inference.live import AHEAD
from musiclm_pytorch.inference.service.description import WRONG, schema, sounds
from musiclm_pytorch.inference.service.requests import (
    Body,
    OnePrompt,
    PromptReader,
    ServiceError,
    check_texts,
    header_of,
    invalid,
    music_model,
    read_json,
    stopping,
    unavailable,
    validated,
    wanted_type,
)
from musiclm_pytorch.waves import STREAMS, OpusStream, WavStream

router = APIRouter(responses=WRONG)
CONTENT = sounds(*(it.media_type for it in STREAMS.values()))
PLAYED = dict(response_class=StreamingResponse, responses={200: {'content': CONTENT}})


class Stream(Body):
    """What to play; `seconds` ends it, by default it has no end. Numbers as MusicLM takes them, one for all stages.

    format: 'wav', or 'opus' for Opus in Ogg; by default what the header Accept wants more, audio/wav or audio/ogg
    """

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
    format: Literal['wav', 'opus'] | None = None


class PrimedStream(Stream):
    """What to play, with sounds, each a file as base64.

    prime: with which it begins and from which it goes on; `seconds` count it
    melody: to follow from the beginning on, for models that follow melodies; it goes on without
    """

    prompt: OnePrompt
    negative: OnePrompt | None = None
    prime: str | None = None
    melody: str | None = None


class NextPrompt(Body):
    """prompt: what a stream goes on with."""

    prompt: OnePrompt


def query_schema(kind: type[Body]) -> list[dict[str, Any]]:
    told = kind.model_json_schema()
    return [
        {'name': name, 'in': 'query', 'required': name in told['required'], 'schema': it}
        for name, it in told['properties'].items()
    ]


@router.get('/stream', **PLAYED, openapi_extra={'parameters': query_schema(Stream)})
async def stream(request: Request) -> StreamingResponse:
    """Music without end, or `seconds` of it, as a WAV or Ogg that grows while it is made, a few seconds ahead of its
    hearers. The header X-Stream tells its name."""
    music_model(request)
    return await play(request, validated(Stream, dict(request.query_params)))


@router.post('/stream', **PLAYED, openapi_extra={'requestBody': {'content': schema(PrimedStream)}})
async def stream_on(request: Request) -> StreamingResponse:
    """The same, asked for by JSON, which has room for sounds: to be like, to go on from, and whose melody to follow."""
    music_model(request)
    return await play(request, await read_json(request, PrimedStream))


async def play(request: Request, wanted: Stream) -> StreamingResponse:
    musiclm, config = music_model(request), request.app.state.config
    query = wanted.model_dump(exclude_none=True)
    for name in ('prompt', 'negative'):
        check_texts([query[name]] if isinstance(query.get(name), str) else [], config, name)
    kinds = {it.media_type: kind for kind, it in STREAMS.items()}
    kind = query.pop('format', None) or kinds[wanted_type(request.headers.get('accept', ''), list(kinds))]
    worker = request.app.state.worker
    streams = worker.streams
    if worker.is_stopping:
        raise stopping()
    if len(streams) >= config.max_streams:
        raise unavailable('overloaded', f'{len(streams)} streams are playing already; try again in a while')
    name, read = secrets.token_urlsafe(8), reader(request)
    if (siblings := request.app.state.siblings) is not None:
        name = f'{siblings.number}.{name}'
    streams[name] = None  # its place, until it is there
    try:
        prompt = await run_in_threadpool(read, wanted.prompt)
        query.pop('prompt')
        if wanted.negative is not None:
            query['negative'] = await run_in_threadpool(read, wanted.negative)
        query |= await run_in_threadpool(read.sounds_of, wanted)
        streams[name] = made = await run_in_threadpool(musiclm.stream, prompt, **query)
        if worker.is_stopping:
            raise stopping()
        headers = {'X-Stream': name, 'X-Seed': str(made.seed), 'Vary': 'Accept'}
        if warning := musiclm.prompt_warnings([prompt])[0]:
            headers['X-Warning'] = header_of(warning)
        seconds = query.get('seconds')
        encoder = STREAMS[kind](made.sample_rate, None if seconds is None else round(seconds * made.sample_rate))
        return Playing(made, encoder, headers, ended=partial(streams.pop, name))
    except BaseException as error:
        if (made := streams.pop(name, None)) is not None:
            made.close()
        if isinstance(error, (ValueError, OverflowError)):
            raise invalid(str(error)) from error
        raise


@router.post('/stream/{name}', openapi_extra={'requestBody': {'content': schema(NextPrompt)}})
async def change(request: Request, name: str) -> Response:
    """Another prompt for a stream that plays."""
    state = request.app.state
    body = await read_json(request, NextPrompt)
    siblings, wanted = state.siblings, body.prompt
    if siblings is not None and (port := siblings.port_of(name)) is not None:
        asked = body.model_dump_json().encode()
        with contextlib.suppress(ConnectionError):  # died, and the stream with it
            status, content = await run_in_threadpool(siblings.ask, port, request.url.path, asked, state.config.timeout)
            return Response(content, status_code=status, media_type='application/json')
    playing = state.worker.streams.get(name)
    if playing is None:
        raise ServiceError(404, 'not_found', f'no stream {name:.80} is playing; its header X-Stream tells its name')
    try:
        prompt = await run_in_threadpool(reader(request), wanted)
        await run_in_threadpool(playing.set_prompt, prompt)
    except ValueError as error:
        raise invalid(str(error)) from error
    warning = state.worker.musiclm.prompt_warnings([prompt])[0]
    told = prompt if isinstance(prompt, str) else described(prompt)
    return JSONResponse({'stream': name, 'warnings': {told: warning} if warning else {}})


def reader(request: Request) -> PromptReader:
    worker = request.app.state.worker
    return PromptReader(request.app.state.config, shortest=worker.shortest, dim_latent=worker.mulan.dim_latent)


class Playing(StreamingResponse):
    """The sound of a stream, made in a thread of its own, which ends when this does, however that is."""

    def __init__(
        self, stream: MusicStream, encoder: WavStream | OpusStream, headers: dict[str, str], ended: Callable[[], Any]
    ):
        super().__init__(self._played(), media_type=encoder.media_type, headers=headers)
        self.stream, self.encoder, self.ended = stream, encoder, ended
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
        start, seconds = loop.time(), 0.0
        made = await loop.run_in_executor(self.pool, self._next)
        while made is not None:
            content, samples = made
            yield content
            seconds += samples / rate
            # what follows a long prime takes a while, and is made while that is heard
            following = loop.run_in_executor(self.pool, self._next) if samples > AHEAD * rate else None
            await asyncio.sleep(start + seconds - AHEAD - loop.time())
            made = await (following or loop.run_in_executor(self.pool, self._next))
        yield self.encoder.close()

    def _next(self) -> tuple[bytes, int] | None:
        wave = next(self.stream, None)
        return None if wave is None else (self.encoder.push(wave), len(wave))
