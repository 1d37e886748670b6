"""A server of the HTTP service in a thread of this process."""

import contextlib
import threading
import time
from types import SimpleNamespace

import httpx
import uvicorn

from musiclm_pytorch.inference import ServiceConfig, create_service

WAITS = 60  # seconds after which a test gives up on what hangs


@contextlib.contextmanager
def served(model, **limits):
    """A server with a model, a client of it and the application."""
    app = create_service(model, ServiceConfig(**limits))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    address = server.servers[0].sockets[0].getsockname()
    try:
        with httpx.Client(base_url=f'http://127.0.0.1:{address[1]}', timeout=WAITS) as client:
            yield SimpleNamespace(client=client, app=app, worker=app.state.worker, address=address)
    finally:
        server.should_exit = True
        thread.join(WAITS)
    assert not thread.is_alive()
