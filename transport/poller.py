"""Waits for what a device does: it has no event that a loop could wait for, so ask until nothing is under way."""

from __future__ import annotations

import asyncio
import ctypes
import time
from collections import deque
from collections.abc import Callable

from .stager import Ticket

SPIN_S = 200e-6  # after the last thing that moved; a kernel takes 15-25 us
NAP_S = 50e-6
DRAIN_S = 10.0
COLD_S = 2e-3
_PR_SET_TIMERSLACK, _SLACK_NS = 29, 1000


class Poller:
    """On one loop: asks every ticket once a turn, naps between turns when nothing moves, and rests without tickets."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._tickets: deque[tuple[Ticket, Callable[[int], None]]] = deque()
        self._is_polling = False
        self._moved_at = 0.0
        # The kernel else adds 50 us to each of this thread's naps; where it is refused they are longer.
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, _SLACK_NS, 0, 0, 0)

    @property
    def is_cold(self) -> bool:
        """Nothing has moved for a while."""
        return time.perf_counter() - self._moved_at > COLD_S

    def when(self, ticket: Ticket, then: Callable[[int], None]) -> None:
        """Call `then` with what the ticket says, now or in a later turn."""
        said = ticket.poll()
        if said is not None:
            then(said)
            return
        self._tickets.append((ticket, then))
        self.stir()

    def stir(self) -> None:
        """Something has moved: do not nap yet."""
        self._moved_at = time.perf_counter()
        if self._tickets and not self._is_polling:
            self._is_polling = True
            self._loop.call_soon(self._poll)

    def drain(self) -> None:
        """Return when every ticket has spoken, or a device has not for `DRAIN_S`."""
        deadline = time.monotonic() + DRAIN_S
        while self._tickets and time.monotonic() < deadline:
            self._ask()

    def _poll(self) -> None:
        self._is_polling = False
        try:
            if self._ask():
                self._moved_at = time.perf_counter()
            elif time.perf_counter() - self._moved_at > SPIN_S:
                time.sleep(NAP_S)
        finally:
            if self._tickets and not self._is_polling:
                self._is_polling = True
                self._loop.call_soon(self._poll)

    def _ask(self) -> bool:
        has_moved = False
        for _ in range(len(self._tickets)):
            ticket, then = self._tickets.popleft()
            said = ticket.poll()
            if said is None:
                self._tickets.append((ticket, then))
            else:
                has_moved = True
                then(said)
        return has_moved
