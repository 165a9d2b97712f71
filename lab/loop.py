"""An asyncio loop on virtual time: nothing waits, time jumps to the next timer, and the same input gives the same run.

No clock, socket, thread or signal takes part. A `Process` is what an operating-system process is elsewhere: everything
that its tasks start belongs to it (a context variable says so), and it can be paused (SIGSTOP) and killed (SIGKILL).
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar

T = TypeVar("T")
CALLBACKS_MAX = 200_000
"""In one instant; more is a loop that waits for a time that never comes."""


class Deadlock(RuntimeError):
    """Somebody waits, and nothing is left that could happen; or things happen without end at one instant."""


class Process:
    """Whose callbacks run together, stop together and die together."""

    def __init__(self, loop: VirtualLoop, name: str) -> None:
        self.name = name
        self.is_paused = False
        self.died_s: float | None = None
        self._loop = loop
        self._context = copy_context()
        self._context.run(_current.set, self)
        self._held: deque[events.Handle] = deque()  # what came due while it was paused

    @property
    def is_dead(self) -> bool:
        return self.died_s is not None

    def start(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run a coroutine as a task of this process."""
        return self._loop.create_task(work, name=name, context=self._context.copy())

    def call_soon(self, call: Callable[..., object], *args: object) -> None:
        """Run a callback in this process, in the next turn."""
        self._loop.call_soon(call, *args, context=self._context.copy())

    def call_at(self, when: float, call: Callable[..., object], *args: object) -> asyncio.TimerHandle:
        """Run a callback in this process at a time of the loop, in seconds."""
        return self._loop.call_at(when, call, *args, context=self._context.copy())

    def pause(self) -> None:
        """As SIGSTOP: nothing of it runs; what comes due is kept, in order."""
        self.is_paused = True

    def resume(self) -> None:
        """As SIGCONT."""
        self.is_paused = False
        if not self.is_dead:
            self._loop.run_held(self._held)
        self._held = deque()

    def kill(self) -> None:
        """As SIGKILL: nothing of it runs any more, no `finally` either."""
        self.died_s = self._loop.time()
        self._held.clear()

    def hold(self, handle: events.Handle) -> None:
        """For the loop: this came due while the process does not run."""
        if not self.is_dead:
            self._held.append(handle)


_current: ContextVar[Process | None] = ContextVar("process", default=None)


def current_process() -> Process | None:
    """Whose code runs now; None outside of any."""
    return _current.get()


class _Task(asyncio.Task[T]):
    """Hashed by its number: sets of tasks are then iterated in the same order in every run."""

    def __init__(self, coro: Coroutine[Any, Any, T], loop: VirtualLoop, name: str | None, context: Context) -> None:
        self.number = loop.next_number()
        self.process = context.get(_current)
        super().__init__(coro, loop=loop, name=name or f"task {self.number}", context=context)

    def __hash__(self) -> int:
        return self.number


class VirtualLoop(asyncio.BaseEventLoop):
    """Use `run`. Times are seconds since its start."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._ready: deque[events.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count(1)
        self._tasks: dict[_Task[Any], None] = {}  # not done yet
        self._is_over = False

    def time(self) -> float:
        """Virtual seconds."""
        return self._now

    def next_number(self) -> int:
        """Counts whatever needs an order."""
        return next(self._numbers)

    def open_tasks(self) -> list[_Task[Any]]:
        """Tasks that are not done, oldest first, without those of killed processes."""
        return [task for task in self._tasks if task.process is None or not task.process.is_dead]

    # ---- what asyncio calls

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> events.Handle:  # type: ignore[override]  # asyncio's own signature, with a variadic tuple.
        handle = events.Handle(callback, args, self, context)
        if not self._is_over:
            self._ready.append(handle)
        return handle

    def call_soon_threadsafe(  # type: ignore[override]  # As above.
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> events.Handle:
        """There is no other thread, so it is `call_soon`."""
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override]  # As above.
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]  # As above.
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        if not self._is_over:
            heapq.heappush(self._timers, (when, next(self._numbers), handle))
        return handle

    def create_task(  # type: ignore[override]  # As above.
        self, coro: Coroutine[Any, Any, T], *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[T]:
        task = _Task(coro, self, name, context if context is not None else copy_context())
        self._tasks[task] = None
        task.add_done_callback(self._forget)
        return task

    def run_in_executor(self, executor: object, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]  # As above.
        """At once and here: there is no thread."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # Whatever it is belongs to who awaits it.
            future.set_exception(error)
        return future

    async def create_connection(self, *args: object, **options: object) -> Any:
        """There is no network."""
        raise RuntimeError("no network on virtual time: use a transport and a bus of the lab")

    create_server = create_datagram_endpoint = getaddrinfo = subprocess_exec = create_connection

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)  # type: ignore[call-overload]  # Every task of ours is a _Task.

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers are skipped when they come due."""

    def _write_to_self(self) -> None:
        """Nothing sleeps that could be woken."""

    # ---- turns

    def run_held(self, handles: deque[events.Handle]) -> None:
        """Before everything else that is ready: it was due earlier."""
        self._ready.extendleft(reversed(handles))

    def _run_once(self) -> None:
        """One instant, if nothing stops the loop: everything that is due now and everything which that causes at once."""
        ready, timers = self._ready, self._timers
        if not ready:
            while timers and timers[0][2].cancelled():
                heapq.heappop(timers)
            if not timers:
                raise Deadlock(f"nothing is left to happen at {self._now:g} s, and {len(self._tasks)} tasks wait")
            self._now = max(self._now, timers[0][0])
        count = 0
        while not self._stopping:  # type: ignore[attr-defined]  # BaseEventLoop's.
            while timers and timers[0][0] <= self._now:
                ready.append(heapq.heappop(timers)[2])
            if not ready:
                return
            for _ in range(len(ready)):
                handle = ready.popleft()
                if handle.cancelled():
                    continue
                count += 1
                process = handle._context.get(_current)  # type: ignore[attr-defined]  # Kept there since Python 3.7.
                if process is not None and (process.is_dead or process.is_paused):
                    process.hold(handle)
                else:
                    handle._run()
            if count > CALLBACKS_MAX:
                raise Deadlock(f"{count} callbacks at {self._now:g} s: somebody waits for time without a timer")

    def bury(self) -> None:
        """The run is over: what killed processes left behind is closed here, not by chance in some later run."""
        self._is_over = True
        self._ready.clear()
        self._timers.clear()
        for task in list(self._tasks):
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # As asyncio.gather does.
            coro = task.get_coro()
            with contextlib.suppress(BaseException):  # Its `finally` meets a world that is gone.
                coro.close()  # type: ignore[union-attr,unused-ignore]  # A task runs a coroutine.
        self._tasks.clear()


def run(main: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    """Run `main(loop)` from time 0 to its end. Raises Deadlock, and what it raises."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main(loop))
    finally:
        loop.bury()
        loop.close()
