"""The server: a socket, and an end that leaves no request without an answer."""

import contextlib
import signal
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette

from maxmap.errors import UserError, printable, reason

_STOPPING = 10  # seconds in which requests are still answered after a signal


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens; raises UserError if it cannot."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(
            f"cannot listen at {printable(host)}, port {port} ({reason(error)}): give another --port or --host."
        ) from error


def make_server(app: Starlette) -> uvicorn.Server:
    """Returns a server of an application, which logs warnings alone."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=_STOPPING)
    return uvicorn.Server(config)


def run(app: Starlette, listening: socket.socket) -> None:
    """Answers requests until Ctrl-C or SIGTERM, and then what it has taken; a second Ctrl-C ends it at once."""
    with _signals_end_well():
        make_server(app).run(sockets=[listening])


@contextlib.contextmanager
def _signals_end_well() -> Iterator[None]:
    """Has the signals do nothing that uvicorn raises once more after it has stopped for them."""

    def ignore(*_: Any) -> None:
        pass

    before = {number: signal.signal(number, ignore) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
