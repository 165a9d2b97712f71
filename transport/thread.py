"""A hand-off endpoint on a thread and loop of its own, for engines whose threads have no loop (vLLM's worker processes)."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from typing import ParamSpec

from .endpoint import HandoffEndpoint
from .errors import TransportError

log = logging.getLogger(__name__)
P = ParamSpec("P")
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0


class EndpointThread:
    """Runs the endpoint that `factory` makes. The factory is called on the thread, so that transports bind to its loop."""

    def __init__(self, factory: Callable[[], HandoffEndpoint]) -> None:
        self._factory = factory
        self._started = threading.Event()
        self._error: Exception | None = None
        self._endpoint: HandoffEndpoint | None = None
        self._thread = threading.Thread(target=self._run, name="kv-handoff", daemon=True)

    @property
    def endpoint(self) -> HandoffEndpoint:
        """Call its methods through `call` only: `thread.call(thread.endpoint.expect, expectation, on_end)`."""
        if self._endpoint is None:
            raise RuntimeError("the hand-off thread has not started")
        return self._endpoint

    def start(self) -> tuple[str, ...]:
        """Wait until it runs and return its addresses. Raises what the factory or the endpoint's start raised."""
        self._thread.start()
        if not self._started.wait(START_TIMEOUT_S):
            raise TransportError(f"the hand-off thread did not start within {START_TIMEOUT_S} s")
        if self._error:
            raise self._error
        return self.endpoint.addresses

    def call(self, fn: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run `fn` soon on the endpoint's loop, in the order of the calls; from any thread. Raises RuntimeError after stop."""
        self._loop.call_soon_threadsafe(lambda: fn(*args, **kwargs))

    def stop(self) -> None:
        """Close the endpoint; its last callbacks come, on its thread, before this returns. Does nothing the second time."""
        if not self._thread.is_alive():
            return
        try:
            self._loop.call_soon_threadsafe(self._stop.set)
        except RuntimeError:
            pass  # It has just stopped by itself.
        self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            log.error("left the hand-off thread behind: it did not stop within %s s", STOP_TIMEOUT_S)

    def _run(self) -> None:
        # vLLM's CPU worker binds its main thread to the OpenMP cores; a thread made later inherits that mask and fights
        # with the compute. Zero is this thread alone.
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        try:
            asyncio.run(self._main())
        except Exception as error:  # It belongs to who waits for the start.
            if self._started.is_set():
                raise
            self._error = error
        finally:
            self._started.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        endpoint = self._factory()
        try:
            await endpoint.start()
            self._endpoint = endpoint
            self._started.set()
            await self._stop.wait()
        finally:
            await endpoint.aclose()
