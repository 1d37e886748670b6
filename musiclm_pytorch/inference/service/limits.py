"""How much may come in: requests at once, bytes of a body, and the time that it may take to arrive."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from musiclm_pytorch.inference.service.config import ServiceConfig
from musiclm_pytorch.inference.service.requests import RETRY_AFTER, ServiceError, error_response


@dataclass
class Load:
    """How many requests are in the house."""

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
            refusal = error_response(503, 'overloaded', message, {'Retry-After': str(RETRY_AFTER)})
            await refusal(scope, receive, send)
            return
        self.load.requests += 1
        try:
            # a length that is told is believed only where it is too much
            told = dict(scope['headers']).get(b'content-length', b'')
            if told.isdigit() and int(told) > self.config.max_body_bytes:
                error = self._too_large()
                await error_response(error.status_code, error.code, error.detail)(scope, receive, send)
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
