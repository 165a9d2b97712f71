"""Threads that pull messages in, a piece at a time, fair between links.

A link of this sort receives by reading: nobody but these threads writes into a place, so when `drop` has been answered for
every pull of a link, nothing is written on its behalf any more. Idle threads sleep.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

import xxhash

THREADS_MAX = 4


class Pull(Protocol):
    """One message on its way in. Made on the loop, then used by one thread at a time."""

    @property
    def is_done(self) -> bool: ...

    @property
    def is_short(self) -> bool:
        """Whether one step of less than 0.2 ms is all of it: cheaper on the loop than with a thread."""

    def step(self, digest: xxhash.xxh3_64 | None) -> int:
        """Move the next piece, in the order of the message, and say how many bytes that were; `digest` is told them.

        Raises OSError when the rest will not come, ValueError when it is not what was announced.
        """

    def close(self) -> None:
        """Called once, after the last step. Nothing is written any more when this returns."""


class Lane:
    """The pulls of one link."""

    def __init__(self) -> None:
        self.jobs: deque[Job] = deque()
        self.is_dropped = False
        self.moved_bytes = 0


class Job:
    """One pull and what it came to."""

    def __init__(self, lane: Lane, pull: Pull, on_end: Callable[[Job], None], *, makes_digest: bool) -> None:
        self.lane = lane
        self.pull = pull
        self.on_end = on_end
        self.error: OSError | ValueError | None = None
        self.is_over = False
        self._digest = xxhash.xxh3_64() if makes_digest else None

    @property
    def digest(self) -> int | None:
        """xxh3-64 of what has come, in the order of the message; None where nobody asked for it."""
        return self._digest.intdigest() if self._digest else None

    def run(self) -> int:
        """Take one step, in a thread."""
        moved_bytes = 0
        try:
            moved_bytes = 0 if self.lane.is_dropped else self.pull.step(self._digest)
        except (OSError, ValueError) as error:
            self.error = error
        self.is_over = self.error is not None or self.lane.is_dropped or self.pull.is_done
        if self.is_over:
            self.pull.close()
        return moved_bytes


class PullThreads:
    """The threads of one transport."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._name = name
        self._count = max(1, min(THREADS_MAX, len(os.sched_getaffinity(0)) // 2))
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._lanes: deque[Lane] = deque()  # those with jobs that no thread has in hand; the first is next
        self._ended: deque[Job] = deque()
        self._is_closing = False

    def submit(self, lane: Lane, pull: Pull, on_end: Callable[[Job], None], *, makes_digest: bool) -> None:
        """Begin; `on_end` is called on the loop when it is over or its lane was dropped, for a short pull at once."""
        job = Job(lane, pull, on_end, makes_digest=makes_digest)
        if pull.is_short:
            moved_bytes = job.run()
            assert job.is_over
            with self._changed:
                lane.moved_bytes += moved_bytes
            on_end(job)
            return
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._run, name=f"{self._name}-{number}", daemon=True)
                for number in range(self._count)
            ]
            for thread in self._threads:
                thread.start()
        with self._changed:
            if not lane.jobs:
                self._lanes.append(lane)
            lane.jobs.append(job)
            self._changed.notify()

    def drop(self, lane: Lane) -> None:
        """End every pull of the lane after the piece in hand."""
        with self._changed:
            lane.is_dropped = True

    async def aclose(self) -> None:
        """Every lane must have been dropped."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    def _put_back(self, job: Job) -> None:
        """The other links have their turn first, the other messages of its link do not."""
        if not job.lane.jobs:
            self._lanes.append(job.lane)
        job.lane.jobs.appendleft(job)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            moved_bytes = job.run()
            with self._changed:
                job.lane.moved_bytes += moved_bytes
                if job.is_over:
                    self._ended.append(job)
                    if len(self._ended) == 1:
                        self._loop.call_soon_threadsafe(self._tell)
                else:
                    self._put_back(job)

    def _next(self) -> Job | None:
        with self._changed:
            while not self._lanes:
                if self._is_closing:
                    return None
                self._changed.wait()
            lane = self._lanes.popleft()
            job = lane.jobs.popleft()
            if lane.jobs:
                self._lanes.append(lane)
            return job

    def _tell(self) -> None:
        with self._changed:
            ended, self._ended = self._ended, deque()
        for job in ended:
            job.on_end(job)
