"""Links on virtual time, for real hand-off endpoints: as fast as they are told, and broken in every way that links break.

A `Wire` joins two `LabLink`s. Bytes are read from the sender's buffers and written into the receiver's when they arrive, a
part of each message before the rest, as a NIC does it: whoever lets go of a buffer too early will be found out. A wire can
be slow, stall, corrupt a message, die, and write late: what it still holds lands while the receiving side's `abort` is
under way.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..transport.base import Buffer, ControlHandler, Done, LostHandler, Place
from ..transport.base import Link as LinkContract
from ..transport.errors import LinkLost, TransportError
from ..transport.frames import FRAME_BYTES_MAX
from ..transport.links.cursor import Cursor, host_buffers
from .loop import Process, VirtualLoop

FLUSH_S = 1.0


@dataclass(slots=True)
class NetFaults:
    """What links are like that are made from now on."""

    bytes_per_s: float = 1e9
    latency_s: float = 0.0002
    abort_s: float = 0.02  # until an abort has completed, at most


class Network:
    """Every link of a run."""

    def __init__(self, loop: VirtualLoop, rng: random.Random) -> None:
        self.loop = loop
        self.rng = rng
        self.faults = NetFaults()
        self.wires: dict[Wire, None] = {}  # those that are up, oldest first
        self.listeners: dict[str, LabListener] = {}
        self.numbers = itertools.count(1)
        self.on_access: Callable[[Process, memoryview], None] = lambda process, place: None  # bytes read or written

    def on_killed(self, process: Process) -> None:
        """A process has died: its peers see the end of their links soon after."""
        for address in [address for address, listener in self.listeners.items() if listener.process is process]:
            del self.listeners[address]
        for wire in list(self.wires):
            for end in wire.ends:
                if end.process is process:
                    wire.end_peer(end)


@dataclass(eq=False)
class Wire:
    """What joins two ends."""

    net: Network
    bytes_per_s: float
    latency_s: float
    ends: tuple[LabLink, ...] = ()
    is_stalled: bool = False
    writes_late: bool = False
    corrupt_messages: int = 0
    _held: list[tuple[LabLink, Callable[[], None]]] = field(default_factory=list)
    _due: dict[LabLink, list[float]] = field(
        default_factory=dict
    )  # to whom -> when the wire is free, when the last lands

    def carry(self, to: LabLink, nbytes: int, land: Callable[[], None]) -> None:
        """Have `land` happen at the other end, in order."""
        free_at, last_at = self._due.get(to, (0.0, 0.0))
        free_at = max(free_at, self.net.loop.time()) + nbytes / self.bytes_per_s
        last_at = max(math.nextafter(last_at, math.inf), free_at + self.latency_s)
        self._due[to] = [free_at, last_at]
        to.process.call_at(last_at, self._land, to, land)

    def _land(self, to: LabLink, land: Callable[[], None]) -> None:
        if self.is_stalled:
            self._held.append((to, land))
        else:
            land()

    def stall(self) -> None:
        """Nothing lands any more, in either direction, and nobody is told."""
        self.is_stalled = True

    def resume(self) -> None:
        """What was held back lands now."""
        self.is_stalled = False
        held, self._held = self._held, []
        for to, land in held:
            to.process.call_soon(self._land, to, land)

    def cut(self) -> None:
        """Both ends lose the link soon."""
        for end in self.ends:
            self.end_peer(end)

    def end_peer(self, end: LabLink) -> None:
        """This end is gone: the other one sees it soon."""
        other = end.other
        error = LinkLost(f"{other.peer} closed the link")
        other.process.call_at(self.net.loop.time() + self.latency_s, other.lose, error)

    def late_writes(self, to: LabLink, within_s: float) -> None:
        """What this end has not got yet and thinks it never will lands in these seconds, if the wire is of that kind."""
        if not self.writes_late:
            return
        mine = [land for end, land in self._held if end is to]
        self._held = [(end, land) for end, land in self._held if end is not to]
        now, rng = self.net.loop.time(), self.net.rng
        for when in sorted(now + rng.random() * within_s for _ in mine):
            to.process.call_at(when, mine.pop(0))


class _Message:
    """Bytes under way."""

    __slots__ = ("arrived_bytes", "done", "source", "target")

    def __init__(self, source: Cursor, done: Done) -> None:
        self.source = source
        self.done = done
        self.arrived_bytes = 0
        self.target: Cursor | None = None


class LabLink:
    """One end; implements `transport.base.Link`."""

    transport = "lab"
    moves_device_memory = False

    def __init__(self, wire: Wire, process: Process, peer: str) -> None:
        self.wire = wire
        self.process = process
        self.peer = peer
        self.bytes_received = 0
        self._net = wire.net
        self._sends: dict[int, _Message] = {}
        self._receives: dict[int, tuple[Place, Done]] = {}
        self._arriving: dict[int, _Message] = {}
        self._held: dict[int, None] = {}  # tags of messages whose place had no room
        self._early: list[bytes] = []  # control frames from before `start`
        self._on_control: ControlHandler | None = None
        self._on_lost: LostHandler | None = None
        self._error: LinkLost | None = None
        self._is_aborting = False

    @property
    def other(self) -> LabLink:
        """The peer's end."""
        near, far = self.wire.ends
        return far if self is near else near

    # ---- what its owner asks

    def start(self, on_control: ControlHandler, on_lost: LostHandler) -> None:
        self._on_control, self._on_lost = on_control, on_lost
        early, self._early = self._early, []
        for payload in early:
            self.process.call_soon(self._deliver, payload)
        if self._error is not None:
            self.process.call_soon(on_lost, self._error)

    def send_control(self, payload: bytes) -> None:
        if len(payload) > FRAME_BYTES_MAX:
            raise ValueError(f"control frame of {len(payload)} B; at most {FRAME_BYTES_MAX}")
        self._check()
        other = self.other
        self.wire.carry(other, len(payload), lambda: other._deliver(payload))

    def post_send(self, tag: int, buffers: Sequence[Buffer], done: Done) -> None:
        self._check()
        assert tag not in self._sends, f"tag {tag} is being sent already"
        source = Cursor(host_buffers(buffers))
        message = self._sends[tag] = _Message(source, done)
        half = source.total_bytes // 2
        other = self.other
        if half:
            self.wire.carry(other, half, lambda: other._arrive(tag, message, half))
        rest = source.total_bytes - half
        self.wire.carry(other, rest, lambda: other._arrive(tag, message, source.total_bytes))

    def post_receive(self, tag: int, place: Place, done: Done) -> None:
        self._check()
        assert tag not in self._receives, f"tag {tag} is posted already"
        self._receives[tag] = (place, done)
        if tag in self._arriving:
            self.process.call_soon(self._match, tag)

    def retry_receives(self) -> None:
        held, self._held = self._held, {}
        for tag in held:
            self.process.call_soon(self._match, tag)

    async def abort(self) -> None:
        if self._error is None and not self._is_aborting:
            self._is_aborting = True
            within_s = self._net.rng.random() * self._net.faults.abort_s
            self.wire.late_writes(self, within_s)
            await asyncio.sleep(within_s)
        self.lose(LinkLost(f"{self.peer} was aborted here"))

    async def aclose(self) -> None:
        end_s = self._net.loop.time() + FLUSH_S
        while self._sends and self._error is None and self._net.loop.time() < end_s:  # noqa: ASYNC110  # Bounded.
            await asyncio.sleep(0.01)
        await self.abort()

    def lose(self, error: LinkLost) -> None:
        """Over: after this nobody writes here any more."""
        if self._error is not None:
            return
        self._error = error
        dones = [message.done for message in self._sends.values()] + [done for _, done in self._receives.values()]
        self._sends.clear()
        self._receives.clear()
        self._arriving.clear()
        self._net.wires.pop(self.wire, None)
        for done in dones:
            done(error)
        if self._on_lost is not None:
            self._on_lost(error)
        self.wire.end_peer(self)

    def _check(self) -> None:
        if self._error is not None:
            raise LinkLost(f"{self.peer} is gone")

    # ---- what arrives, in this end's process

    def _deliver(self, payload: bytes) -> None:
        if self._error is not None:
            return
        if self._on_control is None:
            self._early.append(payload)
            return
        self.bytes_received += len(payload)
        self._on_control(payload)

    def _arrive(self, tag: int, message: _Message, arrived_bytes: int) -> None:
        # What its sender has given up was not read: those buffers are its own again.
        if self._error is not None or self.other._error is not None:
            return
        message.arrived_bytes = arrived_bytes
        self._arriving[tag] = message
        self._match(tag)

    def _match(self, tag: int) -> None:
        message, posted = self._arriving.get(tag), self._receives.get(tag)
        if message is None or posted is None or tag in self._held or self.other._error is not None:
            return
        place, done = posted
        if message.target is None:
            buffers = place.take()
            if buffers is None:
                self._held[tag] = None
                return
            message.target = Cursor(host_buffers(buffers))
        source, target = message.source, message.target
        if source.total_bytes != target.total_bytes:
            self._end(tag, TransportError(f"{source.total_bytes} B for a receive of {target.total_bytes} B"))
            return
        self._move(source, target, message.arrived_bytes - (source.total_bytes - source.left_bytes))
        if not source.left_bytes and message.arrived_bytes == source.total_bytes:
            self._end(tag, None)

    def _end(self, tag: int, error: TransportError | None) -> None:
        _, done = self._receives.pop(tag)
        del self._arriving[tag]
        other = self.other
        self.wire.carry(other, 0, lambda: other._sent(tag))
        done(error)

    def _sent(self, tag: int) -> None:
        if (message := self._sends.pop(tag, None)) is not None:
            message.done(None)

    def _move(self, source: Cursor, target: Cursor, nbytes: int) -> None:
        self.bytes_received += nbytes
        while nbytes:
            (piece,) = source.views(nbytes, 1)
            (place,) = target.views(piece.nbytes, 1)
            self._net.on_access(self.process, place)
            self._net.on_access(self.other.process, piece)
            place[:] = piece[: place.nbytes]
            if self.wire.corrupt_messages and source.left_bytes == place.nbytes:
                self.wire.corrupt_messages -= 1
                place[-1] ^= 0xFF
            source.advance(place.nbytes)
            target.advance(place.nbytes)
            nbytes -= place.nbytes


class LabListener:
    """Where peers connect."""

    def __init__(self, net: Network, process: Process, on_link: Callable[[LinkContract], None]) -> None:
        self.process = process
        self.on_link = on_link
        self.address = f"lab://{process.name}:{next(net.numbers)}"
        self._net = net
        net.listeners[self.address] = self

    async def aclose(self) -> None:
        self._net.listeners.pop(self.address, None)


class LabTransport:
    """One process's way to make links; implements `transport.base.Transport`."""

    scheme = "lab"

    def __init__(self, net: Network, process: Process) -> None:
        self._net = net
        self._process = process

    async def start(self) -> None:
        pass

    async def listen(self, host: str, on_link: Callable[[LinkContract], None]) -> LabListener:
        return LabListener(self._net, self._process, on_link)

    async def connect(self, address: str, *, timeout_s: float) -> LabLink:
        """Raises LinkLost, ValueError. A process that is paused does not answer: only its kernel does."""
        if not address.startswith("lab://"):
            raise ValueError(f"not an address of lab: {address!r}")
        faults = self._net.faults
        await asyncio.sleep(faults.latency_s)
        listener = self._net.listeners.get(address)
        if listener is None:
            raise LinkLost(f"nobody listens at {address}")
        wire = Wire(self._net, faults.bytes_per_s, faults.latency_s)
        near, far = (
            LabLink(wire, self._process, address),
            LabLink(wire, listener.process, f"lab://{self._process.name}"),
        )
        wire.ends = (near, far)
        self._net.wires[wire] = None
        listener.process.call_soon(listener.on_link, far)
        return near

    async def aclose(self) -> None:
        pass
