"""What comes in: bodies read and checked, and the one shape of errors."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated, Any, Literal, TypeVar, Union
from urllib.parse import quote

import torch
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Discriminator, Tag, ValidationError
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from torch import Tensor

from musiclm_pytorch.audiolm.generation_args import (
    Mix,
    Prompt,
    Story,
    check_shorter,
    read_prompt,
    read_prompts,
    read_sampling,
    read_seconds,
)
from musiclm_pytorch.audiolm.stages import STAGES
from musiclm_pytorch.data.audio import AudioFile
from musiclm_pytorch.inference.service.config import ServiceConfig
from musiclm_pytorch.inference.written import MOST_PARTS
from musiclm_pytorch.musiclm import SAMPLING, MusicLM
from musiclm_pytorch.trainer.config_schema import nearest

JSON, FORM = 'application/json', 'multipart/form-data'
RETRY_AFTER = 1  # seconds
MOST_CHANNELS = 8  # a small file may unpack to many
SHOWN = 3  # faults told at once


class ServiceError(HTTPException):
    """An answer that is an error: `code` for programs, `message` for people."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None):
        super().__init__(status, message, headers)
        self.code = code


def error_response(error: ServiceError) -> JSONResponse:
    return JSONResponse({'error': {'code': error.code, 'message': error.detail}}, error.status_code, error.headers)


def code_of(status: int) -> str:
    """The code of an error that is not the service's own, such as `not_found`."""
    return HTTPStatus(status).phrase.lower().replace(' ', '_')


def invalid(message: str) -> ServiceError:
    return ServiceError(422, 'invalid_request', message)


def unreadable(message: str) -> ServiceError:
    return ServiceError(400, 'unreadable_audio', message)


def unavailable(code: str, message: str) -> ServiceError:
    return ServiceError(503, code, message, {'Retry-After': str(RETRY_AFTER)})


def stopping() -> ServiceError:
    return unavailable('stopping', 'the service is ending; ask again when it is back')


def music_model(request: Request) -> MusicLM:
    """What makes the music. Raises ServiceError where a MuLaN alone is served."""
    musiclm = request.app.state.worker.musiclm
    if musiclm is None:
        raise ServiceError(501, 'not_available', 'a MuLaN alone makes no music; serve a MusicLM')
    return musiclm


# ---- bodies ----


def wanted_type(accept: str, offered: Sequence[str]) -> str:
    """Which of the media types a header Accept wants most; where it does not care, the first one."""
    shares: dict[str, float] = {}
    for part in accept.lower().split(','):
        kind, *parameters = (it.strip() for it in part.split(';'))
        share = next((it[2:] for it in parameters if it.startswith('q=')), '1')
        with contextlib.suppress(ValueError):
            shares[kind] = float(share)

    def share_of(kind: str) -> float:
        return next((shares[it] for it in (kind, f'{kind.split("/")[0]}/*', '*/*') if it in shares), 0.0)

    return max(offered, key=share_of)


class Body(BaseModel):
    model_config = ConfigDict(extra='forbid', strict=True, allow_inf_nan=False)


class Texts(Body):
    """texts: what to embed."""

    texts: list[str]


def kind_of(prompt: Any) -> str:
    """What a prompt in JSON is, which tells what is wrong with it; also of one that is read already."""
    if isinstance(prompt, BaseModel):
        prompt = prompt.__dict__
    if isinstance(prompt, dict):
        return next((name for name in ('sound', 'latent', 'mix', 'story') if name in prompt), 'none of these')
    return 'list' if isinstance(prompt, list) else 'text'


def any_of(**kinds: Any) -> Any:
    """One of these types, by its `kind_of`."""
    types = tuple(Annotated[it, Tag(name)] for name, it in kinds.items())
    wanted = 'a string, or an object with one of the keys sound, latent, mix and story, where those may stand'
    return Annotated[
        Union[types],  # noqa: UP007
        Discriminator(kind_of, custom_error_type='prompt', custom_error_message=f'Input should be {wanted}'),
    ]


class SoundPrompt(Body):
    """sound: a file as base64; the music is to be like it."""

    sound: str


class LatentPrompt(Body):
    """latent: of MuLaN, as `/embed` gives it."""

    latent: list[float]


class MixPrompt(Body):
    """mix: pairs of a weight and a prompt, which are one prompt together."""

    mix: list[tuple[float, any_of(text=str, sound=SoundPrompt, latent=LatentPrompt)]]


ONE = dict(text=str, sound=SoundPrompt, latent=LatentPrompt, mix=MixPrompt)
OnePrompt = any_of(**ONE)


class StoryPrompt(Body):
    """story: pairs of seconds and a prompt, the parts of one piece whose prompt changes on the way."""

    story: list[tuple[float, OnePrompt]]


class Prompts(Body):
    """What music to make; numbers as `musiclm_pytorch.MusicLM` takes them.

    prompt: what the music is like; several with format 'json'; or a story
    negative: what it is to keep away from, and `negative_scale` how much
    prime: a sound file as base64, which the music goes on from and begins with
    melody: another, whose melody it follows, for models that follow melodies
    seconds: length of a piece, the prime included; 10 by default, and for a story the sum of its parts
    num_samples: pieces made for each prompt, of which MuLaN chooses
    seed: the same pieces again, of which piece number i is the one that `seed + i` makes alone; by default drawn, and
        told in the answer
    format: 'wav', 'flac', 'ogg' or 'mp3', the best piece alone, or 'json', all pieces with their scores
    """

    prompt: any_of(**ONE, story=StoryPrompt, list=list[OnePrompt])
    negative: OnePrompt | None = None
    prime: str | None = None
    melody: str | None = None
    seconds: float | None = None
    num_samples: int = 1
    seed: int | None = None
    temperature: float | list[float] | None = None
    top_k: int | list[int | None] | None = None
    top_p: float | list[float] | None = None
    cond_scale: float | list[float] | None = None
    negative_scale: float | list[float] | None = None
    format: Literal['wav', 'flac', 'ogg', 'mp3', 'json'] = 'wav'

    @property
    def sampling(self) -> dict[str, Any]:
        """How to sample, as far as it is said."""
        return {name: value for name in (*SAMPLING, 'negative_scale') if (value := getattr(self, name)) is not None}


SomeBody = TypeVar('SomeBody', bound=Body)


def content_type(request: Request, *allowed: str) -> str:
    """Of the body. Raises ServiceError unless it is one of those allowed."""
    given = request.headers.get('content-type', '').split(';')[0].strip().lower()
    if given not in allowed:
        raise ServiceError(
            415, 'unsupported_media_type', f'Content-Type must be {" or ".join(allowed)}, got {given or "none"}'
        )
    return given


async def read_json(request: Request, kind: type[SomeBody]) -> SomeBody:
    content_type(request, JSON)
    return validated(kind, await request.body())


def validated(kind: type[SomeBody], given: bytes | dict[str, str]) -> SomeBody:
    """JSON, or what stands in an address, as what it is to be. Raises ServiceError that tells each fault."""
    try:
        return kind.model_validate_json(given) if isinstance(given, bytes) else kind.model_validate(given)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
    if faults[0]['type'] == 'json_invalid':
        raise ServiceError(400, 'malformed_json', f'the body is not JSON: {faults[0]["msg"]}')
    told = []
    for fault in faults[:SHOWN]:
        if fault['type'] == 'extra_forbidden':
            *within, name = fault['loc']
            where = f' in {".".join(map(str, within))}' if within else f'; {nearest(name, kind.model_fields)}'
            told.append(f'unknown field {name!r:.80}{where}')
        else:
            told.append(f'{".".join(map(str, fault["loc"])) or "the body"}: {fault["msg"]}')
    more = f'; and {len(faults) - SHOWN} more' if len(faults) > SHOWN else ''
    raise invalid('; '.join(told) + more)


async def read_form(request: Request, config: ServiceConfig) -> tuple[list[str], list[UploadFile]]:
    """The fields `texts` and the files `audio` of a form, which stay in memory."""
    content_type(request, FORM)
    parser = MultiPartParser(
        request.headers,
        request.stream(),
        max_files=config.max_files,
        max_fields=config.max_texts,
        max_part_size=config.max_body_bytes,
    )
    parser.spool_max_size = config.max_body_bytes + 1  # larger ones would go to a temporary file
    try:
        form = await parser.parse()
    except (MultiPartException, FormParserError) as error:  # newer versions of Starlette raise the former alone
        told = getattr(error, 'message', str(error))
        if told.startswith('Too many'):
            raise invalid(told) from error
        raise ServiceError(400, 'malformed_form', f'the body is not a form: {told}') from error
    texts, files = [], []
    for name, value in form.multi_items():
        if name not in ('texts', 'audio'):
            raise invalid(f"unknown field {name!r:.80}; a form may hold 'texts' and files 'audio'")
        if isinstance(value, UploadFile) != (name == 'audio'):
            raise invalid(f'{name!r} must be {"a file, with a file name" if name == "audio" else "text, not a file"}')
        (files if name == 'audio' else texts).append(value)
    return texts, files


# ---- limits of content ----


def check_texts(texts: list[str], config: ServiceConfig, name: str = 'texts') -> None:
    if len(texts) > config.max_texts:
        raise invalid(f'{name} holds {len(texts)}, but at most {config.max_texts} may come at once')
    for index, text in enumerate(texts):
        if len(text) > config.max_text_chars:
            raise invalid(
                f'{name}[{index}] has {len(text)} characters, but at most {config.max_text_chars} are allowed'
            )


def asked_music(
    body: Prompts, config: ServiceConfig, musiclm: MusicLM, *, shortest: float, dim_latent: int
) -> tuple[list[Prompt] | Story, dict[str, Any]]:
    """What music is to be like, and how long it is, what it is to keep away from, go on from and follow, as `MusicLM`
    takes them, once all is checked."""
    story = body.prompt.story if isinstance(body.prompt, StoryPrompt) else None
    asked = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    pieces = len(asked) * body.num_samples
    if body.num_samples < 1 or pieces > config.max_pieces:
        raise invalid(f'prompts times num_samples must lie between 1 and {config.max_pieces}, got {pieces}')
    if story is not None and not 0 < len(story) <= MOST_PARTS:
        raise invalid(f'a story may have 1 to {MOST_PARTS} parts, got {len(story)}')
    try:
        seconds = read_seconds(body.seconds, None, story, semantic_rate=None)
    except ValueError as error:
        raise invalid(str(error)) from error
    if not shortest <= seconds <= config.max_seconds:
        raise invalid(f'seconds must lie between {shortest:.3g} and {config.max_seconds:g}, got {seconds:g}')
    if body.seed is not None and not 0 <= body.seed < 2**63:
        raise invalid(f'seed must lie between 0 and 2⁶³ - 1, got {body.seed}')
    if body.format != 'json' and isinstance(body.prompt, list):
        raise invalid(f"a {body.format.upper()} holds one piece: give one prompt, not a list, or format 'json'")
    read = PromptReader(config, shortest=shortest, dim_latent=dim_latent)
    try:
        if story is None:
            prompts, _ = read_prompts([read(it) for it in asked])
        else:
            prompts, parts = read_prompts([(length, read(it)) for length, it in story])
            prompts = [(length, prompt) for (length, _), prompt in zip(parts, prompts)]
        given: dict[str, Any] = dict(seconds=None if story else seconds)
        if body.negative is not None:
            given['negative'] = read_prompt(read(body.negative))
        if body.melody is not None:  # before any sound is decoded
            musiclm.check_follows_melodies()
        given |= read.sounds_of(body)
        if 'prime' in given:
            wave, rate = given.pop('prime')
            check_shorter(len(wave) / rate, seconds)
            given |= dict(prime_wave=wave, prime_wave_input_sample_hz=rate)
        read_sampling(**body.sampling, conditioned=[True] * len(STAGES))
    except (TypeError, ValueError) as error:
        raise invalid(str(error)) from error
    return prompts, given


class PromptReader:
    """Prompts as `MusicLM` takes them, of what a body holds; all of them together keep to the limits."""

    def __init__(self, config: ServiceConfig, *, shortest: float, dim_latent: int):
        self.config, self.shortest, self.dim_latent = config, shortest, dim_latent
        self.texts, self.sounds, self.seconds = [], 0, 0.0  # so far

    def __call__(self, prompt: OnePrompt) -> Prompt:
        if isinstance(prompt, str):
            self.texts.append(prompt)
            check_texts(self.texts, self.config, 'prompt')
            return prompt
        if isinstance(prompt, MixPrompt):
            return Mix([(weight, self(part)) for weight, part in prompt.mix])
        if isinstance(prompt, LatentPrompt):
            latent = torch.tensor(prompt.latent, dtype=torch.float32)
            if len(latent) != self.dim_latent:
                raise invalid(f'a latent must have {self.dim_latent} numbers, got {len(latent)}')
            return latent
        return self.sound(prompt.sound, 'the sound of a prompt', shortest=self.shortest)

    def sounds_of(self, body: Body) -> dict[str, tuple[Tensor, int]]:
        """What the music is to go on from and to follow, as far as a body says it."""
        given = {name: getattr(body, name, None) for name in ('prime', 'melody')}
        return {name: self.sound(it, name) for name, it in given.items() if it is not None}

    def sound(self, text: str, name: str, *, shortest: float = 0.0) -> tuple[Tensor, int]:
        """The wave `(samples,)` of a sound file as base64, and its rate."""
        self.sounds, most = self.sounds + 1, self.config.max_files
        if self.sounds > most:
            raise invalid(f'prompts hold {self.sounds} sounds or more, but at most {most} may come at once')
        try:
            content = base64.b64decode(text, validate=True)
        except ValueError as error:
            raise invalid(f'{name} is no base64: {error}') from error
        file = open_sound(content, name)
        seconds, longest = len(file) / file.sample_rate, self.config.max_audio_seconds
        self.seconds += seconds
        if seconds < shortest:
            raise invalid(f'{name} must last {shortest:.3g} s at least, got {seconds:.3g} s')
        if self.seconds > longest:
            raise invalid(f'with {name}, sounds last more than the {longest:g} s that are allowed')
        try:
            return file.read(0, len(file)), file.sample_rate
        except ValueError as error:
            raise unreadable(str(error)) from error


def open_audio(uploads: list[UploadFile], config: ServiceConfig) -> list[AudioFile]:
    """Sound files whose headers are in order; what they hold is not read yet."""
    files, seconds = [], 0.0
    for index, upload in enumerate(uploads):
        content = upload.file.read()  # an upload's own file cannot tell where it is on Python 3.10
        upload.file.close()
        files.append(open_sound(content, f'audio[{index}] ({upload.filename:.80})'))
        seconds += len(files[-1]) / files[-1].sample_rate
    if seconds > config.max_audio_seconds:
        raise invalid(f'audio lasts {seconds:.1f} s in all, but at most {config.max_audio_seconds:g} s are allowed')
    return files


def open_sound(content: bytes, name: str) -> AudioFile:
    try:
        file = AudioFile(io.BytesIO(content), name)
    except ValueError as error:
        raise unreadable(str(error)) from error
    if file.channels > MOST_CHANNELS:
        raise unreadable(f'{name} has {file.channels} channels, but at most {MOST_CHANNELS} are read; mix it down')
    if len(file) == 0:
        raise unreadable(f'{name} has no samples')
    return file


def header_of(text: str) -> str:
    """A text as the value of a header, which holds ASCII alone: the rest is percent-encoded, as in addresses."""
    return quote(text, safe=''.join(map(chr, range(32, 127))).replace('%', ''))
