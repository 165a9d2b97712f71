"""Links inside one process, for tests and for several workers on one loop. Also the place to break a link on purpose."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from weakref import WeakSet

from ..base import Buffer, ControlHandler, Done, HostBuffer, LostHandler, Place
from ..base import Link as LinkContract
from ..errors import LinkLost, TransportError
from ..frames import FRAME_BYTES_MAX
from .cursor import Cursor, host_buffers

_listeners: dict[str, InprocListener] = {}
_numbers = itertools.count(1)
FLUSH_TURNS = 1000  # of the loop, to deliver what is queued at aclose


@dataclass(eq=False, slots=True)
class InprocFaults:
    """What goes wrong on the links of one transport (either end will do). Everything is as it should be by default."""

    is_stalled: bool = False  # nothing is delivered; set through `stall` and `resume`
    corrupt_messages: int = 0  # flip a byte in that many of the next KV messages, counting down
    links: WeakSet[InprocLink] = field(default_factory=WeakSet)

    def stall(self) -> None:
        self.is_stalled = True

    def resume(self) -> None:
        """Deliver what was held back."""
        self.is_stalled = False
        for link in list(self.links):
            link.wake()

    def cut(self) -> None:
        """Lose every link, as when the peer dies."""
        for link in list(self.links):
            link.lose(LinkLost(f"{link.peer} was cut"))


@dataclass(slots=True)
class _Send:
    buffers: Sequence[HostBuffer]
    done: Done


@dataclass(slots=True)
class _Receive:
    place: Place
    done: Done


class InprocLink:
    """One end. What one end queues is delivered by the loop, one message a turn."""

    def __init__(self, peer: str, faults: InprocFaults) -> None:
        self._loop = asyncio.get_running_loop()
        self._peer_name = peer
        self._faults = faults
        self._other: InprocLink | None = None
        self._sends: dict[int, _Send] = {}
        self._receives: dict[int, _Receive] = {}
        self._held: dict[int, None] = {}  # tags of messages whose place had no room
        self._inbox: deque[Callable[[], None]] = deque()  # what the other end did, in order
        self._is_woken = False
        self._on_control: ControlHandler | None = None
        self._on_lost: LostHandler | None = None
        self._error: LinkLost | None = None
        self._bytes_received = 0
        faults.links.add(self)

    @property
    def peer(self) -> str:
        return self._peer_name

    @property
    def transport(self) -> str:
        return "inproc"

    @property
    def moves_device_memory(self) -> bool:
        return False

    @property
    def bytes_received(self) -> int:
        return self._bytes_received

    def join(self, other: InprocLink) -> None:
        """Make these two the ends of one link."""
        self._other, other._other = other, self

    def send_control(self, payload: bytes) -> None:
        if len(payload) > FRAME_BYTES_MAX:
            raise ValueError(f"control frame of {len(payload)} B; at most {FRAME_BYTES_MAX}")
        other = self._alive()
        other._put(lambda: other._deliver(payload))

    def post_send(self, tag: int, buffers: Sequence[Buffer], done: Done) -> None:
        other = self._alive()
        assert tag not in self._sends, f"tag {tag} is being sent already"
        self._sends[tag] = _Send(host_buffers(buffers), done)
        other._put(lambda: other._match(tag))

    def post_receive(self, tag: int, place: Place, done: Done) -> None:
        other = self._alive()
        assert tag not in self._receives, f"tag {tag} is posted already"
        self._receives[tag] = _Receive(place, done)
        if tag in other._sends:
            self._put(lambda: self._match(tag))

    def retry_receives(self) -> None:
        held, self._held = self._held, {}
        self._inbox.extendleft(functools.partial(self._match, tag) for tag in reversed(held))
        self.wake()

    def start(self, on_control: ControlHandler, on_lost: LostHandler) -> None:
        self._on_control, self._on_lost = on_control, on_lost
        if self._error:
            self._loop.call_soon(on_lost, self._error)
        self.wake()

    async def abort(self) -> None:
        self.lose(LinkLost(f"{self._peer_name} was aborted here"))

    async def aclose(self) -> None:
        other = self._other
        for _ in range(FLUSH_TURNS):
            if self._error or not (self._sends or (other and other._inbox)):
                break
            await asyncio.sleep(0)
        await self.abort()

    def wake(self) -> None:
        if self._inbox and not self._is_woken and self._on_control and not self._faults.is_stalled:
            self._is_woken = True
            self._loop.call_soon(self._run)

    def lose(self, error: LinkLost) -> None:
        """Both ends end; this one now, the other one soon."""
        if self._error:
            return
        self._error = error
        self._inbox.clear()
        dones = [send.done for send in self._sends.values()]
        dones += [receive.done for receive in self._receives.values()]
        self._sends.clear()
        self._receives.clear()
        self._held.clear()
        for done in dones:
            done(error)
        if self._on_lost:
            self._on_lost(error)
        if other := self._other:
            self._loop.call_soon(other.lose, LinkLost(f"{other._peer_name} closed the link"))

    def _alive(self) -> InprocLink:
        if self._error or self._other is None or self._other._error:
            raise LinkLost(f"{self._peer_name} is gone")
        return self._other

    def _put(self, action: Callable[[], None]) -> None:
        self._inbox.append(action)
        self.wake()

    def _run(self) -> None:
        self._is_woken = False
        if self._inbox and not self._faults.is_stalled:
            action = self._inbox.popleft()
            self.wake()
            action()

    def _deliver(self, payload: bytes) -> None:
        assert self._on_control
        self._bytes_received += len(payload)
        self._on_control(payload)

    def _match(self, tag: int) -> None:
        other = self._other
        if other is None or tag in self._held or tag not in self._receives or tag not in other._sends:
            return
        buffers = self._receives[tag].place.take()
        if buffers is None:
            self._held[tag] = None
            return
        receive, send = self._receives.pop(tag), other._sends.pop(tag)
        error = self._move(host_buffers(buffers), send)
        self._loop.call_soon(send.done, None)
        receive.done(error)

    def _move(self, buffers: Sequence[HostBuffer], send: _Send) -> TransportError | None:
        source, target = Cursor(send.buffers), Cursor(buffers)
        if source.total_bytes != target.total_bytes:
            return TransportError(f"message of {source.total_bytes} B for a receive of {target.total_bytes} B")
        while source.left_bytes:
            (piece,) = source.views(source.left_bytes, 1)
            (place,) = target.views(piece.nbytes, 1)
            place[:] = piece[: place.nbytes]
            source.advance(place.nbytes)
            target.advance(place.nbytes)
        self._bytes_received += target.total_bytes
        if self._faults.corrupt_messages and target.total_bytes:
            self._faults.corrupt_messages -= 1
            buffers[-1][-1] ^= 0xFF
        return None


class InprocListener:
    def __init__(self, address: str, faults: InprocFaults, on_link: Callable[[LinkContract], None]) -> None:
        self._address = address
        self.faults = faults
        self.on_link = on_link
        _listeners[address] = self

    @property
    def address(self) -> str:
        return self._address

    async def aclose(self) -> None:
        _listeners.pop(self._address, None)


class InprocTransport:
    """Connects to any listener of this process; `faults` are those of the links that this instance dials or accepts."""

    scheme = "inproc"

    def __init__(self, faults: InprocFaults | None = None) -> None:
        self.faults = faults or InprocFaults()

    async def start(self) -> None:
        pass

    async def listen(self, host: str, on_link: Callable[[LinkContract], None]) -> InprocListener:
        return InprocListener(f"inproc://{host}:{next(_numbers)}", self.faults, on_link)

    async def connect(self, address: str, *, timeout_s: float) -> InprocLink:
        """Raises LinkLost, ValueError."""
        if not address.startswith("inproc://"):
            raise ValueError(f"not an address of inproc: {address!r}")
        listener = _listeners.get(address)
        if listener is None:
            raise LinkLost(f"nobody listens at {address}")
        near, far = InprocLink(address, self.faults), InprocLink("inproc://dialler", listener.faults)
        near.join(far)
        listener.on_link(far)
        return near

    async def aclose(self) -> None:
        pass
