"""The work queue in one process, with JetStream's semantics as measured: redelivery, dedup window, time to live, exhaustion."""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from . import subjects
from .base import BusDisconnected, BusError, QueueFull, QueueUnavailable, Room
from .jobs import DEDUP_WINDOW_S, PUBLISH_RETRY_S, JobLimits, check_job
from .jobs_pull import CONFIRM_TIMEOUT_S, CONFIRM_TRY_S, PULL_EXPIRES_S, one_job

if TYPE_CHECKING:
    from .memory_bus import MemoryBroker, MemoryBus

log = logging.getLogger(__name__)
T = TypeVar("T")


class _Stored:
    """A job in the store; `delivery` counts its deliveries, `timer` runs while it waits for an ack or a delay."""

    __slots__ = ("delivery", "is_out", "payload", "sequence", "subject", "timer")

    def __init__(self, sequence: int, subject: str, payload: bytes) -> None:
        self.sequence = sequence
        self.subject = subject
        self.payload = payload
        self.delivery = 0
        self.is_out = False
        self.timer: asyncio.TimerHandle | None = None


class _Lane:
    """The jobs of one subject and who waits for them."""

    def __init__(self) -> None:
        self.again: deque[_Stored] = deque()  # before new ones, as JetStream does
        self.fresh: deque[_Stored] = deque()
        self.waiting: dict[MemoryJobPuller, float] = {}  # who waits, in order -> until when


class MemoryStore:
    """The broker's side of the queue: what survives any bus."""

    def __init__(self, broker: MemoryBroker, limits: JobLimits) -> None:
        self._broker = broker
        self.limits = limits
        self.is_available = True  # False: as JetStream during an election
        self._jobs: dict[int, _Stored] = {}
        self._bytes = 0
        self._sequence = 0
        self._lanes: dict[str, _Lane] = {}
        self._recent: dict[str, tuple[int, float]] = {}  # job id -> sequence, until; in order of time
        self._expiry: list[tuple[float, int]] = []
        self._watchers: dict[MemoryWatch, None] = {}

    def put(self, subject: str, payload: bytes, job_id: str, ttl_s: float) -> int:
        """Store a job once; its sequence number."""
        now = self._broker.now()
        self._expire(now)
        while self._recent and next(iter(self._recent.values()))[1] <= now:
            del self._recent[next(iter(self._recent))]
        if job_id in self._recent:
            return self._recent[job_id][0]
        if len(self._jobs) >= self.limits.max_jobs or self._bytes + len(payload) > self.limits.max_bytes:
            raise QueueFull(f"the work queue is full: {len(self._jobs)} jobs, {self._bytes} B")
        self._sequence += 1
        job = _Stored(self._sequence, subject, payload)
        self._jobs[job.sequence] = job
        self._bytes += len(payload)
        self._recent[job_id] = (job.sequence, now + DEDUP_WINDOW_S)
        heapq.heappush(self._expiry, (now + ttl_s, job.sequence))
        self._lane(subject).fresh.append(job)
        self.dispatch()
        return job.sequence

    def remove(self, sequence: int) -> bool:
        """Acked, ended, deleted or expired."""
        job = self._jobs.pop(sequence, None)
        if job is None:
            return False
        self._bytes -= len(job.payload)
        if job.timer is not None:
            job.timer.cancel()
        return True

    def acked(self, sequence: int, bus: MemoryBus) -> None:
        """This bus says that the effect has happened."""
        self.remove(sequence)

    def payload(self, sequence: int) -> bytes | None:
        """A job that is stored."""
        job = self._jobs.get(sequence)
        return None if job is None else job.payload

    def extend(self, sequence: int) -> None:
        """Restart the wait for an ack."""
        job = self._jobs.get(sequence)
        if job is not None and job.is_out:
            self._start_timer(job, self.limits.ack_wait_s)

    def give_back(self, sequence: int, delay_s: float) -> None:
        """A nak: again now, or after a delay."""
        job = self._jobs.get(sequence)
        if job is None or not job.is_out:
            return
        if delay_s > 0:
            self._start_timer(job, delay_s)
        else:
            self._again(job)

    def _start_timer(self, job: _Stored, delay_s: float) -> None:
        if job.timer is not None:
            job.timer.cancel()
        job.timer = self._broker.loop.call_later(delay_s, self._again, job)

    def _again(self, job: _Stored) -> None:
        if job.timer is not None:
            job.timer.cancel()
            job.timer = None
        if job.sequence not in self._jobs:
            return
        job.is_out = False
        if job.delivery >= self.limits.max_deliver:
            self._report(job)
        else:
            self._lane(job.subject).again.append(job)
            self.dispatch()

    def _report(self, job: _Stored) -> None:
        """To one watcher, in turn; without one it stays until its time to live ends."""
        watch = next((watch for watch in self._watchers if self._broker.hears(watch.bus)), None)
        if watch is None:
            return
        del self._watchers[watch]
        self._watchers[watch] = None
        self._broker.deliver(watch.bus, watch.report, job.sequence, job.payload)

    def _lane(self, subject: str) -> _Lane:
        lane = self._lanes.get(subject)
        if lane is None:
            lane = self._lanes[subject] = _Lane()
        return lane

    def _expire(self, now: float) -> None:
        while self._expiry and self._expiry[0][0] <= now:
            self.remove(heapq.heappop(self._expiry)[1])

    def wait(self, subject: str, puller: MemoryJobPuller) -> None:
        """A puller has room for a job, and says so again before long."""
        self._lane(subject).waiting[puller] = self._broker.now() + PULL_EXPIRES_S
        self.dispatch()

    def leave(self, subject: str, puller: MemoryJobPuller) -> None:
        """A puller waits no more."""
        self._lane(subject).waiting.pop(puller, None)

    def forget(self, bus: MemoryBus) -> None:
        """Its connection is gone, and with it whatever it waited for."""
        for lane in self._lanes.values():
            for puller in [puller for puller in lane.waiting if puller.bus is bus]:
                del lane.waiting[puller]

    def repeat(self, is_lost: Callable[[], bool]) -> None:
        """As after a crash: deliveries that were not written down did not happen."""
        for job in list(self._jobs.values()):
            if job.is_out and is_lost():
                job.delivery -= 1
                self._again(job)

    @property
    def jobs(self) -> int:
        """Jobs that are stored."""
        self._expire(self._broker.now())
        return len(self._jobs)

    def dispatch(self) -> None:
        """Jobs to whoever waits and is connected, in order."""
        if not (self._broker.is_running and self.is_available):
            return
        now = self._broker.now()
        self._expire(now)
        for lane in self._lanes.values():
            while (job := self._first(lane)) is not None:
                puller = self._next_puller(lane, now)
                if puller is None:
                    break
                del lane.waiting[puller]
                self._broker.deliver(puller.bus, puller.deliver, self._hand_out(lane, job, puller.bus))

    def take(self, subject: str, bus: MemoryBus) -> MemoryJob | None:
        """The next job of a lane, if there is one now."""
        self._expire(self._broker.now())
        lane = self._lane(subject)
        job = self._first(lane)
        return None if job is None else self._hand_out(lane, job, bus)

    def _hand_out(self, lane: _Lane, job: _Stored, bus: MemoryBus) -> MemoryJob:
        (lane.again or lane.fresh).popleft()
        job.delivery += 1
        job.is_out = True
        self._start_timer(job, self.limits.ack_wait_s)
        return MemoryJob(bus, self, job, behind=len(lane.again) + len(lane.fresh))

    def _next_puller(self, lane: _Lane, now: float) -> MemoryJobPuller | None:
        for puller, until in list(lane.waiting.items()):
            if until <= now:
                del lane.waiting[puller]
            elif self._broker.hears(puller.bus):
                return puller
        return None

    def _first(self, lane: _Lane) -> _Stored | None:
        for queue in (lane.again, lane.fresh):
            while queue and queue[0].sequence not in self._jobs:
                queue.popleft()
            if queue:
                return queue[0]
        return None

    def watch(self, watch: MemoryWatch) -> None:
        """Take part in the reports."""
        self._watchers[watch] = None

    def unwatch(self, watch: MemoryWatch) -> None:
        """No more reports to it."""
        self._watchers.pop(watch, None)


class MemoryWatch:
    """One process's interest in exhausted jobs."""

    def __init__(self, bus: MemoryBus, store: MemoryStore, handler: Callable[[bytes], None]) -> None:
        self.bus = bus
        self.handler = handler
        self._store = store

    def report(self, sequence: int, payload: bytes) -> None:
        """Handle first, remove after, as on NATS; a handler's bug costs this report only."""
        try:
            self.handler(payload)
        except Exception:  # A handler's bug; the report stays stored.
            log.exception("the handler of an exhausted job failed")
            return
        self.bus.broker.send(self.bus, partial(self._store.remove, sequence))

    async def unsubscribe(self) -> None:
        """No report starts after this returns."""
        self._store.unwatch(self)


class MemoryJobQueue:
    """The work queue as one bus sees it."""

    def __init__(self, bus: MemoryBus, store: MemoryStore) -> None:
        self._bus = bus
        self._store = store
        self._pullers: dict[MemoryJobPuller, None] = {}

    @property
    def limits(self) -> JobLimits:
        """What the queue was made with."""
        return self._store.limits

    async def publish(self, subject: str, payload: bytes, *, job_id: str, ttl_s: float) -> int:
        """Store a job, trying again under the same id for `publish_timeout_s`; its sequence number."""
        check_job(payload, job_id, ttl_s, self.limits)
        if not self._bus.is_connected:
            raise BusDisconnected("no connection to the broker")
        return await confirmed(
            self._bus,
            lambda: self._store.put(subject, payload, job_id, ttl_s),
            f"job {job_id}",
            timeout_s=self.limits.publish_timeout_s,
            try_s=self.limits.publish_try_s,
        )

    async def take(self, subject: str) -> MemoryJob | None:
        """The next job of a lane if there is one now."""
        return await confirmed(self._bus, lambda: self._store.take(subject, self._bus), f"a job of {subject}")

    async def puller(self, subject: str, room: Room = one_job) -> MemoryJobPuller:
        """One open pull on the jobs of `subject`."""
        await self._bus.wait_connected(CONFIRM_TIMEOUT_S)
        puller = MemoryJobPuller(self._bus, self._store, subject, room)
        self._pullers[puller] = None
        return puller

    async def delete(self, sequence: int) -> bool:
        """Remove a job; False when it was not there."""
        return await confirmed(self._bus, lambda: self._store.remove(sequence), f"the end of job {sequence}")

    def nak_for(self, ack_subject: str, delay_s: float = 0.0) -> None:
        """Give a dead worker's job back."""
        if self._bus.is_connected:
            sequence = int(subjects.last_token(ack_subject))
            self._bus.broker.send(self._bus, partial(self._store.give_back, sequence, delay_s))

    def on_connected(self) -> None:
        """The broker may have forgotten who waits."""
        for puller in self._pullers:
            puller.ask()

    async def watch_exhausted(self, handler: Callable[[bytes], None]) -> MemoryWatch:
        """Call `handler(payload)` for each job delivered in vain."""
        await self._bus.wait_connected(CONFIRM_TIMEOUT_S)
        watch = MemoryWatch(self._bus, self._store, handler)
        self._store.watch(watch)
        return watch

    async def aclose(self) -> None:
        """Close every puller."""
        for puller in tuple(self._pullers):
            await puller.aclose()


class MemoryJobPuller:
    """One pull at a time."""

    def __init__(self, bus: MemoryBus, store: MemoryStore, subject: str, room: Room) -> None:
        self.bus = bus
        self._store = store
        self._subject = subject
        self._room = room
        self._has_asked = False
        self._waiter: asyncio.Future[MemoryJob] | None = None
        self._is_closed = False

    async def pull(self) -> MemoryJob:
        """Wait for the next job."""
        if self._waiter is not None or self._is_closed:
            raise ValueError("this puller is closed or somebody waits on it already")
        waiter: asyncio.Future[MemoryJob] = asyncio.get_running_loop().create_future()
        self._waiter = waiter
        try:
            while True:
                self.ask()
                await asyncio.wait([waiter], timeout=PULL_EXPIRES_S)
                if waiter.done():
                    return waiter.result()
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._give_back(waiter.result())  # It came in the same turn.
            raise
        finally:
            self._waiter = None
            self._has_asked = False
            self._leave()

    @property
    def outstanding(self) -> int:
        """Jobs that have been asked for and not been pulled yet."""
        return int(self._has_asked)

    def room_changed(self) -> None:
        """Wait for a job, or wait no more."""
        if self._has_asked != (self._room() > 0):
            self.ask()

    def ask(self) -> None:
        """Tell the broker that we wait, if we do and have room; else that we wait no more."""
        if self._waiter is None or self._waiter.done() or not self.bus.is_connected:
            return
        self._has_asked = self._room() > 0
        if self._has_asked:
            self.bus.broker.send(self.bus, partial(self._store.wait, self._subject, self))
        else:
            self._leave()

    def deliver(self, job: MemoryJob) -> None:
        """Called by the store."""
        if self._waiter is None or self._waiter.done():
            self._give_back(job)
        else:
            self._waiter.set_result(job)

    def _give_back(self, job: MemoryJob) -> None:
        self.bus.broker.send(self.bus, partial(self._store.give_back, job.sequence, 0.0))

    def _leave(self) -> None:
        self.bus.broker.send(self.bus, partial(self._store.leave, self._subject, self))

    async def aclose(self) -> None:
        """Wait no more."""
        self._is_closed = True
        self._leave()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(BusError("the puller was closed while somebody waited on it"))


class MemoryJob:
    """One delivery of one job."""

    __slots__ = ("_bus", "_delivery", "_payload", "_store", "behind", "sequence")

    def __init__(self, bus: MemoryBus, store: MemoryStore, job: _Stored, *, behind: int) -> None:
        self._bus = bus
        self._store = store
        self.sequence = job.sequence
        self._payload = job.payload
        self._delivery = job.delivery
        self.behind = behind

    @property
    def payload(self) -> bytes:
        """The job as it was published."""
        return self._payload

    @property
    def delivery(self) -> int:
        """1 for the first delivery of this job."""
        return self._delivery

    @property
    def ack_subject(self) -> str:
        """With it, anyone may nak on this worker's behalf."""
        return subjects.under("$MEM", "ACK", str(self._delivery), str(self.sequence))

    async def ack(self) -> None:
        """Returns when the queue has removed the job."""
        await confirmed(
            self._bus, partial(self._store.acked, self.sequence, self._bus), f"the ack of job {self.sequence}"
        )

    async def nak(self, delay_s: float = 0.0) -> None:
        """Give it back; unheard, it comes again after `ack_wait_s`."""
        if self._bus.is_connected:
            await asyncio.wait(
                [self._bus.broker.serve(self._bus, partial(self._store.give_back, self.sequence, delay_s))],
                timeout=CONFIRM_TRY_S,
            )

    async def in_progress(self) -> None:
        """Restart `ack_wait_s`."""
        if self._bus.is_connected:
            self._bus.broker.send(self._bus, partial(self._store.extend, self.sequence))

    async def term(self, reason: str) -> None:
        """Remove it without an effect."""
        await confirmed(self._bus, partial(self._store.remove, self.sequence), f"the end of job {self.sequence}")


async def confirmed(
    bus: MemoryBus,
    effect: Callable[[], T],
    what: str,
    *,
    timeout_s: float = CONFIRM_TIMEOUT_S,
    try_s: float = CONFIRM_TRY_S,
) -> T:
    """Have `effect` happen at the broker at least once, asking again until it answers. Raises QueueUnavailable."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while True:
        if bus.is_connected:
            answer = bus.broker.serve(bus, effect)
            await asyncio.wait([answer], timeout=max(0.0, min(try_s, deadline - loop.time())))
            if answer.done():
                return answer.result()
        if loop.time() + PUBLISH_RETRY_S >= deadline:
            raise QueueUnavailable(f"the broker did not confirm {what} in {timeout_s:g} s")
        await asyncio.sleep(PUBLISH_RETRY_S)
