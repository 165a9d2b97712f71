"""The prefill worker: pulls jobs from the work queue, computes, and acks when the KV has landed.

`PrefillIntake` decides, `PrefillWorker` does. A job is acked after its effect, so a worker that dies at any moment costs
a second delivery and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

import msgspec

from ..bus import subjects
from ..bus.base import Bus, BusError, Delivery, JobPuller, PulledJob, Subscription
from ..bus.jobs import JobLimits
from ..bus.messages import (
    Admitted,
    Cancel,
    Message,
    PrefillClaimed,
    PrefillDone,
    PrefillFailed,
    PrefillJob,
    Refused,
    WorkerCard,
    decode,
    encode,
    unpack_tokens,
)
from ..transport.base import HandoffKey
from .attempts import RecentAttempts
from .engines.base import BadTask, Engine, EngineDead, EngineError, HandoffFailed, PrefillOutcome, PrefillTask
from .throughput import Throughput

log = logging.getLogger(__name__)
IN_PROGRESS_S = JobLimits().ack_wait_s / 3
RETRY_DELAY_S = 1.0  # before a job whose decode worker could not be reached is tried again
PULLER_AGAIN_S = 1.0
ELSEWHERE_DELAY_S = 0.5  # times the delivery, before a job that only another worker can do is offered again


@dataclass(frozen=True, slots=True)
class Take:
    """Run it."""


@dataclass(frozen=True, slots=True)
class Join:
    """It runs here already: this delivery ends as the running one does."""


@dataclass(frozen=True, slots=True)
class AckAgain:
    """It was done here before; only the ack was lost."""


@dataclass(frozen=True, slots=True)
class GiveBack:
    """Another worker may do it."""

    why: str
    delay_s: float


@dataclass(frozen=True, slots=True)
class Leave:
    """A newer delivery of it runs elsewhere: say nothing to anybody."""


@dataclass(frozen=True, slots=True)
class Discard:
    """Nobody should do it. With a `reason` (of PrefillFailed) the router is told."""

    why: str
    reason: str = ""


Ending = PrefillOutcome | GiveBack | Leave | Discard
Verdict = Take | Join | AckAgain | GiveBack | Discard


class PrefillIntake:
    """What to do with each job that comes, and with each that failed."""

    def __init__(self, card: WorkerCard) -> None:
        self._card = card
        self._running: dict[tuple[str, int], None] = {}
        self._cancelled = RecentAttempts()
        self._done = RecentAttempts()
        self.is_draining = False

    @property
    def running(self) -> int:
        return len(self._running)

    def offer(self, job: PrefillJob, delivery: int, now_unix_s: float) -> Verdict:
        """Taken jobs run until `ended`."""
        key = (job.request_id, job.attempt)
        if self._cancelled.covers(*key):
            return Discard("cancelled")
        if key in self._running:
            return Join()
        if self._done.get(job.request_id) == job.attempt:
            return AckAgain()
        if job.deadline_unix_s <= now_unix_s:
            return Discard("its deadline has passed", "expired")
        if self.is_draining:
            return GiveBack("the worker stops", 0.0)
        if not is_for(self._card, job):
            return GiveBack("it is for another model or KV layout", ELSEWHERE_DELAY_S * delivery)
        if not job.token_ids or len(job.token_ids) % 4:
            return Discard(f"{len(job.token_ids)} bytes are no prompt of 4-byte token ids", "bad_job")
        self._running[key] = None
        return Take()

    def cancel(self, request_id: str, attempt: int) -> list[tuple[str, int]]:
        """Forget every attempt up to this one; those to stop."""
        self._cancelled.note(request_id, attempt)
        return [key for key in self._running if key[0] == request_id and key[1] <= attempt]

    def is_cancelled(self, job: PrefillJob) -> bool:
        return self._cancelled.covers(job.request_id, job.attempt)

    def ended(self, job: PrefillJob, *, is_done: bool) -> None:
        self._running.pop((job.request_id, job.attempt), None)
        if is_done:
            self._done.note(job.request_id, job.attempt)

    def failed(self, job: PrefillJob, error: EngineError, now_unix_s: float) -> GiveBack | Leave | Discard:
        """What becomes of a job that the engine could not do."""
        if self._cancelled.covers(job.request_id, job.attempt):
            return Discard("cancelled")
        if isinstance(error, BadTask):
            return Discard(str(error), "bad_job")
        if job.deadline_unix_s <= now_unix_s:
            return Discard("its deadline has passed", "expired")
        if not isinstance(error, HandoffFailed):
            return GiveBack(str(error), RETRY_DELAY_S)
        match error.reason:
            case "refused:stale_attempt":
                return Leave()
            case "cancelled":
                return Discard("the decode worker needs it no more")
            case "refused:unknown_token" | "refused:busy" | "link_lost" | "timeout" | "closing":
                return GiveBack(error.reason, RETRY_DELAY_S)  # It may not have made room yet, or be back soon.
            case reason:
                return Discard(reason, "refused")


class _DirectJob:
    """A job that came as a request and not through the queue: nothing to ack, and nowhere to give it back to."""

    ack_subject = ""
    delivery = 1

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
    task: asyncio.Task[PrefillOutcome] | None = None
    is_cancelled: bool = False


@dataclass(slots=True)
class PrefillCounts:
    """How jobs ended since the start, by outcome."""

    outcomes: dict[str, int] = field(default_factory=dict)
    kv_bytes: int = 0

    def add(self, outcome: str, kv_bytes: int = 0) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        self.kv_bytes += kv_bytes


class PrefillWorker:
    """Runs jobs in as many slots as the card says. `on_change` is called when its load has changed."""

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
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._bus = bus
        self._pool = pool
        self._card = card
        self._engine = engine
        self._handoff_timeout_s = handoff_timeout_s
        self._in_progress_s = in_progress_s
        self._on_change = on_change
        self._clock = clock
        self._wall_clock = wall_clock
        self._intake = PrefillIntake(card)
        self._runs: dict[tuple[str, int], _Run] = {}
        self._pulling: set[asyncio.Task[None]] = set()
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
            async with asyncio.TaskGroup() as self._tasks:
                direct = subjects.prefill_direct(self._pool, self._card.worker_id)
                subscriptions.append(await self._bus.subscribe(subjects.cancel(self._pool), self._on_cancel))
                subscriptions.append(await self._bus.subscribe(direct, self._on_direct))
                for slot in range(self._card.slots):
                    self._pulling.add(self._tasks.create_task(self._slot(), name=f"slot {slot}"))
                self.listening.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    self._intake.is_draining = True  # The group takes no more tasks.
        except* EngineDead as errors:
            raise EngineDead(str(errors.exceptions[0])) from errors
        finally:
            for subscription in subscriptions:
                await subscription.unsubscribe()

    async def drain(self) -> None:
        """Take nothing more; returns when the last job has ended."""
        self._intake.is_draining = True
        for task in list(self._pulling):
            task.cancel()
        await self._idle.wait()

    # Jobs come.

    async def _slot(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        puller = await self._open_puller()
        try:
            while not self._intake.is_draining:
                job = await self._pull(puller, task)
                if job is not None:
                    await self._handle(job)
        finally:
            self._pulling.discard(task)
            await puller.aclose()

    async def _open_puller(self) -> JobPuller:
        while True:
            try:
                return await self._bus.jobs.puller(subjects.prefill_jobs(self._pool))
            except BusError as error:
                log.warning("cannot pull from the work queue yet: %s", error)
                await asyncio.sleep(PULLER_AGAIN_S)

    async def _pull(self, puller: JobPuller, task: asyncio.Task[None]) -> PulledJob | None:
        """Only a slot that waits for a job is stopped by `drain`."""
        self._pulling.add(task)
        try:
            return await puller.pull()
        finally:
            self._pulling.discard(task)

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
        verdict = self._intake.offer(job, delivery.delivery, self._wall_clock())
        match verdict:
            case Take():
                await self._run_job(_Run(job, [delivery]))
            case Join():
                self._runs[job.request_id, job.attempt].deliveries.append(delivery)
            case AckAgain():
                await _quietly(delivery.ack())
            case GiveBack() | Discard():
                await self._settle(_Run(job, [delivery]), verdict)

    async def _run_job(self, run: _Run) -> None:
        job = run.job
        self._runs[job.request_id, job.attempt] = run
        log.debug("took a job", extra={"request_id": job.request_id, "handoff": job.handoff_token[:4].hex()})
        self._idle.clear()
        self._on_change()
        is_done = False
        try:
            self._claim(run)
            ending = await self._compute(run)
            is_done = isinstance(ending, PrefillOutcome)
            await self._settle(run, ending)
        except (asyncio.CancelledError, EngineDead) as error:
            if not is_done:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await self._settle(run, GiveBack(str(error) or "the worker stops", 0.0))
            raise
        finally:
            del self._runs[job.request_id, job.attempt]
            self._intake.ended(job, is_done=is_done)
            self._on_change()
            if not self._runs:
                self._idle.set()

    async def _compute(self, run: _Run) -> Ending:
        """Run the engine and tell the queue meanwhile that we are at it. Raises EngineDead."""
        run.task = asyncio.ensure_future(self._engine.prefill(self._task_of(run)))
        self.throughput.begin(self._clock())
        computed_tokens = 0
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
            return self._intake.failed(run.job, error, self._wall_clock())
        finally:
            if not run.task.done():
                run.task.cancel()
                await asyncio.wait([run.task], timeout=1.0)
            if run.task.done() and not run.task.cancelled():
                run.task.exception()  # Nobody asks any more when we were cancelled in the same turn.
            self.throughput.end(self._clock(), computed_tokens)

    def _task_of(self, run: _Run) -> PrefillTask:
        job = run.job
        left_s = job.deadline_unix_s - self._wall_clock()
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


def is_for(card: WorkerCard, job: PrefillJob) -> bool:
    """Whether a worker like this can do the job: same model, same KV, and as many ranks as decode was told of."""
    return (job.model, job.fingerprint, job.prefill_ranks) == (card.model, card.fingerprint, card.tp_size)


def _decode_job(payload: bytes) -> PrefillJob | None:
    try:
        message = decode(payload)
    except msgspec.MsgspecError as error:
        log.warning("dropped a prefill job that is none: %s", error)
        return None
    return message if isinstance(message, PrefillJob) else None
