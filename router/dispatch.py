"""Sends a request's jobs and turns the answers into the machine's next event."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from ..bus import subjects
from ..bus.base import Bus, BusDisconnected, BusError, NoResponders, QueueFull
from ..bus.ids import RouterId, WorkerId
from ..bus.messages import Admitted, DecodeJob, PrefillFailed, PrefillJob, Refused, decode, encode
from .generation import Overloaded
from .membership import Membership
from .metrics import RouterMetrics
from .placed import PlacedJobs
from .request import AskDecode, Instruction, PublishPrefill, RequestMachine
from .view import Member

log = logging.getLogger(__name__)

ADMISSION_TIMEOUT_S = 2.0
"""A live worker answers in a few ms; its loop may stall for up to a second while an engine starts a large step."""
DIRECT_TIMEOUT_S = 1.0


class Dispatch:
    """One router's way to the workers of its pool."""

    def __init__(
        self,
        bus: Bus,
        pool: str,
        router_id: RouterId,
        membership: Membership,
        metrics: RouterMetrics,
        *,
        placed: PlacedJobs,
        share_of: Callable[[str], float],
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self._bus = bus
        self._pool = pool
        self._router_id = router_id
        self._membership = membership
        self._metrics = metrics
        self._placed = placed
        self._share_of = share_of
        self._clock = clock
        self._wall_clock = wall_clock

    async def start(self) -> None:
        """Begin to hear of jobs that the queue has given up; the router that owns one is told."""
        await self._bus.jobs.watch_exhausted(self._on_exhausted)

    def _on_exhausted(self, payload: bytes) -> None:
        job = decode(payload)
        if isinstance(job, PrefillJob):
            message = PrefillFailed(job.request_id, job.attempt, "exhausted", "delivered in vain as often as allowed")
            self._bus.publish_nowait(subjects.events(job.router_id), encode(message))

    async def ask_decode(self, machine: RequestMachine, stream_id: int, ask: AskDecode) -> list[Instruction]:
        """Ask a decode worker to admit the request."""
        generation = machine.generation
        member = self._membership.view.get(ask.worker)
        if member is None:
            return machine.decode_silent(ask.attempt)
        job = DecodeJob(
            request_id=generation.request_id,
            attempt=ask.attempt,
            router_id=self._router_id,
            stream_id=stream_id,
            token_ids=generation.packed_tokens,
            sampling=generation.sampling,
            model=generation.model,
            time_left_s=max(generation.deadline_s - self._clock(), 0.0),
            handoff_token=ask.token,
            fingerprint=member.card.fingerprint,
            epoch=member.card.epoch,
            prefill_ranks=ask.prefill_ranks,
        )
        subject = subjects.decode_jobs(self._pool, ask.worker)
        try:
            answer = decode(await self._bus.request(subject, encode(job), timeout_s=ADMISSION_TIMEOUT_S))
        except NoResponders:
            machine.unreached(ask.attempt, ask.worker)
            self._membership.lost(ask.worker, "nobody listens")
            return machine.decode_silent(ask.attempt)
        except (BusError, msgspec.MsgspecError) as error:
            log.warning("no admission: %s", error, extra={"worker_id": ask.worker})
            self._membership.doubt(ask.worker)
            return machine.decode_silent(ask.attempt)
        match answer:
            case Admitted():
                return machine.admitted(ask.attempt)
            case Refused(reason=reason, detail=detail, retry_after_s=retry_after_s):
                self._metrics.refusals.labels(reason).inc()
                return machine.refused(ask.attempt, reason, detail, retry_after_s)
        return machine.decode_silent(ask.attempt)

    async def publish_prefill(
        self, machine: RequestMachine, stream_id: int, publish: PublishPrefill
    ) -> list[Instruction]:
        """Put the prefill job into the work queue; past a queue that does not answer, to a prefill worker itself."""
        generation = machine.generation
        member = self._membership.view.get(publish.worker)
        if member is None:
            return machine.worker_lost(publish.worker)
        now = self._clock()
        time_left_s = max(generation.deadline_s - now, 1.0)
        job = PrefillJob(
            request_id=generation.request_id,
            attempt=publish.attempt,
            router_id=self._router_id,
            token_ids=generation.packed_tokens,
            model=generation.model,
            handoff_token=publish.token,
            decode_worker=publish.worker,
            decode_epoch=member.card.epoch,
            decode_addresses=member.card.handoff_addresses,
            fingerprint=member.card.fingerprint,
            decode_block_tokens=member.card.block_tokens,
            deadline_unix_s=self._wall_clock() + time_left_s,
            decode_ranks=member.card.tp_size,
            prefill_ranks=publish.prefill_ranks,
            tenant=generation.tenant,
            share=self._share_of(generation.tenant),
            priority=generation.priority,
            time_left_s=time_left_s,
            sent_s=now,
        )
        payload = encode(job)
        lane = self._lane(publish.lane, job)
        self._placed.waits(
            stream_id,
            lane,
            generation.prompt_tokens,
            now,
            fingerprint=job.fingerprint,
            ranks=job.prefill_ranks,
        )
        try:
            sequence = await self._bus.jobs.publish(
                self._subject(lane, job),
                payload,
                job_id=f"{generation.request_id}.{publish.attempt}",
                ttl_s=time_left_s,
            )
        except QueueFull:
            return machine.not_published(publish.attempt, Overloaded("the prefill queue is full", retry_after_s=1.0))
        except (BusDisconnected, BusError) as error:
            log.warning("work queue away: %s", error, extra={"request_id": generation.request_id})
            if await self._send_directly(machine, payload, job, lane):
                self._metrics.queue_fallbacks.labels("direct").inc()
                return machine.published(publish.attempt, None)
            self._metrics.queue_fallbacks.labels("local").inc()
            return machine.not_published(publish.attempt, None)
        return machine.published(publish.attempt, sequence)

    async def delete_job(self, sequence: int) -> None:
        """Take a job out of the queue that nobody needs; it expires by itself when that fails."""
        try:
            await self._bus.jobs.delete(sequence)
        except BusError as error:
            log.info("job not deleted: %s", error)

    def _lane(self, wanted: WorkerId | None, job: PrefillJob) -> WorkerId | None:
        """The lane that the policy wants, if its worker takes work and can do this job."""
        member = self._membership.view.get(wanted) if wanted is not None else None
        return wanted if member is not None and _can_do(member, job) else None

    def _subject(self, lane: WorkerId | None, job: PrefillJob) -> str:
        if lane is not None:
            return subjects.prefill_lane(self._pool, lane)
        urgent, usual = subjects.JOB_CLASSES
        return subjects.prefill_jobs(self._pool, urgent if job.priority > 0 else usual)

    async def _send_directly(
        self, machine: RequestMachine, payload: bytes, job: PrefillJob, lane: WorkerId | None
    ) -> bool:
        members = [member for member in self._membership.view.members("prefill") if _can_do(member, job)]

        def rank(member: Member) -> tuple[bool, int, WorkerId]:
            load, worker = member.heartbeat.running + member.heartbeat.waiting, member.card.worker_id
            return worker != lane, load, worker

        for worker in [member.card.worker_id for member in sorted(members, key=rank)]:
            if not machine.offered(job.attempt, worker) or await self._is_taken(machine, payload, job, worker):
                return True
        return False

    async def _is_taken(self, machine: RequestMachine, payload: bytes, job: PrefillJob, worker: WorkerId) -> bool:
        """Ask one prefill worker. Without an answer it may have the job all the same, and may have died of it."""
        subject = subjects.prefill_direct(self._pool, worker)
        try:
            answer = decode(await self._bus.request(subject, payload, timeout_s=DIRECT_TIMEOUT_S))
        except NoResponders:
            machine.unreached(job.attempt, worker)
            self._membership.doubt(worker)
            return False
        except (BusError, msgspec.MsgspecError):
            self._membership.doubt(worker)
            return False
        if isinstance(answer, Refused):
            machine.returned(job.attempt, worker)
        return isinstance(answer, Admitted)


def _can_do(member: Member, job: PrefillJob) -> bool:
    card = member.card
    kv = (card.role, card.fingerprint, card.tp_size)
    return member.can_take_work and kv == ("prefill", job.fingerprint, job.prefill_ranks)
