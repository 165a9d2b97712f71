"""uvicorn on a listening socket of our own, whose options the accepted sockets inherit."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator
from http import HTTPStatus

import msgspec
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import error_object
from .exchange import ABORT_CONNECTION

DEAD_CLIENT_MS = 20_000
"""Unacknowledged data older than this closes a connection: closing does not, uvicorn waits for its buffer to drain."""
SEND_BUFFER_BYTES = 64 << 10
"""By default the kernel swallows over 0.6 MB for each client that does not read; with this our own bound is real."""
BACKLOG = 2048


HEAD_TIMEOUT_S = 20.0
HEAD_BYTES_MAX = 64 << 10


class ServerError(Exception):
    """The API cannot listen; the text says where and why."""


class _Protocol(HttpToolsProtocol):
    """uvicorn's, with bounds on a request's head and a way to drop a connection at once."""

    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _is_in_head = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # As uvicorn's own.
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._on_slow_head)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_in_head:  # Still: most heads come in one piece.
            self._head_bytes += len(data)
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._on_slow_head)
            if self._head_bytes > HEAD_BYTES_MAX and not self.transport.is_closing():
                self._refuse(431, f"the head of the request is larger than {HEAD_BYTES_MAX} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"][ABORT_CONNECTION] = self.transport.abort
        self._is_in_head = True
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _end_head(self) -> None:
        self._is_in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_slow_head(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self._refuse(408, f"the head of the request did not come within {HEAD_TIMEOUT_S:g} s")

    def _refuse(self, status: int, message: str) -> None:
        body = msgspec.json.encode(error_object(message, status=status, code="bad_http"))
        head = b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % (
            status, HTTPStatus(status).phrase.encode(), len(body),
        )  # fmt: skip
        self.transport.write(head + body)
        self.transport.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The process's own signal handlers decide when to stop."""
        yield


class ApiServer:
    """`listen()`, then `run()` serves until `stop()`. With `reuse_port` several processes may listen on one port."""

    def __init__(self, app: ASGIApp, *, host: str, port: int, grace_s: float, reuse_port: bool = False) -> None:
        self._socket = bind(host, port, reuse_port=reuse_port)
        shown, self.port = self._socket.getsockname()[:2]
        self.url = f"http://{f'[{shown}]' if ':' in shown else shown}:{self.port}"
        self._server = _Server(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=max(1, int(grace_s)),
            )
        )

    def listen(self) -> None:
        """From now on connections come; they wait until `run`. Raises ServerError."""
        try:
            self._socket.listen(BACKLOG)
        except OSError as error:
            raise _in_use(self.url, error) from error

    async def run(self) -> None:
        """Serve until told to stop; open connections get the grace."""
        await self._server.serve(sockets=[self._socket])

    def stop(self) -> None:
        """Accept nothing more and end."""
        self._server.should_exit = True


def bind(host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """A socket that does not listen yet. Raises ServerError."""
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
        if reuse_port:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise _in_use(f"{host}:{port}", error) from error
    listening.setblocking(False)
    return listening


def _in_use(where: str, error: OSError) -> ServerError:
    hint = "; another process has it, choose one with --port" if error.errno == errno.EADDRINUSE else ""
    return ServerError(f"cannot listen on {where}: {error.strerror}{hint}")
