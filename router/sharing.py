"""Tells the other routers and the prefill workers what this router has placed, and hears the others.

Heartbeats are up to half a second old and count requests; a burst that several routers place in that time would all go to
the worker that looked idle to each of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping

import msgspec

from ..bus import subjects
from ..bus.base import Bus, Delivery
from ..bus.ids import RouterId, WorkerId
from ..bus.messages import LaneLoad, PlacedLoad, decode, encode
from .placed import OtherRouters, PlacedJobs
from .view import ClusterView

log = logging.getLogger(__name__)

SAY_S = 0.5
CHANGE_GAP_S = 0.02  # between two messages that a change causes
CHANGE_GAP_PER_WORKER_S = 0.0002  # 1,000 decode workers are 30 kB
OVERDUE_TICK_S = 0.1  # while jobs wait in lanes: so much later than due they are said to be overdue

Tenants = Mapping[str, tuple[int, int]]


class LoadSharing:
    """`on_others(tenants)` is called when another router has spoken; `tenants()` says what ours hold."""

    def __init__(
        self,
        bus: Bus,
        pool: str,
        router_id: RouterId,
        view: ClusterView,
        *,
        lane_wait_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._bus = bus
        self._pool = pool
        self._router_id = router_id
        self._view = view
        self._clock = clock
        self._changed = asyncio.Event()
        self.jobs = PlacedJobs(lane_wait_s=lane_wait_s)
        self.others = OtherRouters()
        self.tenants: Callable[[], Tenants] = dict
        self.on_others: Callable[[Tenants], None] = lambda tenants: None

    async def start(self) -> None:
        """Begin to hear."""
        await self._bus.subscribe(subjects.placed_all(self._pool), self._on_placed)

    async def run(self) -> None:
        """Speak until cancelled. Who is alone has little to say before anything is overdue."""
        said_s = -SAY_S
        try:
            while True:
                now = self._clock()
                self._share(self.others.expire(now))
                placed = self._placed(now)
                is_news = self._changed.is_set() and len(self.others) > 0
                if is_news or now - said_s >= SAY_S or any(lane.overdue for lane in placed.lanes.values()):
                    said_s = now
                    self._changed.clear()
                    self._publish(placed)
                gap_s = CHANGE_GAP_S + CHANGE_GAP_PER_WORKER_S * len(placed.decode)
                await asyncio.sleep(gap_s)
                await self._wait_news(OVERDUE_TICK_S if len(self.jobs) else SAY_S - gap_s)
        finally:
            self._publish(PlacedLoad(self._router_id, has_left=True))

    async def _wait_news(self, timeout_s: float) -> None:
        if not len(self.others):
            await asyncio.sleep(max(timeout_s, CHANGE_GAP_S))
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    def changed(self) -> None:
        """Something was placed or has ended: say so soon."""
        self._changed.set()

    def lanes(self) -> dict[WorkerId, LaneLoad]:
        """Our jobs that nobody has claimed, by prefill worker; "": the shared lane."""
        return self.jobs.loads(self._clock(), self._can_take_work)

    def _placed(self, now: float) -> PlacedLoad:
        decode_load = {
            member.card.worker_id: (len(member.in_flight), member.in_flight_blocks)
            for member in self._view.members("decode")
            if member.in_flight
        }
        lanes = self.jobs.loads(now, self._can_take_work)
        return PlacedLoad(self._router_id, decode_load, lanes, dict(self.tenants()), clock_s=now)

    def _publish(self, placed: PlacedLoad) -> None:
        self._bus.publish_nowait(subjects.placed(self._pool, self._router_id), encode(placed))

    def _can_take_work(self, worker: WorkerId) -> bool:
        member = self._view.get(worker)
        return member is not None and member.can_take_work

    def _on_placed(self, delivery: Delivery) -> None:
        try:
            placed = decode(delivery.payload)
        except msgspec.MsgspecError as error:
            log.warning("dropped a message about load that is none: %s", error)
            return
        if isinstance(placed, PlacedLoad) and placed.router_id != self._router_id:
            routers = len(self.others)
            self._share(self.others.heard(placed, self._clock()))
            if len(self.others) > routers:
                self.changed()  # It should know us at once.
            self.on_others(self.others.tenants())

    def _share(self, workers: set[WorkerId]) -> None:
        for worker in workers:
            self._view.share(worker, *self.others.decode(worker))
