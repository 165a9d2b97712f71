"""A decode worker without an engine: token frames at a given rate, faster than any engine on this machine could make them.

It keeps a decode worker's side of the bus contract (card, heartbeats, admission, frames; nothing is lost here, so nothing
is replayed) and has the router compute no prefill: its card shows no hand-off address, so every plan is local. For the
router it is a worker like any other. `python frame_source.py TOKENS_PER_S KV_BLOCKS`, with HOCKET_NATS and HOCKET_POOL.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
from collections.abc import Sequence

import msgspec
import uvloop

from hocket.bus import subjects
from hocket.bus.base import Delivery
from hocket.bus.ids import RouterId, WorkerId
from hocket.bus.messages import (
    FINISH_LENGTH,
    FINISH_NONE,
    Admitted,
    DecodeJob,
    Entry,
    Heartbeat,
    KvSnapshot,
    KvSnapshotRequest,
    Message,
    Ping,
    TokenFrame,
    WorkerCard,
    decode,
    encode,
    unpack_tokens,
)
from hocket.bus.nats_bus import NatsBus

FIRST_ID, IDS = 1000, 20_000
HEARTBEAT_S = 0.5
SETTLE_S = (
    0.3  # Frames begin so long after the last admission: all streams at once, none ends while another one starts.
)


def answer_tokens(prompt: Sequence[int], count: int) -> list[int]:
    """What it answers to a prompt."""
    return [_token(sum(prompt), index) for index in range(count)]


def _token(offset: int, index: int) -> int:
    return FIRST_ID + (offset + 7919 * index) % IDS


class _Stream:
    """One answer under way."""

    __slots__ = ("attempt", "made", "offset", "stream_id", "tokens_max")

    def __init__(self, job: DecodeJob) -> None:
        self.stream_id, self.attempt = job.stream_id, job.attempt
        self.offset = sum(unpack_tokens(job.token_ids))
        self.tokens_max = job.sampling.max_tokens
        self.made = 0

    def entry(self) -> Entry:
        """Its next token."""
        index = self.made
        self.made = index + 1
        finish = FINISH_LENGTH if self.made == self.tokens_max else FINISH_NONE
        return (self.stream_id, self.attempt, index, [_token(self.offset, index)], finish)


class FrameSource:
    """One worker; all streams of a router advance by one token in each frame."""

    def __init__(self, bus: NatsBus, pool: str, tokens_per_s: float, kv_blocks: int) -> None:
        self._bus = bus
        self._pool = pool
        self._tokens_per_s = tokens_per_s
        self._streams: dict[RouterId, list[_Stream]] = {}
        self._admitted_s = 0.0
        self.card = WorkerCard(
            worker_id=WorkerId(f"frames-{secrets.token_hex(4)}"),
            role="decode",
            epoch=secrets.randbits(63),
            model=os.environ["HOCKET_SERVED_NAME"],
            fingerprint="none",
            block_tokens=32,
            kv_blocks=kv_blocks,
            slots=kv_blocks,
            max_model_len=1 << 16,
        )

    async def run(self) -> None:
        """Serve until cancelled."""
        await self._bus.subscribe(subjects.decode_jobs(self._pool, self.card.worker_id), self._on_job)
        await self._bus.subscribe(subjects.control(self._pool, self.card.worker_id), self._on_control)
        await self._bus.registry.put(self.card)
        print(msgspec.json.encode({"ready": self.card.worker_id}).decode(), flush=True)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._beat(), name="heartbeats")
            tasks.create_task(self._make_frames(), name="frames")

    async def _beat(self) -> None:
        subject = subjects.load(self._pool, self.card.worker_id)
        while True:
            self._bus.publish_nowait(subject, encode(self._heartbeat()))
            await asyncio.sleep(HEARTBEAT_S)

    async def _make_frames(self) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            is_settled = loop.time() >= self._admitted_s + SETTLE_S
            made = sum(map(self._send_frame, list(self._streams))) if is_settled else 0
            now = loop.time()
            # What a busy moment cost is not made up for: the rate is a ceiling.
            due_s = max(due_s + made / self._tokens_per_s, now - 0.005)
            await asyncio.sleep(max(due_s - now, 0.0) if made else 0.001)

    def _send_frame(self, router: RouterId) -> int:
        streams = self._streams.pop(router)
        entries = [stream.entry() for stream in streams]
        if going_on := [stream for stream in streams if stream.made < stream.tokens_max]:
            self._streams[router] = going_on
        frame = TokenFrame(self.card.worker_id, self.card.epoch, entries)
        if not self._bus.publish_nowait(subjects.tokens(router), encode(frame)):
            raise RuntimeError("the bus took no more frames: the rate is too high for this machine")
        return len(entries)

    def _on_job(self, delivery: Delivery) -> None:
        job = decode(delivery.payload)
        assert isinstance(job, DecodeJob)
        self._answer(delivery, Admitted(job.request_id, job.attempt))
        self._admitted_s = asyncio.get_running_loop().time()
        self._streams.setdefault(job.router_id, []).append(_Stream(job))

    def _on_control(self, delivery: Delivery) -> None:
        match decode(delivery.payload):
            case Ping():
                self._answer(delivery, self._heartbeat())
            case KvSnapshotRequest():
                self._answer(delivery, KvSnapshot(self.card.worker_id, self.card.epoch, 0, b""))

    def _heartbeat(self) -> Heartbeat:
        running = sum(map(len, self._streams.values()))
        return Heartbeat(
            self.card.worker_id, self.card.epoch, "decode", running=running, kv_blocks_free=self.card.kv_blocks
        )

    def _answer(self, delivery: Delivery, message: Message) -> None:
        self._bus.publish_nowait(delivery.reply, encode(message))


async def main() -> None:
    """Run until SIGTERM."""
    bus = NatsBus(os.environ["HOCKET_NATS"], name="frame-source")
    await bus.connect()
    source = FrameSource(bus, os.environ["HOCKET_POOL"], float(sys.argv[1]), int(sys.argv[2]))
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(source.run(), name="serve")
        await stop.wait()
        serving.cancel()
    await bus.aclose()


if __name__ == "__main__":
    uvloop.run(main())
