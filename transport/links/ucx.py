"""Links over UCX: shared memory, NVLink (cuda_ipc), TCP, and RDMA where the system's UCX has it.

UCX comes from UCXX (`ucxx-cu12`, `ucxx-cu13`), the successor of the archived ucx-py by the same team (RAPIDS); ucx-py cannot be
installed any more. We use UCXX's core objects and drive them by the worker's event fd: its own asyncio modes spin, this
engine idles at 0.01 % of a core. The libucx of PyPI has no RDMA; a system or conda UCX does.

- Tags match per worker, not per endpoint, so each side gives the other a connection id and every tag carries it.
- A message of `RNDV_BYTES` or more is a rendezvous: it is offered, and only when we answer the offer are its bytes written
  straight into the posted buffers. We answer at most `ANSWERED_MAX` offers of a link at a time: closing an endpoint stops
  the writes of what was answered, but it cannot end while the peer's queue is full of our answers [a stopped peer, 290
  answered offers: the close hung, and 280 KB were written when the peer went on]. A smaller message is eager and may
  come in fragments after the close, so it lands in a buffer of ours first; a device's memory we cannot copy into,
  so there it lands in its place, which stays taken until it has ended.
- UCX sees kill -9 in milliseconds and a stopped or cut off peer never: `handoff.LinkWatch` does that.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..base import Buffer, ControlHandler, DeviceBuffer, Done, HostBuffer, LostHandler, Place
from ..base import Link as LinkContract
from ..errors import LinkLost, TransportError, TransportUnavailable
from ..frames import FRAME_BYTES_MAX, TAG_BITS
from .addresses import join_address, split_address
from .cursor import host_buffers
from .ucp import Arrived, Operation
from .ucx_engine import RNDV_BYTES, Engine
from .ucx_greeting import CONTROL_PIECE_BYTES, Ends, Lobby, answer, dial

if TYPE_CHECKING:
    import ucxx._lib.libucxx as core

log = logging.getLogger(__name__)
CONTROL_SLOTS = 16  # posted ahead for each link; more pieces wait in UCX
CLOSE_S = 1.0
ANSWERED_MAX = 32  # a shared-memory queue has 256 places for all who answer one peer
_REMOTE_DMA = ("rc_", "dc_", "ud_", "gga_", "srd")  # how UCX's RDMA transports begin
# Where control frames go another way than KV, keepalives say nothing of its way: what was answered must be here by then.
LOOK_S, STILL_S, SLOWEST_BYTES_PER_S = 0.5, 2.0, 1 << 20
EARLY_MAX = 1 << 12  # offers without a receive; an honest peer announces its messages first
_CONTROL_TAG = 1 << TAG_BITS


@dataclass(eq=False, slots=True)
class _Receive:
    """A KV message that has not arrived."""

    tag: int
    place: Place
    done: Done
    buffers: Sequence[Buffer] = ()  # of the place, from when the message is received
    bounce: HostBuffer | None = None


class UcxLink:
    """One endpoint, or two of them, with their two connection ids."""

    def __init__(self, engine: Engine, ends: Ends, peer: str) -> None:
        self._engine = engine
        self._endpoints = [end for end in (ends.endpoint, ends.control) if end is not None]
        self._handle, self._control_handle = self._endpoints[0].handle, self._endpoints[-1].handle
        self._peer = peer
        self._mine = ends.mine
        self._in_tag, self._out_tag = ends.mine << (TAG_BITS + 1), ends.theirs << (TAG_BITS + 1)
        lanes = engine.ucp.transports(self._handle)
        self._transport = f"ucx({','.join(lanes)})"
        self._moves_device_memory = engine.has_cuda and any(
            lane == "cuda_ipc" or lane.startswith(_REMOTE_DMA) for lane in lanes
        )
        self._sends: dict[Operation, Done] = {}
        self._waiting: dict[int, _Receive] = {}  # by tag: nothing has come yet
        self._early: dict[
            int, Arrived
        ] = {}  # by tag, in the order of their coming: not answered, no receive was posted
        self._held: dict[int, tuple[_Receive, Arrived]] = {}  # likewise, whose place had no room
        self._receives: dict[Operation, _Receive] = {}
        self._look: asyncio.TimerHandle | None = None
        self._still_s = 0.0  # since one of them ended, in looks: a pause of our own is only one
        self._controls_out: set[Operation] = set()
        self._controls_in: deque[tuple[Operation, HostBuffer]] = deque()
        self._frame = bytearray()
        self._bytes_received = 0
        self._error: LinkLost | None = None
        self._is_over = asyncio.Event()
        self._is_flushed = asyncio.Event()
        self._on_control: ControlHandler | None = None
        self._on_lost: LostHandler | None = None
        engine.connections[ends.mine] = self

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def transport(self) -> str:
        return self._transport

    @property
    def moves_device_memory(self) -> bool:
        return self._moves_device_memory

    @property
    def bytes_received(self) -> int:
        return self._bytes_received

    def send_control(self, payload: bytes) -> None:
        if len(payload) > FRAME_BYTES_MAX:
            raise ValueError(f"control frame of {len(payload)} B; at most {FRAME_BYTES_MAX}")
        self._check_alive()
        step = CONTROL_PIECE_BYTES - 1
        for start in range(0, len(payload), step):
            has_more = start + step < len(payload)
            piece = np.frombuffer(bytes([has_more]) + payload[start : start + step], np.uint8)
            tag = self._out_tag | _CONTROL_TAG
            self._controls_out.add(self._engine.send(self._control_handle, tag, [piece], self._on_control_sent))

    def post_send(self, tag: int, buffers: Sequence[Buffer], done: Done) -> None:
        self._check_alive()
        buffers = buffers if self._moves_device_memory else host_buffers(buffers)
        self._sends[self._engine.send(self._handle, self._out_tag | tag, buffers, self._on_sent)] = done

    def post_receive(self, tag: int, place: Place, done: Done) -> None:
        self._check_alive()
        assert tag not in self._waiting, f"tag {tag} is posted already"
        self._waiting[tag] = _Receive(tag, place, done)
        self._engine.expecting[self] = None
        self._engine.kick()

    def retry_receives(self) -> None:
        if self._held and self._error is None:
            self._early = {tag: arrived for tag, (_, arrived) in self._held.items()} | self._early
            self._waiting.update((tag, receive) for tag, (receive, _) in self._held.items())
            self._held.clear()
            self._engine.expecting[self] = None
            self._engine.kick()

    def start(self, on_control: ControlHandler, on_lost: LostHandler) -> None:
        self._on_control, self._on_lost = on_control, on_lost
        if self._error:
            self._engine.loop.call_soon(on_lost, self._error)
            return
        for _ in range(CONTROL_SLOTS):
            self._post_control()
        for endpoint in self._endpoints:
            try:
                endpoint.set_close_callback(self._on_closed)
            except self._engine.errors:  # It has closed meanwhile.
                self._on_closed()

    async def abort(self) -> None:
        self._lose(LinkLost(f"{self._peer} was aborted here"))
        await self._is_over.wait()

    async def aclose(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_S):
                while (self._sends or self._controls_out) and not self._error:
                    self._is_flushed.clear()
                    await self._is_flushed.wait()
        except TimeoutError:
            pass
        await self.abort()

    def _check_alive(self) -> None:
        if self._error or self._engine.is_closed:
            raise LinkLost(f"{self._peer} is gone") from self._error

    # What UCX reports.

    def take_arrived(self) -> None:
        """Receive what has come, as many at a time as we may answer."""
        for tag in [tag for tag in self._early if tag in self._waiting]:
            if len(self._receives) < ANSWERED_MAX and self._error is None:
                self._receive(self._waiting.pop(tag), self._early.pop(tag))
        while self._waiting and len(self._receives) < ANSWERED_MAX and self._error is None:
            arrived = self._engine.arrived(self._in_tag)
            if arrived is None:
                break
            tag = arrived.tag & (_CONTROL_TAG - 1)
            if receive := self._waiting.pop(tag, None):
                self._receive(receive, arrived)
            elif len(self._early) == EARLY_MAX or tag in self._early:
                self._lose(LinkLost(f"{self._peer} sent messages that nobody expects"))
            else:
                self._early[tag] = arrived
        if not self._waiting:
            self._engine.expecting.pop(self, None)

    def _receive(self, receive: _Receive, arrived: Arrived) -> None:
        if arrived.length_bytes > receive.place.nbytes:
            # It cannot be received, only refused with its link; the receive ends there like all others.
            self._waiting[receive.tag] = receive
            error = f"{self._peer} sent {arrived.length_bytes} B for a receive of {receive.place.nbytes} B"
            self._lose(LinkLost(error))
            return
        buffers = receive.place.take()
        if buffers is None:
            self._held[receive.tag] = (receive, arrived)
            return
        receive.buffers = places = buffers if self._moves_device_memory else host_buffers(buffers)
        is_device = any(isinstance(buffer, DeviceBuffer) for buffer in buffers)
        if arrived.length_bytes < RNDV_BYTES and not is_device:
            receive.bounce = np.empty(arrived.length_bytes, np.uint8)
            places = [receive.bounce]
        self._receives[self._engine.receive_arrived(arrived, places, self._on_received)] = receive
        if self._look is None and self._control_handle != self._handle:
            self._still_s = 0.0
            self._look = self._engine.loop.call_later(LOOK_S, self._look_again)

    def _look_again(self) -> None:
        """Messages come in the order in which they were answered: the oldest says whether anything still moves."""
        self._look = None
        if self._error or not self._receives:
            return
        self._still_s += LOOK_S
        oldest = next(iter(self._receives.values()))
        if self._still_s > STILL_S + oldest.place.nbytes / SLOWEST_BYTES_PER_S:
            self._lose(
                LinkLost(f"{self._peer} is there, but sent nothing of {oldest.place.nbytes} B for {self._still_s} s")
            )
            return
        self._look = self._engine.loop.call_later(LOOK_S, self._look_again)

    def _on_closed(self) -> None:
        """From within progress, where nothing may be submitted."""
        self._engine.loop.call_soon(self._lose, LinkLost(f"{self._peer} closed the connection"))

    def _on_control_sent(self, operation: Operation) -> None:
        self._controls_out.discard(operation)
        if operation.status:
            self._fail(operation)
        self._check_over()

    def _on_sent(self, operation: Operation) -> None:
        if done := self._sends.pop(operation, None):
            done(self._fail(operation) if operation.status else None)
        self._check_over()

    def _on_received(self, operation: Operation) -> None:
        receive = self._receives.pop(operation, None)
        if receive is None:
            return  # Given up at the close; its bytes went to the bounce buffer that was kept for them.
        self._still_s = 0.0
        receive.done(self._received_error(operation, receive))
        self._check_over()

    def _received_error(self, operation: Operation, receive: _Receive) -> TransportError | None:
        if operation.status:
            return self._fail(operation)
        if operation.length_bytes != receive.place.nbytes:
            return TransportError(
                f"{self._peer} sent {operation.length_bytes} B for a receive of {receive.place.nbytes} B"
            )
        self._bytes_received += receive.place.nbytes
        start = 0
        for buffer in host_buffers(receive.buffers) if receive.bounce is not None else ():
            assert receive.bounce is not None
            buffer[:] = receive.bounce[start : start + buffer.nbytes]
            start += buffer.nbytes
        return None

    def _fail(self, operation: Operation) -> LinkLost:
        """An operation that failed takes its link with it."""
        assert operation.status is not None
        error = self._error or LinkLost(f"lost {self._peer}: {self._engine.ucp.describe(operation.status)}")
        if not self._error:
            self._engine.loop.call_soon(self._lose, error)
        return error

    # Control frames.

    def _post_control(self) -> None:
        slot = np.empty(CONTROL_PIECE_BYTES, np.uint8)
        tag = self._in_tag | _CONTROL_TAG
        operation = self._engine.receive_some_time(tag, slot, self._on_control_received)
        self._controls_in.append((operation, slot))

    def _on_control_received(self, _operation: Operation) -> None:
        """Pieces match the slots in order but may end out of it."""
        while self._controls_in and self._controls_in[0][0].status is not None:
            operation, slot = self._controls_in.popleft()
            if self._error:
                continue
            if operation.status or not operation.length_bytes:
                self._fail(operation)
                continue
            self._post_control()
            self._bytes_received += operation.length_bytes
            self._frame += slot[1 : operation.length_bytes].data
            if len(self._frame) > FRAME_BYTES_MAX:
                self._lose(LinkLost(f"{self._peer} sent a control frame of more than {FRAME_BYTES_MAX} B"))
            elif not slot[0]:
                frame, self._frame = bytes(self._frame), bytearray()
                assert self._on_control
                self._on_control(frame)
        self._check_over()

    # The end.

    def _lose(self, error: LinkLost) -> None:
        """Close the endpoint and withdraw every receive; the link is over when the last operation has ended."""
        if self._error:
            return
        self._error = error
        # First the receives: closing makes progress, and a rendezvous that begins on a closing endpoint never ends.
        for operation, _ in self._controls_in:
            self._engine.cancel(operation)
        self._engine.expecting.pop(self, None)
        endpoints, self._endpoints = self._endpoints, []
        for endpoint in endpoints:
            endpoint.remove_close_callback()
            endpoint.close_blocking()
        # Safe at once are receives that were never matched, or have a bounce buffer; and sends, because what is read late
        # belongs to a transfer that cannot land any more. UCX's own references stay until each operation ends.
        safe = [receive.done for receive in self._waiting.values()]
        safe += [receive.done for receive, _ in self._held.values()]
        safe += [receive.done for receive in self._receives.values() if receive.bounce is not None]
        safe += self._sends.values()
        self._receives = {op: receive for op, receive in self._receives.items() if receive.bounce is None}
        self._waiting.clear()
        self._held.clear()
        self._sends.clear()
        self._controls_out.clear()
        for done in safe:
            done(error)
        self._engine.kick()
        self._check_over()

    def _check_over(self) -> None:
        self._is_flushed.set()
        if self._error is None or self._is_over.is_set():
            return
        if self._receives:
            return
        self._is_over.set()
        del self._engine.connections[self._mine]
        if self._on_lost:
            self._on_lost(self._error)


class UcxListener:
    def __init__(self, engine: Engine, host: str, on_link: Callable[[LinkContract], None]) -> None:
        self._engine = engine
        self._on_link = on_link
        self._lobby: Lobby = {}
        self._tasks: set[asyncio.Task[None]] = set()

        def on_endpoint(endpoint: core.UCXEndpoint) -> None:
            engine.loop.call_soon(self._accept, endpoint)

        self._listener = engine.core.UCXListener.create(
            worker=engine.worker, port=0, cb_func=on_endpoint, deliver_endpoint=True
        )
        self._address = join_address("ucx", host, self._listener.port)

    @property
    def address(self) -> str:
        return self._address

    async def aclose(self) -> None:
        self._listener = None
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _accept(self, endpoint: core.UCXEndpoint) -> None:
        task = self._engine.loop.create_task(self._greet(endpoint), name="ucx-accept")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _greet(self, endpoint: core.UCXEndpoint) -> None:
        try:
            ends = await answer(self._engine, endpoint, self._lobby, "ucx://dialler", CLOSE_S)
        except LinkLost as error:
            log.warning("did not accept a connection: %s", error)
            return
        if ends is not None:
            self._on_link(UcxLink(self._engine, ends, "ucx://dialler"))


class UcxTransport:
    """UCX through UCXX."""

    scheme = "ucx"

    def __init__(self) -> None:
        self._engine: Engine | None = None

    async def start(self) -> None:
        """Raises TransportUnavailable when UCXX is missing or UCX does not start."""
        self._engine = Engine()

    async def listen(self, host: str, on_link: Callable[[LinkContract], None]) -> UcxListener:
        """UCXX's listener takes connections on every interface; `host` is only what the address says."""
        return UcxListener(self._running(), host, on_link)

    async def connect(self, address: str, *, timeout_s: float) -> UcxLink:
        """Raises LinkLost when nobody answers in time, ValueError when the address is not of this scheme."""
        engine = self._running()
        host, port = split_address(address, "ucx")
        deadline = engine.loop.time() + timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                found = await engine.loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise LinkLost(f"no way to {address}: {error or 'timeout'}") from error

        def open_endpoint() -> core.UCXEndpoint:
            endpoint = engine.core.UCXEndpoint.create(engine.worker, str(found[0][4][0]), port, True)
            engine.kick()
            return endpoint

        ends = await dial(engine, open_endpoint, address, timeout_s=deadline - engine.loop.time())
        return UcxLink(engine, ends, address)

    async def aclose(self) -> None:
        if self._engine:
            for link in list(self._engine.connections.values()):
                await link.abort()
            self._engine.close()
            self._engine = None

    def _running(self) -> Engine:
        if self._engine is None:
            raise TransportUnavailable("ucx was not started")
        return self._engine
