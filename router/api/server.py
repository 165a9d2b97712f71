"""uvicorn on a listening socket of our own, whose options the accepted sockets inherit."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

DEAD_CLIENT_MS = 20_000
"""Unacknowledged data older than this closes a connection: closing does not, uvicorn waits for its buffer to drain."""
SEND_BUFFER_BYTES = 64 << 10
"""By default the kernel swallows over 0.6 MB for each client that does not read; with this our own bound is real."""
BACKLOG = 2048


class ServerError(Exception):
    """The API cannot listen; the text says where and why."""


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process's own signal handlers decide when to stop."""
        yield


class ApiServer:
    """`run()` serves until `stop()`."""

    def __init__(self, app: ASGIApp, *, host: str, port: int, grace_s: float) -> None:
        self._socket = _listen(host, port)
        shown, self.port = self._socket.getsockname()[:2]
        self.url = f"http://{f'[{shown}]' if ':' in shown else shown}:{self.port}"
        self._server = _Server(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=max(1, int(grace_s)),
            )
        )

    async def run(self) -> None:
        """Serve until told to stop; open connections get the grace."""
        await self._server.serve(sockets=[self._socket])

    def stop(self) -> None:
        """Accept nothing more and end."""
        self._server.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ServerError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_CLIENT_MS)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        hint = "; another process has it, choose one with --port" if error.errno == 98 else ""
        raise ServerError(f"cannot listen on {host}:{port}: {error.strerror}{hint}") from error
    listening.setblocking(False)
    return listening
