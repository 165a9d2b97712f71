"""The work queue of prefill jobs, as its users see it: the oldest job goes to whoever has pulled for longest."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from ..bus.ids import WorkerId
from .pool import SimWorker

Job = TypeVar("Job")


class PrefillQueue(Generic[Job]):
    """With lanes: a job for one worker waits for it, until it is given to all."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()
        self._lanes: dict[WorkerId, deque[Job]] = {}
        self._pulls: deque[SimWorker] = deque()

    def pull(self, worker: SimWorker, count: int = 1) -> None:
        """The worker has so many more free slots."""
        self._pulls.extend([worker] * count)

    def publish(self, job: Job, lane: WorkerId | None = None) -> None:
        """For anybody, or for one worker first."""
        (self._jobs if lane is None else self._lanes.setdefault(lane, deque())).append(job)

    def give_to_all(self, job: Job, lane: WorkerId) -> None:
        """Its worker has had its time; a job that it has taken is left alone."""
        if job in self._lanes[lane]:
            self._lanes[lane].remove(job)
            self._jobs.append(job)

    def next(self) -> tuple[Job, SimWorker] | None:
        """A job and who gets it, if there are both."""
        for lane, waiting in self._lanes.items():
            if waiting and (worker := next((w for w in self._pulls if w.worker_id == lane), None)):
                self._pulls.remove(worker)
                return waiting.popleft(), worker
        return (self._jobs.popleft(), self._pulls.popleft()) if self._jobs and self._pulls else None
