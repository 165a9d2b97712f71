"""One HTTP request that generates: from its start to its complete answer, or to the client's leaving."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..generation import Generation, RouterCore, RouterError, Started
from .answers import EventStream, WholeAnswer
from .errors import ApiError, error_response, from_failure, from_router
from .sink import Sink
from .stream import Stream, TokenPath

log = logging.getLogger(__name__)

Headers = list[tuple[bytes, bytes]]
ABORT_CONNECTION = "abort_connection"
"""Where `server.py` leaves, in the ASGI state, the callable that drops the client's connection."""


class Exchange:
    """The generations of one request and their common answer.

    The request's own task only waits for `http.disconnect`, which by the ASGI spec comes when the client goes and also when
    the response is complete; a task of its own starts the generations and the response.
    """

    def __init__(self, core: RouterCore, path: TokenPath, *, backlog_bytes_max: int, headers: Headers) -> None:
        self._core = core
        self._path = path
        self._backlog_bytes_max = backlog_bytes_max
        self._headers = headers
        self._stream_ids: list[int] = []
        self._sink: Sink | None = None
        self._done = asyncio.Event()

    def finish(self) -> None:
        """A whole answer is complete, or has failed."""
        self._done.set()

    def release(self) -> None:
        """Give up every generation that has not ended."""
        for stream_id in self._stream_ids:
            if self._path.close(stream_id):
                self._core.cancel(stream_id)
        self._stream_ids.clear()

    async def run(
        self,
        answer: EventStream | WholeAnswer,
        generations: Sequence[tuple[Generation, Stream]],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Answer the request."""
        me = asyncio.current_task()
        assert me is not None
        is_given_up = False

        def give_up() -> None:
            nonlocal is_given_up
            is_given_up = True
            self.release()
            abort: Callable[[], None] = scope.get("state", {}).get(ABORT_CONNECTION, me.cancel)
            abort()

        work = asyncio.create_task(self._work(answer, generations, (scope, receive, send), give_up), name="answer")
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
        except asyncio.CancelledError:
            if not is_given_up:
                raise
            me.uncancel()  # Returning early makes any server close the connection.
        finally:
            self.release()
            if self._sink is not None:
                await self._sink.aclose()
            if not work.done():
                work.cancel()
                await asyncio.wait([work])
            if not work.cancelled() and (error := work.exception()) is not None:
                log.error("a response could not be begun", exc_info=error)

    async def _work(
        self,
        answer: EventStream | WholeAnswer,
        generations: Sequence[tuple[Generation, Stream]],
        asgi: tuple[Scope, Receive, Send],
        give_up: Callable[[], None],
    ) -> None:
        try:
            started = await self._start(generations)
            self._headers += [
                (b"x-hocket-plan", started.plan.encode()),
                (b"x-hocket-decode-worker", started.decode_worker.encode()),
            ]
            if isinstance(answer, WholeAnswer):
                await self._send_whole(answer, asgi)
                return
            if answer.is_failed_unseen:
                assert answer.failure is not None
                raise from_failure(answer.failure)
        except (ApiError, RouterError) as error:
            self.release()
            refusal = error if isinstance(error, ApiError) else from_router(error)
            await error_response(refusal, self._headers)(*asgi)
            return
        except Exception:  # The edge of the process: the client gets an answer, the log the reason.
            log.exception("a request could not be started")
            self.release()
            await error_response(ApiError("internal error", status=500, code="internal_error"), self._headers)(*asgi)
            return
        await self._open_stream(answer, asgi[2], give_up)

    async def _start(self, generations: Sequence[tuple[Generation, Stream]]) -> Started:
        """Every generation at once; the first that cannot start ends the others. Raises RouterError."""
        opened = [(generation, self._path.open(stream)) for generation, stream in generations]
        self._stream_ids = [stream_id for _, stream_id in opened]
        if len(opened) == 1:
            return await self._core.start(*opened[0])
        try:
            async with asyncio.TaskGroup() as tasks:
                starting = [tasks.create_task(self._core.start(*one), name="start") for one in opened]
        except* RouterError as errors:
            raise _first(errors) from None
        return starting[0].result()

    async def _send_whole(self, answer: WholeAnswer, asgi: tuple[Scope, Receive, Send]) -> None:
        await self._done.wait()
        if answer.failure is not None:
            raise from_failure(answer.failure)
        response = Response(answer.body(), media_type="application/json")
        response.raw_headers += self._headers
        await response(*asgi)

    async def _open_stream(self, answer: EventStream, send: Send, give_up: Callable[[], None]) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            *self._headers,
        ]
        self._sink = Sink(send, self._backlog_bytes_max, give_up)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        answer.attach(self._sink)


def _first(errors: BaseExceptionGroup[RouterError]) -> RouterError:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
