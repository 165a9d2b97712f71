"""The prefill worker: pulls jobs from the work queue, computes, and acks when the KV has landed.

`PrefillIntake` decides, `PrefillWorker` does. A job is acked after its effect, so a worker that dies at any moment costs
a second delivery and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

import msgspec

from ..bus import subjects
from ..bus.base import Bus, BusError, Delivery, PulledJob, Subscription
from ..bus.jobs import JobLimits
from ..bus.messages import (
    Admitted,
    Cancel,
    Message,
    PlacedLoad,
    PrefillClaimed,
    PrefillDone,
    PrefillFailed,
    PrefillJob,
    PrefillReturned,
    Refused,
    WorkerCard,
    decode,
    encode,
    unpack_tokens,
)
from ..transport.base import HandoffKey
from .engines.base import Engine, EngineDead, EngineError, PrefillOutcome, PrefillTask
from .prefill_intake import AckAgain, Discard, Ending, GiveBack, Join, Leave, PrefillIntake, Take, is_for
from .prefill_lanes import LanePulls
from .prefill_order import JobOrder
from .router_clocks import RouterClocks
from .throughput import Throughput

log = logging.getLogger(__name__)
IN_PROGRESS_S = JobLimits().ack_wait_s / 3
HELD_S = 1.0  # a job that waits here for a slot so long may go to another worker
HELD_TICK_S = 0.25


class _DirectJob:
    """A job that came as a request and not through the queue: nothing to ack, and nowhere to give it back to."""

    ack_subject = ""
    delivery = 1
    behind = 0

    def __init__(self, payload: bytes) -> None:
        self.payload = payload

    async def ack(self) -> None: ...

    async def nak(self, delay_s: float = 0.0) -> None: ...

    async def in_progress(self) -> None: ...

    async def term(self, reason: str) -> None: ...


@dataclass(slots=True, eq=False)
class _Run:
    """A job at work, with every delivery of it that has come."""

    job: PrefillJob
    deliveries: list[PulledJob]
    deadline_s: float = math.inf  # on our clock
    task: asyncio.Task[PrefillOutcome] | None = None
    is_cancelled: bool = False
    held_s: float = 0.0  # since when it waits for a slot
    said_s: float = 0.0  # when the queue heard last that we have it

    @property
    def may_go_back(self) -> bool:
        """Once: each delivery counts, and the last ones are for workers that die."""
        return all(is_first_try(delivery) for delivery in self.deliveries)


def is_first_try(delivery: PulledJob) -> bool:
    """Only such a job is given back because others may have a slot."""
    return delivery.delivery == 1 and not isinstance(delivery, _DirectJob)


@dataclass(slots=True)
class PrefillCounts:
    """How jobs ended since the start, by outcome."""

    outcomes: dict[str, int] = field(default_factory=dict)
    kv_bytes: int = 0

    def add(self, outcome: str, kv_bytes: int = 0) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        self.kv_bytes += kv_bytes


class PrefillWorker:
    """Runs jobs in as many slots as the card says. `on_change` is called when its load has changed.

    A few jobs more than there are slots are held while the queue is long, so that there is a choice (`prefill_order.py`).
    """

    def __init__(
        self,
        bus: Bus,
        pool: str,
        card: WorkerCard,
        engine: Engine,
        *,
        handoff_timeout_s: float,
        in_progress_s: float = IN_PROGRESS_S,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bus = bus
        self._pool = pool
        self._card = card
        self._engine = engine
        self._handoff_timeout_s = handoff_timeout_s
        self._in_progress_s = in_progress_s
        self._on_change = on_change
        self._clock = clock
        self._router_clocks = RouterClocks()
        self._intake = PrefillIntake(card)
        self._runs: dict[tuple[str, int], _Run] = {}
        self._held: JobOrder[_Run] = JobOrder()
        self._active = 0  # jobs that have a slot
        self._lanes = LanePulls(bus, pool, card, room=self._room, handle=self._handle)
        self._tasks: asyncio.TaskGroup | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self.listening = asyncio.Event()
        self.throughput = Throughput()
        self.counts = PrefillCounts()

    async def run(self) -> None:
        """Serve until cancelled; then every job that is held is given back. Raises EngineDead."""
        subscriptions: list[Subscription] = []
        try:
            await self._serve(subscriptions)
        except (Exception, asyncio.CancelledError):  # A coroutine that is only thrown away can wait for nothing.
            await self._give_back_held()
            for subscription in subscriptions:
                await subscription.unsubscribe()
            raise

    async def _serve(self, subscriptions: list[Subscription]) -> None:
        try:
            async with asyncio.TaskGroup() as self._tasks:
                direct = subjects.prefill_direct(self._pool, self._card.worker_id)
                subscriptions.append(await self._bus.subscribe(subjects.cancel(self._pool), self._on_cancel))
                subscriptions.append(await self._bus.subscribe(direct, self._on_direct))
                subscriptions.append(await self._bus.subscribe(subjects.placed_all(self._pool), self._on_placed))
                self._lanes.start(self._tasks)
                self._tasks.create_task(self._keep_held(), name="keep-held")
                self.listening.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    self._intake.is_draining = True  # The group takes no more tasks.
        except* EngineDead as errors:
            raise EngineDead(str(errors.exceptions[0])) from errors

    async def drain(self) -> None:
        """Take nothing more; returns when the last job has ended."""
        self._intake.is_draining = True
        self._lanes.stop()
        await self._give_back_held()
        await self._idle.wait()

    @property
    def held(self) -> int:
        """Jobs that wait here for a slot."""
        return len(self._held)

    # Jobs come.

    def _room(self) -> int:
        """Jobs that could start now."""
        return 0 if self._intake.is_draining else self._card.slots - self._active - len(self._held)

    def _on_placed(self, delivery: Delivery) -> None:
        try:
            message = decode(delivery.payload)
        except msgspec.MsgspecError as error:
            log.warning("dropped a message about load that is none: %s", error)
            return
        if isinstance(message, PlacedLoad):
            self._router_clocks.heard(message.router_id, message.clock_s, self._clock())
            self._lanes.on_placed(message)

    def _on_direct(self, delivery: Delivery) -> None:
        job = _decode_job(delivery.payload)
        if job is None or self._tasks is None:
            return
        answer: Message = Admitted(job.request_id, job.attempt)
        if self._intake.is_draining or self._intake.running >= 2 * self._card.slots:
            reason = "draining" if self._intake.is_draining else "busy"
            answer = Refused(job.request_id, job.attempt, reason)
        elif not is_for(self._card, job):
            answer = Refused(job.request_id, job.attempt, "wrong_worker")
        else:
            self._tasks.create_task(self._handle(_DirectJob(delivery.payload)), name="direct job")
        if delivery.reply:
            self._bus.publish_nowait(delivery.reply, encode(answer))

    def _on_cancel(self, delivery: Delivery) -> None:
        try:
            message = decode(delivery.payload)
        except msgspec.MsgspecError:
            return
        if isinstance(message, Cancel):
            for key in self._intake.cancel(message.request_id, message.attempt):
                run = self._runs[key]
                run.is_cancelled = True
                if run.task is not None:
                    run.task.cancel()

    # Jobs are done.

    async def _handle(self, delivery: PulledJob) -> None:
        job = _decode_job(delivery.payload)
        if job is None:
            await _quietly(delivery.term("not a prefill job"))
            return
        now = self._clock()
        deadline_s = self._router_clocks.deadline_s(job, now)
        is_stray = self._room() <= 0 and not self._lanes.looks_ahead and is_first_try(delivery)
        verdict = self._intake.offer(job, delivery.delivery, deadline_s - now)
        match verdict:
            case Take() if is_stray:  # It came while the slots were filled by others: somebody may be idle.
                self._intake.ended(job, is_done=False)
                await self._settle(_Run(job, [delivery]), GiveBack("no slot is free", 0.0))
            case Take():
                run = self._runs[job.request_id, job.attempt] = _Run(job, [delivery], deadline_s)
                run.held_s = run.said_s = now
                self._idle.clear()
                self._held.add(job, run, deadline_s)
                self._claim(run)
                self._fill_slots()
            case Join():
                self._runs[job.request_id, job.attempt].deliveries.append(delivery)
            case AckAgain():
                await _quietly(delivery.ack())
            case GiveBack() | Discard():
                await self._settle(_Run(job, [delivery]), verdict)

    def _fill_slots(self) -> None:
        """Start what waits, as far as there are slots."""
        assert self._tasks is not None
        while not self._intake.is_draining and self._active < self._card.slots:
            run = self._held.pop()
            if run is None:
                break
            self._active += 1
            self._tasks.create_task(self._run_job(run), name=f"prefill {run.job.request_id}")
        self._lanes.room_changed()

    async def _keep_held(self) -> None:
        """What waits for a slot stays ours for a while; what nobody needs any more is dropped before the engine sees it."""
        while True:
            await asyncio.sleep(HELD_TICK_S)
            await self._look_at_held(self._clock())

    async def _look_at_held(self, now: float) -> None:
        for run in self._held.take_out(lambda run: self._is_over(run, now)):
            await self._end_held(run, self._over(run))
        for run in self._held.take_out(lambda run: now - run.held_s > HELD_S and run.may_go_back):
            await self._end_held(run, GiveBack("it waited for a slot here", 0.0))
        for run in self._held.items():
            if now - run.said_s > self._in_progress_s:
                run.said_s = now
                for delivery in run.deliveries:
                    await _quietly(delivery.in_progress())

    def _is_over(self, run: _Run, now: float) -> bool:
        return run.is_cancelled or run.deadline_s <= now

    def _over(self, run: _Run) -> Discard:
        return Discard("cancelled") if run.is_cancelled else Discard("its deadline has passed", "expired")

    async def _end_held(self, run: _Run, ending: Ending) -> None:
        """It waited for a slot and gets none here."""
        try:
            await self._settle(run, ending)
        finally:
            self._forget(run, is_done=False)

    async def _give_back_held(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                for run in self._held.take_out(lambda _: True):
                    await self._end_held(run, GiveBack("the worker stops", 0.0))

    def _forget(self, run: _Run, *, is_done: bool) -> None:
        del self._runs[run.job.request_id, run.job.attempt]
        self._intake.ended(run.job, is_done=is_done)
        self._on_change()
        if not self._runs:
            self._idle.set()

    async def _run_job(self, run: _Run) -> None:
        job = run.job
        log.debug("took a job", extra={"request_id": job.request_id, "handoff": job.handoff_token[:4].hex()})
        self._on_change()
        is_done = False
        try:
            if self._is_over(run, self._clock()):
                await self._settle(run, self._over(run))
                return
            ending = await self._compute(run)
            is_done = isinstance(ending, PrefillOutcome)
            await self._settle(run, ending)
        except (asyncio.CancelledError, EngineDead) as error:
            self._intake.is_draining = True  # Either ends the worker.
            if not is_done:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await self._settle(run, GiveBack(str(error) or "the worker stops", 0.0))
            raise
        finally:
            self._active -= 1
            self._forget(run, is_done=is_done)
            self._fill_slots()

    async def _compute(self, run: _Run) -> Ending:
        """Run the engine and tell the queue meanwhile that we are at it. Raises EngineDead."""
        run.task = asyncio.ensure_future(self._engine.prefill(self._task_of(run)))
        self.throughput.begin(self._clock())
        computed_tokens = None
        try:
            while not run.task.done():
                await asyncio.wait([run.task], timeout=self._in_progress_s)
                if not run.task.done():
                    for delivery in run.deliveries:
                        await _quietly(delivery.in_progress())
            if run.task.cancelled() and run.is_cancelled:
                return Discard("cancelled")
            outcome = run.task.result()
            computed_tokens = outcome.computed_tokens
            return outcome
        except EngineDead:
            raise
        except EngineError as error:
            return self._intake.failed(run.job, error, run.deadline_s - self._clock())
        finally:
            if not run.task.done():
                run.task.cancel()
                await asyncio.wait([run.task], timeout=1.0)
            if run.task.done() and not run.task.cancelled():
                run.task.exception()  # Nobody asks any more when we were cancelled in the same turn.
            self.throughput.end(self._clock(), computed_tokens)

    def _task_of(self, run: _Run) -> PrefillTask:
        job = run.job
        left_s = run.deadline_s - self._clock()
        return PrefillTask(
            request_id=job.request_id,
            key=HandoffKey(job.handoff_token, job.attempt, run.deliveries[0].delivery),
            token_ids=unpack_tokens(job.token_ids),
            decode_addresses=job.decode_addresses,
            decode_epoch=job.decode_epoch,
            fingerprint=job.fingerprint,
            decode_block_tokens=job.decode_block_tokens,
            timeout_s=max(0.1, min(left_s, self._handoff_timeout_s)),
            decode_ranks=job.decode_ranks,
        )

    def _claim(self, run: _Run) -> None:
        card, delivery = self._card, run.deliveries[0]
        self._tell(
            run.job,
            PrefillClaimed(
                request_id=run.job.request_id,
                attempt=run.job.attempt,
                delivery=delivery.delivery,
                worker_id=card.worker_id,
                epoch=card.epoch,
                ack_subject=delivery.ack_subject,
            ),
        )

    async def _settle(self, run: _Run, ending: Ending) -> None:
        """End every delivery of the job, then tell the router."""
        job = run.job
        match ending:
            case PrefillOutcome():
                self.counts.add("landed", ending.kv_bytes)
                for delivery in run.deliveries:
                    await _quietly(delivery.ack())
                self._tell(job, self._done_message(run, ending))
            case GiveBack(why, delay_s):
                self.counts.add("given_back")
                log.info("gave a job back: %s", why, extra={"request_id": job.request_id})
                for delivery in run.deliveries:
                    await _quietly(delivery.nak(delay_s))
                if all(isinstance(delivery, _DirectJob) for delivery in run.deliveries):
                    self._tell(job, PrefillFailed(job.request_id, job.attempt, "refused", why))
                else:
                    self._tell(job, PrefillReturned(job.request_id, job.attempt, self._card.worker_id))
            case Leave():
                self.counts.add("replaced")
            case Discard(why, reason):
                self.counts.add(reason or "cancelled")
                for delivery in run.deliveries:
                    await _quietly(delivery.term(why))
                if reason:
                    log.info("refused a job: %s", why, extra={"request_id": job.request_id})
                    self._tell(job, PrefillFailed(job.request_id, job.attempt, reason, why))

    def _done_message(self, run: _Run, outcome: PrefillOutcome) -> PrefillDone:
        return PrefillDone(
            request_id=run.job.request_id,
            attempt=run.job.attempt,
            delivery=run.deliveries[0].delivery,
            worker_id=self._card.worker_id,
            computed_tokens=outcome.computed_tokens,
            cached_tokens=outcome.cached_tokens,
            kv_bytes=outcome.kv_bytes,
        )

    def _tell(self, job: PrefillJob, message: Message) -> None:
        """To the owning router; what is lost while it is away it finds out by itself."""
        try:
            self._bus.publish_nowait(subjects.events(job.router_id), encode(message))
        except ValueError:
            log.warning("job of a router with an impossible id %r", job.router_id)


async def _quietly(call: Coroutine[None, None, None]) -> None:
    """A call to the queue that cannot fail us: without it the job comes again, and is dealt with again."""
    try:
        await call
    except BusError as error:
        log.info("the work queue did not answer: %s", error)


def _decode_job(payload: bytes) -> PrefillJob | None:
    try:
        message = decode(payload)
    except msgspec.MsgspecError as error:
        log.warning("dropped a prefill job that is none: %s", error)
        return None
    return message if isinstance(message, PrefillJob) else None
