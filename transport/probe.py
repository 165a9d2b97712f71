"""How fast a link is: messages from scratch memory into scratch memory, beside the hand-offs and never into KV blocks.

The prefill side (`Prober`) announces each batch of messages and sends it when the decode side (`ProbeTarget`) has posted its
receives, so nothing ever waits on the link for a receive that does not come. Each endpoint takes part in one probe at a time
on either side, with 16 MiB of scratch memory, and leaves the link free for as long as it has used it.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from . import frames
from .base import Buffer, DeviceBuffer, Link, Place
from .errors import HandoffRefused, LinkLost
from .handoff import LinkId
from .mover import Mover, probe_tag
from .stager import Slot

if TYPE_CHECKING:
    from .peers import Peers

ANSWER_S = 2.0  # as `handoff.STALLED_S`: silence for so long is a peer that hangs
ROUND_TRIPS = 20
SCRATCH_BYTES = 16 << 20
MESSAGE_BYTES = (64 << 10, 1 << 20, 16 << 20)
SIZE_BYTES_MAX = 64 << 20  # of messages of one size
SIZE_S = 0.3
BATCH_S = 0.05  # what a hand-off's message may have to wait behind, unless one message takes longer
MESSAGE_S = 0.2  # sizes that take longer are left out: 16 MiB on less than 80 MB/s
OUTSTANDING_MIN = 2  # messages of a batch: NVLink and a rendezvous need a second one to be busy
PROBE_FRAMES = (frames.Probe, frames.ProbeReady, frames.ProbeRefused, frames.ProbeDone, frames.ProbeEnd)
KvMemory = Literal["host", "device"]


@dataclass(frozen=True, slots=True)
class ProbeRate:
    """Throughput at one size of message, several of them under way: the median of its batches."""

    message_bytes: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """One link as it was measured."""

    peer: str  # the address that was dialled
    transport: str  # as `Link.transport`
    moves_device_memory: bool
    kv_memory: KvMemory  # where the KV of the measuring side lies
    dial_s: float | None  # until both had said hello; None: the link was there
    round_trip_s: float  # of a control frame, median
    rates: tuple[ProbeRate, ...]  # ascending; without the sizes that would have held up hand-offs for too long
    probe_bytes: int  # moved for this report


class Probes:
    """Both sides of one endpoint's probes. All calls on its loop."""

    def __init__(
        self, peers: Peers, mover: Mover, *, epoch: int, kv_memory: KvMemory, is_idle: Callable[[], bool]
    ) -> None:
        def give_up(link_id: LinkId, why: str) -> bool:
            """Nobody else watches an idle link; a link with hand-offs is watched by them."""
            if is_idle():
                peers.abort(link_id, why)
            return is_idle()

        self._prober = _Prober(peers, mover, kv_memory, give_up)
        self._target = _Target(peers, mover, epoch, give_up)

    async def probe(self, addresses: Sequence[str], decode_epoch: int) -> ProbeReport:
        """Raises LinkLost, HandoffRefused."""
        return await self._prober.probe(addresses, decode_epoch)

    def on_frame(self, link_id: LinkId, frame: frames.Frame) -> None:
        """One of `PROBE_FRAMES`."""
        if isinstance(frame, frames.Probe | frames.ProbeEnd):
            self._target.on_frame(link_id, frame)
        elif isinstance(frame, frames.ProbeReady | frames.ProbeRefused | frames.ProbeDone):
            self._prober.on_frame(link_id, frame)

    def on_lost(self, link_id: LinkId) -> None:
        """After every `done` of its messages."""
        self._prober.on_lost(link_id)
        self._target.on_lost(link_id)


class _Scratch:
    """Memory of one probe; given back when it is closed and no message uses it any more."""

    def __init__(self, slot: Slot, on_free: Callable[[Slot], None]) -> None:
        self._slot = slot
        self._on_free = on_free
        self._users = 0
        self._is_closed = False

    async def touch(self) -> None:
        """The first touch of memory is ten times slower than a copy, and would be measured."""
        if isinstance(self._slot.buffer, np.ndarray):
            await asyncio.to_thread(self._slot.buffer.fill, 1)

    def lend(self, number: int, nbytes: int) -> Buffer:
        """The place of a batch's message; as few share one as there is room, and what they overwrite nobody reads."""
        self._users += 1
        buffer = self._slot.buffer
        start = number % (buffer.nbytes // nbytes) * nbytes
        if isinstance(buffer, DeviceBuffer):
            return DeviceBuffer(buffer.address + start, nbytes, buffer)
        return buffer[start : start + nbytes]

    def give_back(self) -> None:
        self._users -= 1
        self._check_free()

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._check_free()

    def _check_free(self) -> None:
        if self._is_closed and not self._users:
            self._on_free(self._slot)


@dataclass(slots=True)
class _Run:
    """One probe of ours."""

    link_id: LinkId
    link: Link
    decode_epoch: int
    scratch: _Scratch
    probe_bytes: int = 0


@dataclass(slots=True)
class _Wait:
    """For the answer to a frame. When it is `ProbeReady` the messages must be sent, if only as empty ones."""

    link_id: LinkId
    answer: asyncio.Future[frames.Frame]  # cancelled: nobody waits any more
    messages: int


class _Prober:
    """The prefill side."""

    def __init__(self, peers: Peers, mover: Mover, kv_memory: KvMemory, give_up: Callable[[LinkId, str], bool]) -> None:
        self._peers = peers
        self._mover = mover
        self._kv_memory = kv_memory
        self._give_up = give_up
        self._serials = itertools.count(1)
        self._waits: dict[int, _Wait] = {}  # by serial number, until answered, also when nobody waits any more
        self._is_probing = False  # until the scratch memory is back

    async def probe(self, addresses: Sequence[str], decode_epoch: int) -> ProbeReport:
        if self._is_probing:
            raise HandoffRefused("busy", "this endpoint measures a link already")
        self._is_probing = True
        is_there = self._peers.has_link(addresses)
        started = time.perf_counter()
        try:
            link_id = await self._peers.dial_any(addresses)
            dial_s = None if is_there else time.perf_counter() - started
            run = self._begin(link_id, decode_epoch)
        except BaseException:  # Also when it is cancelled: others may measure.
            self._is_probing = False
            raise
        try:
            await run.scratch.touch()
            round_trip_s = statistics.median([await self._round_trip(run) for _ in range(ROUND_TRIPS)])
            rates = await self._rates(run)
        finally:
            self._peers.say(link_id, frames.ProbeEnd())
            run.scratch.close()
        return ProbeReport(
            peer=run.link.peer,
            transport=run.link.transport,
            moves_device_memory=run.link.moves_device_memory,
            kv_memory=self._kv_memory,
            dial_s=dial_s,
            round_trip_s=round_trip_s,
            rates=tuple(rates),
            probe_bytes=run.probe_bytes,
        )

    def on_frame(self, link_id: LinkId, frame: frames.ProbeReady | frames.ProbeRefused | frames.ProbeDone) -> None:
        wait = self._waits.get(frame.serial)
        if wait is None or wait.link_id != link_id:
            return
        del self._waits[frame.serial]
        if not wait.answer.done():
            wait.answer.set_result(frame)
        elif isinstance(frame, frames.ProbeReady):
            self._send_nothing(link_id, wait.messages)

    def on_lost(self, link_id: LinkId) -> None:
        for serial, wait in list(self._waits.items()):
            if wait.link_id == link_id:
                del self._waits[serial]
                if not wait.answer.done():
                    wait.answer.set_exception(LinkLost("the link was lost while it was measured"))

    def _begin(self, link_id: LinkId, decode_epoch: int) -> _Run:
        link = self._peers.link(link_id)
        if link is None:
            raise LinkLost("the link was lost at once")
        slot = self._mover.reserve(SCRATCH_BYTES, on_device=link.moves_device_memory)
        if slot is None:
            raise HandoffRefused("no_room", "16 MiB of staging memory are not free")
        return _Run(link_id, link, decode_epoch, _Scratch(slot, self._free))

    def _free(self, slot: Slot) -> None:
        self._mover.release(slot)
        self._is_probing = False

    async def _round_trip(self, run: _Run) -> float:
        started = time.perf_counter()
        await self._ask(run, 0, 0)
        return time.perf_counter() - started

    async def _rates(self, run: _Run) -> list[ProbeRate]:
        rates: list[ProbeRate] = []
        for message_bytes in MESSAGE_BYTES:
            if rates and rates[-1].bytes_per_s * MESSAGE_S < message_bytes:
                break
            rates.append(await self._rate(run, message_bytes))
        return rates

    async def _rate(self, run: _Run, message_bytes: int) -> ProbeRate:
        room = max(OUTSTANDING_MIN, SCRATCH_BYTES // message_bytes)
        speeds: list[float] = []
        messages, began, moved_bytes = 1, time.perf_counter(), 0
        while moved_bytes < SIZE_BYTES_MAX and time.perf_counter() - began < SIZE_S:
            took_s = await self._batch(run, messages, message_bytes)
            moved_bytes += messages * message_bytes
            speeds.append(messages * message_bytes / took_s)
            await asyncio.sleep(min(took_s, ANSWER_S / 4))  # Half of the time is the hand-offs'.
            messages = min(room, max(1, int(speeds[-1] * BATCH_S / message_bytes)))
        run.probe_bytes += moved_bytes
        return ProbeRate(message_bytes, statistics.median(speeds[1:] or speeds))  # The first one warms the path up.

    async def _batch(self, run: _Run, messages: int, message_bytes: int) -> float:
        """The time from the first send until all have been received."""
        serial = await self._ask(run, messages, message_bytes)
        started = time.perf_counter()
        done = self._expect(run, serial, 0)
        sent = [self._send(run, number, message_bytes) for number in range(messages)]
        await self._answer(run, done)
        took_s = time.perf_counter() - started
        await asyncio.wait(sent, timeout=ANSWER_S)  # The tags are used again.
        return took_s

    async def _ask(self, run: _Run, messages: int, message_bytes: int) -> int:
        """Announce a batch; returns its serial number when it may be sent."""
        serial = next(self._serials)
        ready = self._expect(run, serial, messages)
        self._peers.say(run.link_id, frames.Probe(serial, run.decode_epoch, messages, message_bytes))
        try:
            frame = await self._answer(run, ready)
        except BaseException:  # Also when it is cancelled: receives are posted for what was announced.
            has_come = ready.done() and not ready.cancelled() and ready.exception() is None
            if has_come and isinstance(ready.result(), frames.ProbeReady):
                self._send_nothing(run.link_id, messages)
            raise
        if isinstance(frame, frames.ProbeRefused):
            raise HandoffRefused(frame.reason, f"{run.link.peer} does not let itself be measured now")
        return serial

    def _expect(self, run: _Run, serial: int, messages: int) -> asyncio.Future[frames.Frame]:
        if self._peers.link(run.link_id) is None:
            raise LinkLost(f"lost {run.link.peer} while it was measured")
        answer: asyncio.Future[frames.Frame] = asyncio.get_running_loop().create_future()
        self._waits[serial] = _Wait(run.link_id, answer, messages)
        return answer

    async def _answer(self, run: _Run, answer: asyncio.Future[frames.Frame]) -> frames.Frame:
        try:
            async with asyncio.timeout(ANSWER_S):
                return await answer
        except TimeoutError:
            why = f"no answer to a probe within {ANSWER_S:g} s"
            self._give_up(run.link_id, why)
            raise LinkLost(f"{why} from {run.link.peer}") from None

    def _send(self, run: _Run, number: int, message_bytes: int) -> asyncio.Future[None]:
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        buffer = run.scratch.lend(number, message_bytes)

        def done(_: BaseException | None) -> None:
            run.scratch.give_back()
            if not sent.done():
                sent.set_result(None)

        try:
            run.link.post_send(probe_tag(number), [buffer], done)
        except LinkLost as error:
            done(error)
        return sent

    def _send_nothing(self, link_id: LinkId, messages: int) -> None:
        """The receives are posted by now: end them with empty messages."""
        link = self._peers.link(link_id)
        if link is None:
            return
        for number in range(messages):
            try:
                link.post_send(probe_tag(number), (), lambda _: None)
            except LinkLost:
                return


@dataclass(slots=True)
class _Session:
    """One probe of somebody else's."""

    link_id: LinkId
    heard_at: float
    scratch: _Scratch | None = None
    left: int = 0  # receives that are not done
    is_preparing: bool = False
    is_short: bool = False  # one of the batch did not come whole
    is_over: bool = False


class _Target:
    """The decode side."""

    def __init__(self, peers: Peers, mover: Mover, epoch: int, give_up: Callable[[LinkId, str], bool]) -> None:
        self._peers = peers
        self._mover = mover
        self._epoch = epoch
        self._give_up = give_up
        self._session: _Session | None = None
        self._timer: asyncio.TimerHandle | None = None

    def on_frame(self, link_id: LinkId, frame: frames.Probe | frames.ProbeEnd) -> None:
        session = self._session
        if isinstance(frame, frames.ProbeEnd):
            if session and session.link_id == link_id:
                self._end(session)
        elif reason := self._refusal(link_id, frame):
            self._peers.say(link_id, frames.ProbeRefused(frame.serial, reason))
        else:
            self._begin(self._session or self._open(link_id), frame)

    def on_lost(self, link_id: LinkId) -> None:
        if self._session and self._session.link_id == link_id:
            self._end(self._session)

    def _refusal(self, link_id: LinkId, frame: frames.Probe) -> frames.ProbeRefuseReason | None:
        session = self._session
        if frame.decode_epoch != self._epoch:
            return "wrong_epoch"
        if session and (session.link_id != link_id or session.left or session.is_preparing or session.is_over):
            return "busy"
        if frame.messages * frame.message_bytes > SIZE_BYTES_MAX or bool(frame.messages) != bool(frame.message_bytes):
            return "bad_probe"
        return None

    def _open(self, link_id: LinkId) -> _Session:
        loop = asyncio.get_running_loop()
        self._session = session = _Session(link_id, loop.time())
        self._timer = loop.call_later(ANSWER_S, self._watch, session)
        return session

    def _begin(self, session: _Session, frame: frames.Probe) -> None:
        session.heard_at = asyncio.get_running_loop().time()
        if not frame.messages:
            self._peers.say(session.link_id, frames.ProbeReady(frame.serial))
        elif session.scratch:
            self._post(session, session.scratch, frame)
        else:
            link = self._peers.link(session.link_id)
            if link is None:
                return  # `on_lost` follows.
            slot = self._mover.reserve(SCRATCH_BYTES, on_device=link.moves_device_memory)
            if slot is None:
                self._peers.say(session.link_id, frames.ProbeRefused(frame.serial, "no_room"))
                return
            session.scratch = _Scratch(slot, partial(self._free, session))
            session.is_preparing = True
            self._peers.own(self._prepare(session, session.scratch, frame), "probe")

    async def _prepare(self, session: _Session, scratch: _Scratch, frame: frames.Probe) -> None:
        await scratch.touch()
        session.is_preparing = False
        if session.is_over:
            scratch.close()
        else:
            self._post(session, scratch, frame)

    def _post(self, session: _Session, scratch: _Scratch, frame: frames.Probe) -> None:
        link = self._peers.link(session.link_id)
        if link is None:
            return  # `on_lost` follows.
        session.left, session.is_short = frame.messages, False

        def done(error: BaseException | None) -> None:
            scratch.give_back()
            session.left -= 1
            session.heard_at = asyncio.get_running_loop().time()
            session.is_short = session.is_short or error is not None
            if not session.left and not session.is_short and not session.is_over:
                self._peers.say(session.link_id, frames.ProbeDone(frame.serial))

        for number in range(frame.messages):
            buffer = scratch.lend(number, frame.message_bytes)
            try:
                link.post_receive(probe_tag(number), Place.of([buffer]), done)
            except LinkLost as error:
                done(error)
        self._peers.say(session.link_id, frames.ProbeReady(frame.serial))

    def _watch(self, session: _Session) -> None:
        """Who says nothing for so long has gone; what it announced must end before its memory is free."""
        now = asyncio.get_running_loop().time()
        self._timer = asyncio.get_running_loop().call_later(ANSWER_S / 4, self._watch, session)
        if now - session.heard_at < ANSWER_S:
            return
        if not session.left:
            self._end(session)
        elif self._give_up(session.link_id, f"sent nothing of a probe for {ANSWER_S:g} s"):
            session.heard_at = now

    def _end(self, session: _Session) -> None:
        session.is_over = True
        if self._timer and not session.left:
            self._timer.cancel()
        if session.scratch is None:
            self._session = None
        elif not session.is_preparing:
            session.scratch.close()

    def _free(self, session: _Session, slot: Slot) -> None:
        self._mover.release(slot)
        if self._timer:
            self._timer.cancel()
        if self._session is session:
            self._session = None
