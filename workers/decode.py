"""The decode worker: admits requests, runs them in the engine, and keeps their tokens until the router has them all.

`admission.Admission` decides, `DecodeWorker` does. Frames, replays and the repetition of ends are `bus.tokens.TokenOutbox`'s.
A request whose worker leaves or whose engine dies gets no end from here: the router sees the worker go and may start
it again elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from ..bus import subjects
from ..bus.base import Bus, Delivery, Subscription
from ..bus.ids import RequestId, RouterId
from ..bus.messages import (
    FINISH_ERROR,
    FINISH_NONE,
    Cancel,
    DecodeJob,
    EntryDetail,
    FinishAck,
    Message,
    Refused,
    ReplayRequest,
    Unknown,
    WorkerCard,
    decode,
    encode,
    unpack_tokens,
)
from ..bus.tokens import TokenOutbox
from .admission import Admission
from .engines.base import BadTask, DecodeTask, Engine, EngineDead, EngineError, StepOutput

log = logging.getLogger(__name__)
QUEUE_SHARE = 4  # a quarter of the slots may wait here: enough to refill a slot at once, too few to wait for long
LAST_ACKS_S = 2.0  # after the last end, before a stopping worker leaves a router that does not confirm


@dataclass(slots=True, eq=False)
class _Run:
    job: DecodeJob
    task: asyncio.Task[None] | None = None
    is_finished: bool = False  # its end was given to the outbox


class DecodeWorker:
    """Runs what it admitted until the end. `on_change` is called when its load has changed."""

    def __init__(
        self,
        bus: Bus,
        pool: str,
        card: WorkerCard,
        engine: Engine,
        *,
        handoff_timeout_s: float,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._bus = bus
        self._pool = pool
        self._card = card
        self._engine = engine
        self._handoff_timeout_s = handoff_timeout_s
        self._on_change = on_change
        self._admission = Admission(card, held_max=card.slots + max(1, card.slots // QUEUE_SHARE))
        self._outbox = TokenOutbox(bus, card.worker_id, card.epoch, on_router_gone=self._on_router_gone)
        self._runs: dict[str, _Run] = {}  # the newest attempt of each request
        self._tasks: asyncio.TaskGroup | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self.listening = asyncio.Event()

    async def run(self) -> None:
        """Serve until cancelled; then nothing runs any more. Raises EngineDead."""
        subscriptions: list[Subscription] = []
        try:
            async with asyncio.TaskGroup() as self._tasks:
                await self._outbox.start()
                jobs = subjects.decode_jobs(self._pool, self._card.worker_id)
                subscriptions.append(await self._bus.subscribe(subjects.cancel(self._pool), self._on_cancel))
                subscriptions.append(await self._bus.subscribe(jobs, self._on_job))
                self.listening.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    self._admission.is_draining = True  # The group takes no more tasks.
        except* EngineDead as errors:
            raise EngineDead(str(errors.exceptions[0])) from errors
        finally:
            for subscription in subscriptions:
                await subscription.unsubscribe()
            await self._outbox.aclose()

    async def drain(self) -> None:
        """Take nothing more; returns when the last request has ended and its router knows."""
        self._admission.is_draining = True
        await self._idle.wait()
        try:
            async with asyncio.timeout(LAST_ACKS_S):
                await self._outbox.wait_acknowledged()
        except TimeoutError:
            log.warning("left before a router had confirmed every end")

    # What routers say.

    def on_control(self, message: Message, delivery: Delivery) -> None:
        """The control messages that only a decode worker understands."""
        match message:
            case ReplayRequest():
                frame = self._outbox.replay(message)
                answer = encode(Unknown(message.request_id) if frame is None else frame)
                if delivery.reply:
                    self._bus.publish_nowait(delivery.reply, answer)
            case FinishAck():
                self._outbox.acknowledge(message)
            case _:
                log.warning("dropped a %s: not for a decode worker", type(message).__name__)

    def _on_job(self, delivery: Delivery) -> None:
        answer: Message
        try:
            job = decode(delivery.payload)
        except msgspec.MsgspecError as error:
            answer = Refused(RequestId(""), 0, "bad_job", str(error))
        else:
            answer = self._admit(job)
        if delivery.reply:
            self._bus.publish_nowait(delivery.reply, encode(answer))

    def _admit(self, job: Message) -> Message:
        if not isinstance(job, DecodeJob):
            return Refused(RequestId(""), 0, "bad_job", f"a {type(job).__name__} is no decode job")
        decision = self._admission.offer(job)
        if decision.is_new and self._tasks is not None:
            log.debug("admitted a request", extra={"request_id": job.request_id})
            before = self._stop(self._runs.get(job.request_id))
            self._outbox.open(job.router_id, job.stream_id, job.attempt)
            run = self._runs[job.request_id] = _Run(job)
            self._idle.clear()
            run.task = self._tasks.create_task(self._run(run, before), name=f"decode {job.request_id}")
            # Not by the task itself: cancelled in the same turn, it never begins.
            run.task.add_done_callback(lambda _: self._on_run_ended(run))
            self._on_change()
        return decision.answer

    def _on_cancel(self, delivery: Delivery) -> None:
        try:
            message = decode(delivery.payload)
        except msgspec.MsgspecError as error:
            log.warning("dropped a cancel that is none: %s", error)
            return
        if isinstance(message, Cancel) and self._admission.cancel(message.request_id, message.attempt) is not None:
            self._stop(self._runs[message.request_id])

    def _on_router_gone(self, router_id: RouterId) -> None:
        for run in list(self._runs.values()):
            if run.job.router_id == router_id:
                self._stop(run)

    def _stop(self, run: _Run | None) -> asyncio.Task[None] | None:
        """Nobody wants it any more; its task, to wait for."""
        if run is None or run.task is None:
            return None
        job = run.job
        self._outbox.forget(job.router_id, job.stream_id, job.attempt)
        run.task.cancel()
        return run.task

    # Running.

    async def _run(self, run: _Run, before: asyncio.Task[None] | None) -> None:
        job = run.job
        try:
            if before is not None:
                await asyncio.wait([before])  # An engine holds one attempt of a request at a time.
            async with asyncio.timeout(job.time_left_s):
                await self._engine.decode(self._task_of(job), lambda output: self._on_step(run, output))
            if not run.is_finished:
                self._fail(run, "engine_error", "the engine ended without an end")
        except TimeoutError:
            self._fail(run, "timeout", f"not finished within {job.time_left_s:.1f} s")
        except BadTask as error:
            self._fail(run, "bad_request", str(error))
        except EngineDead:
            raise
        except EngineError as error:
            self._fail(run, "engine_error", str(error))

    def _on_run_ended(self, run: _Run) -> None:
        self._admission.ended(run.job.request_id, run.job.attempt)
        if self._runs.get(run.job.request_id) is run:
            del self._runs[run.job.request_id]
        if not self._runs:
            self._idle.set()
        self._on_change()

    def _task_of(self, job: DecodeJob) -> DecodeTask:
        return DecodeTask(
            request_id=job.request_id,
            attempt=job.attempt,
            token_ids=unpack_tokens(job.token_ids),
            sampling=job.sampling,
            handoff_token=job.handoff_token,
            handoff_timeout_s=min(self._handoff_timeout_s, job.time_left_s),
            prefill_ranks=job.prefill_ranks,
        )

    def _on_step(self, run: _Run, output: StepOutput) -> None:
        job = run.job
        if output.computed_tokens is not None:
            log.debug("made the first token", extra={"request_id": job.request_id})
        run.is_finished = run.is_finished or output.finish != FINISH_NONE
        self._outbox.add(
            job.router_id,
            job.stream_id,
            job.attempt,
            output.token_ids,
            finish=output.finish,
            detail=_detail_of(output),
        )

    def _fail(self, run: _Run, code: str, why: str) -> None:
        if run.is_finished:
            return
        run.is_finished = True
        job = run.job
        log.info("request failed: %s", why, extra={"request_id": job.request_id})
        detail = EntryDetail(error_code=code, error=why)
        self._outbox.add(job.router_id, job.stream_id, job.attempt, [], finish=FINISH_ERROR, detail=detail)


def _detail_of(output: StepOutput) -> EntryDetail | None:
    """What most steps do not have."""
    if not output.logprobs and output.stop_token is None and output.computed_tokens is None:
        return None
    return EntryDetail(
        logprobs=output.logprobs,
        stop_token=output.stop_token,
        computed_tokens=output.computed_tokens,
        cached_tokens=output.cached_tokens,
    )
