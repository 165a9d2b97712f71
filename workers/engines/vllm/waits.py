"""Waits that asyncio has no word for."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def on_daemon_thread(call: Callable[[], None]) -> asyncio.Event:
    """For calls of vLLM that hang at times: nobody has to wait for the thread, not even the interpreter's exit."""
    loop, is_done = asyncio.get_running_loop(), asyncio.Event()

    def run() -> None:
        try:
            call()
        finally:
            with contextlib.suppress(RuntimeError):  # The loop may have been closed since.
                loop.call_soon_threadsafe(is_done.set)

    threading.Thread(target=run, name="vllm-shutdown", daemon=True).start()
    return is_done


async def set_within(event: asyncio.Event, timeout_s: float) -> bool:
    """Whether `event` was set in time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
    return event.is_set()


async def cancelled(task: asyncio.Task[T]) -> None:
    """Cancel and wait; how it ended is known already."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # Retrieved, so that nobody logs it as lost.


def resolve(future: asyncio.Future[T] | None, result: T) -> None:
    """Unless it is over already."""
    if future and not future.done():
        future.set_result(result)


def fail(futures: Iterable[asyncio.Future[T]], error: Exception) -> None:
    """Those that are not over."""
    for future in futures:
        if not future.done():
            future.set_exception(error)
            future.exception()  # Retrieved, so that one that nobody waits for is not logged as lost.
