"""What `/openapi.json` tells of calls whose bodies FastAPI does not read."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from musiclm_pytorch.inference.service.requests import FORM, JSON

PARTS: dict[str, Any] = {}  # of bodies, by name, as their references have it
BINARY = {'type': 'string', 'format': 'binary'}


class Fault(BaseModel):
    """code: for programs; message: for people."""

    code: str
    message: str


class Wrong(BaseModel):
    """The one shape of errors."""

    error: Fault


WRONG = {'default': {'description': 'An error', 'model': Wrong}}  # what any call may answer


def openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description, with the parts of bodies, of which it knows nothing."""
    told = FastAPI.openapi(app)
    told['components']['schemas'].update(PARTS)
    return told


def schema(kind: type[BaseModel]) -> dict[str, Any]:
    """A JSON body; its parts become some of `PARTS`."""
    told = kind.model_json_schema(ref_template='#/components/schemas/{model}')
    PARTS.update(told.pop('$defs', {}))
    return {JSON: {'schema': told}}


def form_schema(required: list[str]) -> dict[str, Any]:
    texts = {'type': 'array', 'items': {'type': 'string'}}
    audio = {'type': 'array', 'items': BINARY}
    return {FORM: {'schema': {'type': 'object', 'properties': dict(texts=texts, audio=audio), 'required': required}}}


def sounds(*media_types: str) -> dict[str, Any]:
    """An answer that is a sound."""
    return {it: {'schema': BINARY} for it in media_types}
