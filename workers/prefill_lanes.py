"""Where a prefill worker's jobs come from: its own lane, the shared lanes, and other workers' lanes when they wait too long.

One request stands open at the server for each of its own lane and the shared ones, for as many jobs as there are free
slots. While a lane is longer than what came from it, `AHEAD_MAX` more are asked for, so that there is a choice of what goes next.
Jobs of other lanes are taken one by one, when a router says that they are overdue and a slot is free.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ..bus import subjects
from ..bus.base import Bus, BusError, JobPuller, PulledJob
from ..bus.ids import WorkerId
from ..bus.messages import PlacedLoad, WorkerCard

log = logging.getLogger(__name__)

AHEAD_MAX = 8  # jobs held beyond the slots, and no more than there are slots
PULLER_AGAIN_S = 1.0


@dataclass(slots=True, eq=False)
class _Lane:
    subject: str
    puller: JobPuller | None = None
    is_long: bool = False  # jobs were left in it when the last one came


class LanePulls:
    """`room()` says how many jobs could start now; each job goes through `handle`."""

    def __init__(
        self,
        bus: Bus,
        pool: str,
        card: WorkerCard,
        *,
        room: Callable[[], int],
        handle: Callable[[PulledJob], Awaitable[None]],
    ) -> None:
        self._bus = bus
        self._pool = pool
        self._card = card
        self._room = room
        self._handle = handle
        self._ahead = min(AHEAD_MAX, card.slots)
        own = subjects.prefill_lane(pool, card.worker_id)
        shared = (subjects.prefill_jobs(pool, job_class) for job_class in subjects.JOB_CLASSES)
        self._lanes = [_Lane(subject) for subject in (own, *shared)]
        self._overdue: dict[WorkerId, int] = {}
        self._has_overdue = asyncio.Event()
        self._pulls: list[asyncio.Task[None]] = []

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Begin to pull, in `tasks`."""
        self._pulls = [tasks.create_task(self._feed(lane), name=f"pull {lane.subject}") for lane in self._lanes]
        self._pulls.append(tasks.create_task(self._steal(), name="steal"))

    def stop(self) -> None:
        """Pull nothing more."""
        for task in self._pulls:
            task.cancel()

    def room_changed(self) -> None:
        """A slot was taken or has come free."""
        for lane in self._lanes:
            if lane.puller is not None:
                lane.puller.room_changed()

    def on_placed(self, placed: PlacedLoad) -> None:
        """What a router says of the jobs that wait: those that are overdue in lanes of others are anyone's."""
        for worker, lane in placed.lanes.items():
            is_ours = (lane.fingerprint, lane.ranks) == (self._card.fingerprint, self._card.tp_size)
            if lane.overdue and is_ours and worker not in ("", self._card.worker_id):
                self._overdue[worker] = lane.overdue
        if self._overdue:
            self._has_overdue.set()

    @property
    def looks_ahead(self) -> bool:
        """More jobs wait in some lane than there are slots: nobody is idle for want of those that are held here."""
        return any(lane.is_long for lane in self._lanes)

    def _room_of(self, lane: _Lane) -> int:
        """For one job there may be a request in every lane; what the others have asked for is not asked for twice."""
        room = self._room() + (self._ahead if self.looks_ahead else 0)
        if room <= 0:
            return 0
        asked = sum(other.puller.outstanding for other in self._lanes if other is not lane and other.puller is not None)
        return max(1, room - asked)

    async def _feed(self, lane: _Lane) -> None:
        puller = lane.puller = await self._open(lane)
        try:
            while True:
                job = await puller.pull()
                lane.is_long = job.behind > 0
                await self._handle(job)
        finally:
            lane.puller = None
            await puller.aclose()

    async def _open(self, lane: _Lane) -> JobPuller:
        while True:
            try:
                return await self._bus.jobs.puller(lane.subject, lambda: self._room_of(lane))
            except BusError as error:
                log.warning("cannot pull from the work queue yet: %s", error)
                await asyncio.sleep(PULLER_AGAIN_S)

    async def _steal(self) -> None:
        """Who has no slot free now leaves them to others; while they are overdue the router repeats it."""
        while True:
            await self._has_overdue.wait()
            self._has_overdue.clear()
            while self._overdue and self._room() > 0:
                worker, jobs = self._overdue.popitem()
                try:
                    job = await self._bus.jobs.take(subjects.prefill_lane(self._pool, worker))
                except BusError as error:
                    log.info("nothing taken from the lane of %s: %s", worker, error)
                    continue
                if job is not None:
                    if jobs > 1:
                        self._overdue[worker] = jobs - 1
                    await self._handle(job)
            self._overdue.clear()
