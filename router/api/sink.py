"""One HTTP client's socket as plain code sees it: write now when the server takes it, else keep a bounded backlog."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from types import coroutine
from typing import Any

from starlette.types import Send

_SEND_ERRORS = (OSError, RuntimeError)  # The client has gone (ASGI 2.4), or the server closed the response on its own.


@coroutine
def _resume(inner: Coroutine[Any, Any, None], waiting_on: object) -> Generator[object, Any, None]:
    """Let a task go on with a coroutine that was already run, outside any task, up to its first wait."""
    try:
        while True:
            try:
                value = yield waiting_on
            except BaseException as error:  # A cancellation belongs to the inner coroutine.
                waiting_on = inner.throw(error)
            else:
                waiting_on = inner.send(value)
    except StopIteration:
        return


class Sink:
    """Runs the ASGI `send` to its end by hand while the server does not push back (the usual case: no task, no switch)."""

    __slots__ = (
        "_backlog",
        "_backlog_bytes",
        "_backlog_bytes_max",
        "_drain_task",
        "_is_ended",
        "_is_gone",
        "_on_gone",
        "_send",
    )

    def __init__(self, send: Send, backlog_bytes_max: int, on_gone: Callable[[], None]) -> None:
        self._send = send
        self._on_gone = on_gone
        self._backlog_bytes_max = backlog_bytes_max
        self._backlog: list[bytes] = []
        self._backlog_bytes = 0
        self._is_ended = False
        self._is_gone = False
        self._drain_task: asyncio.Task[None] | None = None

    def write(self, body: bytes, *, is_last: bool = False) -> None:
        """Never blocks and never raises; a client that has gone, or does not read, is reported once by `on_gone`."""
        if self._is_gone:
            return
        if self._drain_task is not None:
            self._keep(body, is_last=is_last)
            return
        inner = self._send({"type": "http.response.body", "body": body, "more_body": not is_last})
        try:
            waiting_on = inner.send(None)  # type: ignore[attr-defined]  # Starlette types send as any awaitable; ASGI's are coroutines.
        except StopIteration:
            return
        except _SEND_ERRORS:
            self._give_up()
            return
        self._drain_task = asyncio.get_running_loop().create_task(self._drain(inner, waiting_on), name="sse-drain")  # type: ignore[arg-type]  # As above.

    async def aclose(self) -> None:
        """Leave no task behind."""
        self._is_gone = True
        if self._drain_task is not None:
            self._drain_task.cancel()
            await asyncio.wait([self._drain_task])

    def _keep(self, body: bytes, *, is_last: bool) -> None:
        self._backlog.append(body)
        self._backlog_bytes += len(body)
        self._is_ended = is_last
        if self._backlog_bytes > self._backlog_bytes_max:
            self._give_up()

    def _give_up(self) -> None:
        if not self._is_gone:
            self._is_gone = True
            self._backlog.clear()
            self._on_gone()

    async def _drain(self, inner: Coroutine[Any, Any, None], waiting_on: object) -> None:
        try:
            await _resume(inner, waiting_on)
            while self._backlog:
                body = b"".join(self._backlog)
                self._backlog.clear()
                self._backlog_bytes = 0
                await self._send({"type": "http.response.body", "body": body, "more_body": not self._is_ended})
        except _SEND_ERRORS:
            self._give_up()
        finally:
            self._drain_task = None
