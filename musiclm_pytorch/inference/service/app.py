"""The application: what is asked for where, and what is answered."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from musiclm_pytorch.audiolm.generation_args import NoDirectionError, Prompt
from musiclm_pytorch.checks import described, typechecked
from musiclm_pytorch.inference.optimize import OptimizedMuLaN
from musiclm_pytorch.inference.service.config import ServiceConfig
from musiclm_pytorch.inference.service.description import WRONG, form_schema, openapi, schema, sounds
from musiclm_pytorch.inference.service.requests import (
    FORM,
    JSON,
    Prompts,
    ServiceError,
    StoryPrompt,
    Texts,
    asked_music,
    check_texts,
    code_of,
    content_type,
    error_response,
    header_of,
    invalid,
    music_model,
    open_audio,
    read_form,
    read_json,
    stopping,
    unavailable,
    unreadable,
)
from musiclm_pytorch.inference.service.streams import router as streams
from musiclm_pytorch.inference.service.worker import Abandoned, Job, ModelWorker, Unreadable
from musiclm_pytorch.mulan.model import JointEmbedding
from musiclm_pytorch.musiclm import MusicLM
from musiclm_pytorch.version import __version__
from musiclm_pytorch.waves import sound_bytes

MEDIA_TYPES = {'wav': 'audio/wav', 'flac': 'audio/flac', 'ogg': 'audio/ogg', 'mp3': 'audio/mpeg'}

router = APIRouter(responses=WRONG)

CALLS = {
    'GET /': 'what the service is',
    'GET /health': 'what is served, how busy the service is, and its limits',
    'GET /openapi.json': 'what the calls take and give',
    'POST /embed': 'latents of texts, as JSON, or of texts and sound files, as a form',
    'POST /rank': 'how well sound files fit texts, as a form',
    'POST /generate': 'music for a prompt, as JSON; also from a sound on, or to its melody',
    'GET /stream': 'music without end for a prompt, while it is made; POST /stream/NAME changes its prompt',
    'POST /stream': 'the same, as JSON, also like a sound, from one on, or to its melody',
}


@typechecked
def build(model: JointEmbedding | OptimizedMuLaN | MusicLM, config: ServiceConfig) -> FastAPI:
    """The application of `create_service`."""
    worker = ModelWorker(model)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # the first text loads the tokenizer, so that no request waits for that
        await asyncio.wrap_future(worker.embed_texts(['music']).future)
        yield
        worker.close()

    # no page of documentation: it would be loaded from elsewhere
    app = FastAPI(title='musiclm-pytorch', version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.worker, app.state.config, app.state.load = worker, config, Load()
    app.state.siblings = None  # where several processes serve, `Siblings`
    app.add_middleware(Limits, config=config, load=app.state.load)
    app.add_exception_handler(HTTPException, answer_with_error)
    app.add_exception_handler(ClientDisconnect, answer_no_one)
    app.add_exception_handler(Exception, answer_with_fault)
    app.include_router(router)
    app.include_router(streams)
    app.openapi = partial(openapi, app)
    return app


async def answer_with_error(request: Request, error: HTTPException) -> JSONResponse:
    if isinstance(error, ServiceError):
        return error_response(error)
    message = str(error.detail)
    if error.status_code in (404, 405):
        # the service's own paths, and how they are called
        path = request.url.path.rstrip('/') or '/'
        wanted = [call for call in CALLS if call.split()[1] == path]
        message = f'there is no {request.method} {request.url.path:.80}; call {" or ".join(wanted or CALLS)}'
    return error_response(ServiceError(error.status_code, code_of(error.status_code), message, error.headers))


async def answer_no_one(_: Request, error: ClientDisconnect) -> JSONResponse:
    return error_response(ServiceError(400, 'incomplete_body', 'the client went before its body was there'))


async def answer_with_fault(_: Request, error: Exception) -> JSONResponse:
    """What was not foreseen. Starlette raises it again after the answer, so uvicorn logs it and closes the connection,
    which the client has to know."""
    told = 'the service failed; its log tells why'
    return error_response(ServiceError(500, 'internal_error', told, {'Connection': 'close'}))


async def finished(job: Job, request: Request) -> Any:
    """The result of a job, which is abandoned when time is up or the client has gone."""
    config = request.app.state.config
    result = asyncio.wrap_future(job.future)
    gone = asyncio.ensure_future(disconnection(request))
    try:
        await asyncio.wait({result, gone}, timeout=config.timeout, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            told = 'the client has gone' if gone.done() else f'no answer within {config.timeout:g} s'
            raise ServiceError(504, 'timeout', f'{told}; ask for less, or again later')
        if result.cancelled():
            raise Abandoned
        return result.result()
    except Abandoned:  # not by this request, which still waits
        raise stopping() from None
    except NoDirectionError as error:
        raise invalid(str(error)) from error
    except Unreadable as error:
        raise unreadable(str(error)) from error
    finally:
        gone.cancel()
        if not result.done():
            result.cancel()
            job.abandon()


async def disconnection(request: Request) -> None:
    while (await request.receive())['type'] != 'http.disconnect':
        pass


@router.get('/')
async def about(request: Request) -> dict[str, Any]:
    """What the service is."""
    worker = request.app.state.worker
    name = 'MuLaN' if worker.musiclm is None else 'MusicLM'
    return {'service': f'musiclm-pytorch {__version__}, which serves a {name}', 'calls': CALLS}


@router.get('/health')
async def health(request: Request) -> dict[str, Any]:
    """What is served, and how busy the service is."""
    worker, state = request.app.state.worker, request.app.state
    several = {} if state.siblings is None else {'worker': state.siblings.number, 'workers': len(state.siblings.ports)}
    return several | {
        'status': 'ok',
        'version': __version__,
        'model': 'MuLaN' if worker.musiclm is None else 'MusicLM',
        'sample_rate': worker.sample_rate if worker.musiclm is None else worker.musiclm.sample_rate,
        'dim_latent': worker.mulan.dim_latent,
        'generates': worker.musiclm is not None,
        'requests': state.load.requests,
        'limits': state.config.to_dict(),
    }


@router.post('/embed', openapi_extra={'requestBody': {'content': schema(Texts) | form_schema([])}})
async def embed(request: Request) -> JSONResponse:
    """Latents of texts, given as JSON, or of texts and sound files, given as a form. They have length 1."""
    state = request.app.state
    if content_type(request, JSON, FORM) == JSON:
        texts = (await read_json(request, Texts)).texts
        if not texts:
            raise invalid('texts is empty; pass at least one text')
        check_texts(texts, state.config)
        latents = await finished(state.worker.embed_texts(texts), request)
        return JSONResponse({'text_latents': latents.tolist()})
    audio, text, _ = await embed_form(request)
    if len(audio) + len(text) == 0:
        raise invalid("the form holds neither files 'audio' nor 'texts'")
    return JSONResponse({'audio_latents': audio.tolist(), 'text_latents': text.tolist()})


@router.post('/rank', openapi_extra={'requestBody': {'content': form_schema(['texts', 'audio'])}})
async def rank(request: Request) -> JSONResponse:
    """How well each sound file fits each text, as cosines, and both ways the places from the best on."""
    audio, text, names = await embed_form(request, needs_both=True)
    similarities = audio @ text.T
    return JSONResponse(
        {
            'files': names,
            'similarities': similarities.tolist(),  # a row a file, a column a text
            'texts_by_file': best_first(similarities),
            'files_by_text': best_first(similarities.T),
        }
    )


@router.post(
    '/generate',
    response_class=Response,
    responses={200: {'content': sounds(*MEDIA_TYPES.values()) | {JSON: {}}}},
    openapi_extra={'requestBody': {'content': schema(Prompts)}},
)
async def generate(request: Request) -> Response:
    """Music: a sound file, or JSON with all pieces in base64 and their scores, each prompt's best first."""
    worker, config = request.app.state.worker, request.app.state.config
    musiclm = music_model(request)
    body = await read_json(request, Prompts)
    limits = dict(shortest=worker.shortest, dim_latent=worker.mulan.dim_latent)
    prompts, given = await run_in_threadpool(asked_music, body, config, musiclm, **limits)
    seed = secrets.randbelow(2**31) if body.seed is None else body.seed
    how = dict(num_samples=body.num_samples, seed=seed, **body.sampling)
    job = worker.generate(prompts, **given, **how)
    music, rate = await finished(job, request), musiclm.sample_rate
    warnings = musiclm.prompt_warnings(prompts, music)
    names = list(map(name_of, prompts))
    if isinstance(body.prompt, StoryPrompt):
        names = [' – '.join(name_of(it) for _, it in prompts)]
    if body.format != 'json':
        best = music.scores[0].argmax()
        headers = {'X-Seed': str(seed), 'X-Score': f'{music.scores[0, best]:.6f}'}
        if warnings[0]:
            headers['X-Warning'] = header_of(warnings[0])
        sound = sound_bytes(music.waves[0, best], rate, body.format)
        return Response(sound, media_type=MEDIA_TYPES[body.format], headers=headers)
    pieces = [
        {
            'prompt': prompt,
            'score': scores[place].item(),
            'seed': seeds[place].item(),
            'wav': base64.b64encode(sound_bytes(waves[place], rate)).decode(),
        }
        for prompt, waves, scores, seeds in zip(names, music.waves, music.scores, music.seeds)
        for place in scores.argsort(descending=True).tolist()
    ]
    told = {prompt: line for prompt, line in zip(names, warnings) if line}
    return JSONResponse({'sample_rate': rate, 'seed': seed, 'pieces': pieces, 'warnings': told})


def name_of(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else described(prompt)


async def embed_form(request: Request, needs_both: bool = False) -> tuple[Tensor, Tensor, list[str]]:
    """Latents of the files and of the texts of a form, and the files' names."""
    state = request.app.state
    texts, uploads = await read_form(request, state.config)
    if needs_both and not (texts and uploads):
        raise invalid(f"the form must hold files 'audio' and 'texts', got {len(uploads)} and {len(texts)}")
    check_texts(texts, state.config)
    files = await run_in_threadpool(open_audio, uploads, state.config)
    audio, text = await finished(state.worker.embed(files, texts), request)
    return audio, text, [upload.filename for upload in uploads]


def best_first(rows: Tensor) -> list[list[int]]:
    return rows.argsort(dim=1, descending=True, stable=True).tolist()


# ---- how much may come in: requests at once, bytes of a body, and the time that it may take to arrive ----


@dataclass
class Load:
    """How many requests are in flight."""

    requests: int = 0


class Limits:
    """ASGI middleware. What only asks for the state of the service, by GET, is always let in."""

    def __init__(self, app: ASGIApp, config: ServiceConfig, load: Load):
        self.app, self.config, self.load = app, config, load

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope['type'] != 'http' or scope['method'] in ('GET', 'HEAD'):
            await self.app(scope, receive, send)
            return
        if self.load.requests >= self.config.max_requests:
            message = f'{self.load.requests} requests are being served already; try again in a while'
            await error_response(unavailable('overloaded', message))(scope, receive, send)
            return
        self.load.requests += 1
        try:
            # a length that is told is believed only where it is too much
            told = dict(scope['headers']).get(b'content-length', b'')
            if told.isdigit() and int(told) > self.config.max_body_bytes:
                await error_response(self._too_large())(scope, receive, send)
                return
            await self.app(scope, self._limited(receive), send)
        finally:
            self.load.requests -= 1

    def _limited(self, receive: Receive) -> Receive:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.config.timeout
        size, is_whole = 0, False

        async def limited() -> Message:
            nonlocal size, is_whole
            if is_whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - loop.time())
            except asyncio.TimeoutError:
                raise ServiceError(
                    408, 'request_timeout', f'the body did not arrive within {self.config.timeout:g} s'
                ) from None
            size += len(message.get('body', b''))
            if size > self.config.max_body_bytes:
                raise self._too_large()
            is_whole = not message.get('more_body', False)
            return message

        return limited

    def _too_large(self) -> ServiceError:
        return ServiceError(
            413, 'body_too_large', f'the body is larger than the {self.config.max_body_bytes} bytes that are allowed'
        )
