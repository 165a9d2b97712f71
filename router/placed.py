"""Work that is placed and has not ended: our prefill jobs in the lanes of the queue, and what other routers say of theirs. Pure.

Nobody asks the server how long the queue is: a router knows which of its own jobs nobody has claimed, and the others tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..bus.ids import RouterId, WorkerId
from ..bus.messages import LaneLoad, PlacedLoad

SHARED = WorkerId("")
"""In place of a prefill worker: the shared lane."""
SILENT_S = 2.0  # four messages missed: the router and its work are gone


@dataclass(slots=True)
class _Job:
    lane: WorkerId
    tokens: int
    fingerprint: str
    ranks: int
    since_s: float
    is_waiting: bool = True


class PlacedJobs:
    """Our prefill jobs until their end, by stream. A job is overdue in its lane after `lane_wait_s`."""

    def __init__(self, *, lane_wait_s: float) -> None:
        self._lane_wait_s = lane_wait_s
        self._jobs: dict[int, _Job] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def waits(
        self, stream_id: int, lane: WorkerId | None, tokens: int, now: float, *, fingerprint: str, ranks: int
    ) -> None:
        """A job is in the queue, in the lane of a prefill worker or (None) in the shared one."""
        self._jobs[stream_id] = _Job(lane or SHARED, tokens, fingerprint, ranks, now)

    def sync(self, stream_id: int, *, is_open: bool, is_unclaimed: bool) -> bool:
        """What its machine says now; whether that is new. A job that waits again has waited long enough."""
        job = self._jobs.get(stream_id)
        if job is None or (is_open and is_unclaimed == job.is_waiting):
            return False
        if not is_open:
            del self._jobs[stream_id]
            return True
        job.is_waiting = is_unclaimed
        if is_unclaimed:
            job.since_s = float("-inf")
        return True

    def loads(self, now: float, can_take_work: Callable[[WorkerId], bool]) -> dict[WorkerId, LaneLoad]:
        """What waits in each lane. Where the lane's worker cannot take it, it is overdue at once."""
        sums: dict[WorkerId, list[int]] = {}
        last: dict[WorkerId, _Job] = {}
        for job in self._jobs.values():
            if not job.is_waiting:
                continue
            load = sums.setdefault(job.lane, [0, 0, 0])
            load[0] += 1
            load[1] += job.tokens
            if job.lane != SHARED:
                load[2] += now - job.since_s >= self._lane_wait_s or not can_take_work(job.lane)
            last[job.lane] = job
        return {
            lane: LaneLoad(jobs, tokens, overdue, last[lane].fingerprint, last[lane].ranks)
            for lane, (jobs, tokens, overdue) in sums.items()
        }


class OtherRouters:
    """What each other router said last, summed up."""

    def __init__(self) -> None:
        self._heard: dict[RouterId, tuple[PlacedLoad, float]] = {}
        self._waiting: dict[WorkerId, int] | None = None  # None: another sum since

    def __len__(self) -> int:
        return len(self._heard)

    def heard(self, placed: PlacedLoad, now: float) -> set[WorkerId]:
        """Decode workers whose sum may be another one now."""
        self._waiting = None
        before = self._heard.pop(placed.router_id, None)
        if not placed.has_left:
            self._heard[placed.router_id] = placed, now
        return {*placed.decode, *(before[0].decode if before else ())}

    def expire(self, now: float) -> set[WorkerId]:
        """Forget the routers that are silent."""
        self._waiting = None
        silent = [router for router, (_, seen_s) in self._heard.items() if now - seen_s > SILENT_S]
        return {worker for router in silent for worker in self._heard.pop(router)[0].decode}

    def decode(self, worker: WorkerId) -> tuple[int, int]:
        """Streams on a decode worker, and the KV blocks they may need."""
        return _sums(placed.decode.get(worker) for placed, _ in self._heard.values())

    def waiting(self) -> dict[WorkerId, int]:
        """By prefill worker, or `SHARED`: prompt tokens of jobs in its lane that nobody has claimed; none has no entry."""
        if self._waiting is None:
            self._waiting = {}
            for placed, _ in self._heard.values():
                for lane, load in placed.lanes.items():
                    self._waiting[lane] = self._waiting.get(lane, 0) + load.tokens
        return self._waiting

    def tenants(self) -> dict[str, tuple[int, int]]:
        """By tenant: prompt tokens that wait for prefill, KV blocks in flight."""
        names = {name for placed, _ in self._heard.values() for name in placed.tenants}
        return {name: _sums(placed.tenants.get(name) for placed, _ in self._heard.values()) for name in sorted(names)}


def _sums(pairs: Iterable[tuple[int, int] | None]) -> tuple[int, int]:
    first = second = 0
    for pair in pairs:
        if pair is not None:
            first, second = first + pair[0], second + pair[1]
    return first, second
