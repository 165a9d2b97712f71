"""A router of few lines: sends jobs, collects frames by the rules (newest attempt, next index), acknowledges ends."""

from __future__ import annotations

import asyncio
import itertools
import os
from dataclasses import dataclass, field

from hocket.bus import subjects
from hocket.bus.base import Bus, Delivery
from hocket.bus.ids import HandoffToken, RequestId, RouterId, WorkerId
from hocket.bus.messages import (
    FINISH_NONE,
    Cancel,
    DecodeJob,
    EntryDetail,
    FinishAck,
    Heartbeat,
    KvEvents,
    LaneLoad,
    Message,
    PlacedLoad,
    PrefillJob,
    SamplingParams,
    WorkerCard,
    decode,
    decode_frame,
    encode,
    pack_tokens,
)


@dataclass
class Stream:
    """One answer as its client would see it."""

    request_id: RequestId
    stream_id: int
    attempt: int
    token_ids: list[int] = field(default_factory=list)
    finish: int = FINISH_NONE
    details: list[EntryDetail] = field(default_factory=list)
    first: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class ScriptedRouter:
    """`answer` does what a router does for one request; the parts of it are there to do it wrong."""

    def __init__(self, bus: Bus, pool: str = "main", *, acknowledges: bool = True) -> None:
        self.bus = bus
        self.pool = pool
        self.router_id = RouterId(f"router-{os.urandom(4).hex()}")
        self.streams: dict[int, Stream] = {}
        self.events: list[Message] = []
        self.load: list[Message] = []
        self.kv_events: list[KvEvents] = []
        self.frames = 0
        self.drops_frames = False
        self._acknowledges = acknowledges
        self._numbers = itertools.count(1)
        self._changed = asyncio.Event()

    async def start(self) -> None:
        await self.bus.subscribe(subjects.tokens(self.router_id), self._on_frame)
        await self.bus.subscribe(subjects.events(self.router_id), lambda d: self._note(self.events, d))
        await self.bus.subscribe(subjects.load_all(self.pool), lambda d: self._note(self.load, d))
        await self.bus.subscribe(subjects.kv_events_all(self.pool), self._on_kv_events)

    def _note(self, messages: list[Message], delivery: Delivery) -> None:
        messages.append(decode(delivery.payload))
        self._changed.set()

    def _on_kv_events(self, delivery: Delivery) -> None:
        message = decode(delivery.payload)
        assert isinstance(message, KvEvents)
        self.kv_events.append(message)

    def _on_frame(self, delivery: Delivery) -> None:
        frame = decode_frame(delivery.payload)
        self.frames += 1
        if self.drops_frames:
            return
        for place, (stream_id, attempt, index, token_ids, finish) in enumerate(frame.entries):
            stream = self.streams.get(stream_id)
            if stream is None or attempt != stream.attempt:
                continue
            new = token_ids[len(stream.token_ids) - index :] if index <= len(stream.token_ids) else None
            if new is None:
                continue
            stream.token_ids += new
            if new:
                stream.first.set()
            if detail := frame.details.get(place):
                stream.details.append(detail)
            if finish != FINISH_NONE:
                stream.finish = finish
                stream.ended.set()
                if self._acknowledges:
                    ack = FinishAck(self.router_id, [(stream_id, attempt)])
                    self.bus.publish_nowait(subjects.control(self.pool, frame.worker_id), encode(ack))

    async def wait_for(self, kind: type[Message], timeout_s: float = 5.0, *, messages: str = "events") -> Message:
        """The first event of this kind, also if it came already."""
        async with asyncio.timeout(timeout_s):
            while True:
                for message in getattr(self, messages):
                    if isinstance(message, kind):
                        return message
                self._changed.clear()
                await self._changed.wait()

    def job(
        self,
        card: WorkerCard,
        prompt: list[int],
        sampling: SamplingParams,
        *,
        token: bytes | None = None,
        **changes: object,
    ) -> DecodeJob:
        """A job with a stream of its own; `changes` are fields of DecodeJob."""
        settings: dict[str, object] = {
            "request_id": RequestId(os.urandom(16).hex()),
            "attempt": 1,
            "router_id": self.router_id,
            "stream_id": next(self._numbers),
            "token_ids": pack_tokens(prompt),
            "sampling": sampling,
            "model": card.model,
            "time_left_s": 30.0,
            "handoff_token": HandoffToken(token) if token else None,
            "fingerprint": card.fingerprint,
            "epoch": card.epoch,
        }
        job = DecodeJob(**(settings | changes))  # type: ignore[arg-type]  # each test gives what the field wants
        stream = self.streams.get(job.stream_id)
        if stream is None:
            self.streams[job.stream_id] = Stream(job.request_id, job.stream_id, job.attempt)
        else:
            stream.attempt = job.attempt
        return job

    async def ask(self, card: WorkerCard, job: DecodeJob) -> Message:
        return decode(
            await self.bus.request(subjects.decode_jobs(self.pool, card.worker_id), encode(job), timeout_s=2.0)
        )

    async def control(self, card: WorkerCard, message: Message) -> bytes:
        return await self.bus.request(subjects.control(self.pool, card.worker_id), encode(message), timeout_s=2.0)

    def prefill_job(self, card: WorkerCard, job: DecodeJob, **changes: object) -> PrefillJob:
        settings: dict[str, object] = {
            "request_id": job.request_id,
            "attempt": job.attempt,
            "router_id": self.router_id,
            "token_ids": job.token_ids,
            "model": job.model,
            "handoff_token": job.handoff_token,
            "decode_worker": card.worker_id,
            "decode_epoch": card.epoch,
            "decode_addresses": card.handoff_addresses,
            "fingerprint": card.fingerprint,
            "deadline_unix_s": 0.0,  # of a clock that nobody asks
            "time_left_s": 30.0,
        }
        return PrefillJob(**(settings | changes))  # type: ignore[arg-type]  # each test gives what the field wants

    async def publish(self, job: PrefillJob, subject: str = "") -> int:
        job_id = f"{job.request_id}.{job.attempt}"
        subject = subject or subjects.prefill_jobs(self.pool)
        return await self.bus.jobs.publish(subject, encode(job), job_id=job_id, ttl_s=30.0)

    def say_overdue(self, card: WorkerCard, lane: WorkerId, jobs: int) -> None:
        load = LaneLoad(jobs, 100 * jobs, jobs, card.fingerprint)
        placed = PlacedLoad(self.router_id, lanes={lane: load})
        self.bus.publish_nowait(subjects.placed(self.pool, self.router_id), encode(placed))

    def cancel(self, job: DecodeJob) -> None:
        self.bus.publish_nowait(subjects.cancel(self.pool), encode(Cancel(job.request_id, job.attempt)))

    async def begin(
        self, card: WorkerCard, token_ids: list[int], sampling: SamplingParams, subject: str = "", **changes: object
    ) -> tuple[DecodeJob, Stream]:
        """Admitted by the decode worker, and its prefill job in the queue; `changes` are fields of PrefillJob."""
        job = self.job(card, token_ids, sampling, token=os.urandom(16))
        answer = await self.ask(card, job)
        assert type(answer).__name__ == "Admitted", answer
        await self.publish(self.prefill_job(card, job, **changes), subject)
        return job, self.streams[job.stream_id]

    async def answer(self, card: WorkerCard, token_ids: list[int], sampling: SamplingParams) -> list[int]:
        _, stream = await self.begin(card, token_ids, sampling)
        async with asyncio.timeout(20):
            await stream.ended.wait()
        return stream.token_ids


def heartbeats(router: ScriptedRouter, card: WorkerCard) -> list[Heartbeat]:
    return [beat for beat in router.load if isinstance(beat, Heartbeat) and beat.worker_id == card.worker_id]
