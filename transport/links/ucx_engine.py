"""One UCX context and worker, progressed by the loop when the worker's event fd says so.

UCXX's own asyncio modes spin or wait in a thread; this idles at 0.01 % of a core and notices a killed peer in 2 ms.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from ..base import Buffer
from ..errors import LinkLost, TransportUnavailable
from ..frames import TAG_BITS
from .ucp import Arrived, Operation, Ucp

if TYPE_CHECKING:
    import ucxx._lib.libucxx as core

RNDV_BYTES = 16 << 10  # from here on a message is offered before its bytes are written
CONNECTIONS_MAX = 1 << (63 - TAG_BITS)
WATCHDOG_S = 0.03  # UCX and UCXX speak of lost wake-ups; only while something is pending
DRAIN_S = 0.05  # at the close
TURN_S = 0.002  # of progress, then other work of the loop gets its turn
SPINS_MAX, FRUITLESS_MAX = 8, 1000
CUDA_SPIN_S = 200e-6  # after the last thing that moved: a copy between GPUs takes less, and each sleep costs 0.1 ms
SHORT_PAUSE_S, LONG_PAUSE_S = 50e-6, 2e-3  # 2 MiB fit into the queue: 20 GB/s with the first
_ANY_MESSAGE = (1 << 64) - (1 << TAG_BITS)  # mask: this connection, not control
# Set before the first import of ucxx; a variable that the user has set stays.
SETTINGS = {
    "UCX_MM_ERROR_HANDLING": "y",  # else two processes of one host talk over tcp only: 1 GB/s instead of 10
    "UCX_TCP_TX_SEG_SIZE": "256K",
    "UCX_TCP_RX_SEG_SIZE": "256K",
    "UCX_RNDV_FRAG_SIZE": "host:4M,cuda:4M",
    "UCX_KEEPALIVE_INTERVAL": "1s",
    "UCX_WARN_UNUSED_ENV_VARS": "n",  # ucxx's own variable makes UCX print a warning to stdout
}


class Connection(Protocol):
    """A link of this engine."""

    def take_arrived(self) -> None:
        """Progress was made: offers may have come for receives that wait."""

    async def abort(self) -> None: ...


class Engine:
    """One UCX context and worker, progressed when its fd says so."""

    def __init__(self) -> None:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            import ucxx._lib.libucxx as core  # Optional, and 0.7 s.
            from ucxx._lib.arr import Array
            from ucxx.exceptions import UCXError
        except (ImportError, OSError) as error:
            raise TransportUnavailable(f"ucxx cannot be imported ({error}); install ucxx-cu12 or ucxx-cu13") from error
        # Never the user's, nor the one that ucxx sets at import: an eager message of this length or more would be written
        # into KV blocks by fragments that closing its endpoint does not stop. Read when the context is made.
        os.environ["UCX_RNDV_THRESH"] = str(RNDV_BYTES)
        self.core = core
        self.array: Callable[[Buffer], object] = Array
        self.errors: tuple[type[Exception], ...] = (UCXError, RuntimeError)  # whatever UCXX may raise
        self.ucp = Ucp()
        self.loop = asyncio.get_running_loop()
        try:
            self._context = core.UCXContext({}, (core.Feature.TAG, core.Feature.STREAM, core.Feature.WAKEUP))
            self.has_cuda = "cuda" in self._context.info  # UCXX's own `cuda_support` is True without a GPU.
            self.worker = core.UCXWorker(self._context, enable_delayed_submission=False, enable_python_future=False)
            self.worker.init_blocking_progress_mode()
        except self.errors as error:
            raise TransportUnavailable(f"UCX did not start: {error}") from error
        self._fd = self.worker.epoll_file_descriptor
        self._completed: deque[Operation] = deque()
        self._handlers: dict[Operation, Callable[[Operation], None]] = {}
        self._idle: set[Operation] = set()  # receives that may wait for ever
        self.expecting: dict[Connection, None] = {}  # with receives that no message has come for
        self._greetings: list[tuple[core.UCXRequest, asyncio.Future[None]]] = []
        self._connections = itertools.count(int.from_bytes(os.urandom(2), "little"))
        self.connections: dict[int, Connection] = {}
        self._is_kicked = False
        self._moved_at = 0.0
        self._fruitless = 0  # turns without progress after which UCX would not arm
        self._watchdog: asyncio.TimerHandle | None = None
        self.is_closed = False
        self.loop.add_reader(self._fd, self.pump)

    def new_connection(self) -> int:
        """A connection id that is in no tag of this worker."""
        return next(number for n in self._connections if (number := n % CONNECTIONS_MAX) not in self.connections)

    def send(
        self, endpoint: int, tag: int, buffers: Sequence[Buffer], on_end: Callable[[Operation], None]
    ) -> Operation:
        return self._begun(self.ucp.send(endpoint, tag, buffers, self._completed), on_end)

    def receive_some_time(self, tag: int, buffer: Buffer, on_end: Callable[[Operation], None]) -> Operation:
        """Post a receive that may wait for ever."""
        operation = self.ucp.receive(self.worker.handle, tag, [buffer], self._completed)
        self._idle.add(operation)
        return self._begun(operation, on_end)

    def arrived(self, tag: int) -> Arrived | None:
        return self.ucp.arrived(self.worker.handle, tag, _ANY_MESSAGE)

    def receive_arrived(
        self, arrived: Arrived, buffers: Sequence[Buffer], on_end: Callable[[Operation], None]
    ) -> Operation:
        return self._begun(self.ucp.receive_arrived(self.worker.handle, arrived, buffers, self._completed), on_end)

    def cancel(self, operation: Operation) -> None:
        self.ucp.cancel(self.worker.handle, operation)
        self.kick()

    def greet(self, request: core.UCXRequest) -> asyncio.Future[None]:
        """Wait for one of UCXX's own requests."""
        future: asyncio.Future[None] = self.loop.create_future()
        self._greetings.append((request, future))
        self.kick()
        return future

    def kick(self) -> None:
        """Progress soon; after every submission, because the fd is armed only at the end of a pump."""
        if not self._is_kicked and not self.is_closed:
            self._is_kicked = True
            self.loop.call_soon(self.pump)

    def pump(self) -> None:
        """Progress, tell what has ended, arm: in this order, or a wake-up is lost."""
        self._is_kicked = False
        if self.is_closed:
            return
        deadline = time.perf_counter() + TURN_S
        has_moved = False
        while self.worker.progress_once():
            has_moved = True
            if time.perf_counter() > deadline:
                break
        self._tell()
        for link in list(self.expecting):
            link.take_arrived()
        is_pending = len(self._handlers) > len(self._idle) or self.expecting or self._greetings
        now = time.perf_counter()
        if has_moved:
            self._moved_at = now
        spins = self.has_cuda and is_pending and now - self._moved_at < CUDA_SPIN_S
        self._fruitless = 0 if has_moved or spins or self.worker.arm() else self._fruitless + 1
        if has_moved or spins:
            self.kick()
        elif self._fruitless:
            self._back_off()
        if is_pending and self._watchdog is None:
            self._watchdog = self.loop.call_later(WATCHDOG_S, self._watch)

    def _back_off(self) -> None:
        """UCX will not arm: the peer's shared-memory queue is full, and nothing but asking again shows when it is not.

        Spinning takes the core that the peer needs to empty it [2 cores, both busy: 2,500 turns for each transfer].
        """
        if self._fruitless > FRUITLESS_MAX and not self.has_cuda:
            self.loop.call_later(LONG_PAUSE_S, self.pump)
            return
        if self._fruitless > SPINS_MAX:
            time.sleep(SHORT_PAUSE_S)
        self.kick()

    def close(self) -> None:
        self.loop.remove_reader(self._fd)
        self._tell()  # UCX warns on stdout of requests that were not given back.
        self.is_closed = True
        if self._watchdog:
            self._watchdog.cancel()
        self._handlers.clear()
        self._drain()
        del self.worker, self._context

    def _drain(self) -> None:
        """Take what came and was never asked for.

        UCXX's worker would, before it goes, and wait for ever for the rest of a message whose sender died in the middle.
        """
        operations: list[Operation] = []
        end_s = time.perf_counter() + DRAIN_S
        while time.perf_counter() < end_s:
            if arrived := self.ucp.arrived(self.worker.handle, 0, 0):
                operations.append(self.ucp.receive_arrived(self.worker.handle, arrived, (), self._completed))
            elif all(operation.status is not None for operation in operations):
                break
            self.worker.progress_once()
        for operation in operations:
            self.ucp.free(operation)

    def _begun(self, operation: Operation, on_end: Callable[[Operation], None]) -> Operation:
        self._handlers[operation] = on_end
        self._moved_at = time.perf_counter()
        self.kick()
        return operation

    def _watch(self) -> None:
        self._watchdog = None
        self.pump()

    def _tell(self) -> None:
        while self._completed:
            operation = self._completed.popleft()
            self.ucp.free(operation)
            self._idle.discard(operation)
            self._handlers.pop(operation)(operation)
        if self._greetings:
            greetings, self._greetings = self._greetings, []
            for request, future in greetings:
                if not request.completed:
                    self._greetings.append((request, future))
                elif not future.done():
                    self._settle(request, future)

    def _settle(self, request: core.UCXRequest, future: asyncio.Future[None]) -> None:
        try:
            request.check_error()
        except self.errors as error:
            future.set_exception(LinkLost(str(error)))
        else:
            future.set_result(None)
