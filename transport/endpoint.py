"""One process's side of every hand-off: carries out what the two machines decide, on the links of its transports."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field

from . import frames
from .base import (
    Chunk,
    Expectation,
    GroupBlocks,
    HandoffKey,
    KvPool,
    Link,
    Listener,
    ReceiveEnd,
    SendEnd,
    SendOrder,
    SendReleased,
    Transport,
)
from .errors import LinkLost, TransportError
from .handoff import (
    TICK_S,
    AbortLink,
    AbortOrder,
    Announce,
    CancelExpectation,
    Close,
    ComputeDigest,
    Dial,
    DialFailed,
    Digested,
    Emit,
    Expect,
    FrameReceived,
    Instruction,
    LayerReady,
    LinkActive,
    LinkGreeted,
    LinkId,
    LinkUp,
    MessageDone,
    OpenOrder,
    PlanSend,
    PostReceive,
    PostSend,
    ReceiverEvent,
    SenderEvent,
    SendFrame,
    Tick,
)
from .handoff import LinkLost as LinkLostEvent
from .layout import HANDOFF_PROTOCOL, KvLayout
from .mover import tag_of
from .movers import mover_for, sizes_for
from .receiver import Receiver
from .registry import start_transports
from .sender import Sender
from .wire import Wire

log = logging.getLogger(__name__)
DIAL_TIMEOUT_S = 2.0
HELLO_TIMEOUT_S = 2.0


@dataclass(slots=True)
class EndpointStats:
    """Counters since the start, and what is open now."""

    kv_bytes_sent: int = 0
    kv_bytes_received: int = 0
    received: Counter[str] = field(default_factory=Counter)  # "landed" or the reason -> expectations ended
    sent: Counter[str] = field(default_factory=Counter)  # "landed" or the reason -> orders ended
    refusals: dict[str, int] = field(default_factory=dict)  # claims refused, by reason
    links_lost: int = 0
    links: dict[str, str] = field(default_factory=dict)  # peer -> what moves the bytes
    receiving: int = 0
    sending: int = 0

    @classmethod
    def sum(cls, parts: Iterable[EndpointStats]) -> EndpointStats:
        """Of several endpoints as one."""
        total = cls()
        for part in parts:
            total.kv_bytes_sent += part.kv_bytes_sent
            total.kv_bytes_received += part.kv_bytes_received
            total.received += part.received
            total.sent += part.sent
            total.refusals = dict(Counter(total.refusals) + Counter(part.refusals))
            total.links_lost += part.links_lost
            total.links |= part.links
            total.receiving += part.receiving
            total.sending += part.sending
        return total


@dataclass(slots=True)
class _Peer:
    link: Link
    address: str | None  # as dialled; None: it connected to us
    greeted: asyncio.Future[Wire]  # what we send travels like this; cancelled when it is lost before its hello
    hello: frames.Hello | None = None
    hello_by: float = 0.0
    bytes_seen: int = 0
    is_aborting: bool = False


class HandoffEndpoint:
    """Implements `base.HandoffEndpointLike`, on one loop; `thread.EndpointThread` runs one on a thread of its own.

    The transports belong to the endpoint, which starts and closes them. Its callbacks may call it again.
    """

    def __init__(
        self,
        pool: KvPool,
        transports: Sequence[Transport],
        *,
        worker_name: str,
        epoch: int,
        bind_host: str = "127.0.0.1",
        listens: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        layout = pool.layout
        if len(layout.layers) > frames.LAYERS_MAX or pool.blocks > frames.BLOCKS_MAX:
            raise ValueError(f"at most {frames.LAYERS_MAX} layers and {frames.BLOCKS_MAX} blocks")
        self._pool = pool
        self._transports = list(transports)
        self._bind_host = bind_host
        self._listens = listens
        self._clock = clock
        self._hello = frames.encode(
            frames.Hello(HANDOFF_PROTOCOL, worker_name[:256], os.urandom(16), layout.fingerprint(), epoch, layout.shape)
        )
        self._receiver = Receiver(layout, epoch=epoch)
        self._sender = Sender(layers=len(layout.layers))
        self._on_end: dict[bytes, Callable[[ReceiveEnd], None]] = {}
        self._on_event: dict[HandoffKey, Callable[[SendReleased | SendEnd], None]] = {}
        self._peers: dict[LinkId, _Peer] = {}
        self._dialled: dict[str, LinkId] = {}
        self._dials: dict[str, asyncio.Task[LinkId]] = {}
        self._listeners: list[Listener] = []
        self._todo: deque[Instruction] = deque()
        self._is_working = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._last_link = 0
        self._stats = EndpointStats()
        self._is_closed = False

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where prefill workers connect, best first; empty when it does not listen."""
        return tuple(listener.address for listener in self._listeners)

    @property
    def layout(self) -> KvLayout:
        return self._pool.layout

    @property
    def stats(self) -> EndpointStats:
        self._stats.refusals = self._receiver.refusals
        self._stats.links = {peer.link.peer: peer.link.transport for peer in self._peers.values()}
        self._stats.receiving = self._receiver.open_tokens
        self._stats.sending = self._sender.open_keys
        return self._stats

    async def start(self) -> None:
        """Raises TransportUnavailable when none of the transports runs here."""
        self._loop = asyncio.get_running_loop()
        self._mover = mover_for(self._pool)
        self._transports = await start_transports(self._transports)
        if self._listens:
            for transport in self._transports:
                self._listeners.append(await transport.listen(self._bind_host, self._accept))

    async def aclose(self) -> None:
        """Abort everything; every callback that is due comes before this returns."""
        if self._is_closed:
            return
        self._is_closed = True
        for listener in self._listeners:
            await listener.aclose()
        await self._cancel_dials()
        self._tell_both(Close())
        for link_id in list(self._peers):
            self._abort(link_id, "closing")
        while self._tasks:
            await asyncio.wait(self._tasks)
        self._mover.close()
        await asyncio.sleep(0)  # Digests that came home while we waited are delivered by call_soon.
        if self._timer:
            self._timer.cancel()
        for transport in self._transports:
            await transport.aclose()

    async def _cancel_dials(self) -> None:
        dials = [*self._dials.values(), *(task for task in self._tasks if task.get_name() == "dial")]
        for task in dials:
            task.cancel()
        if dials:
            await asyncio.wait(dials)

    # Decode side.

    def expect(self, expectation: Expectation, on_end: Callable[[ReceiveEnd], None]) -> None:
        """Grant the blocks to whoever claims the token. `on_end` comes exactly once. Raises ValueError, IndexError."""
        self._check_open()
        self._check_blocks(expectation.groups)
        instructions = self._receiver.on(Expect(expectation), self._clock())
        self._on_end[expectation.token] = on_end
        self._carry_out(instructions)

    def cancel(self, token: bytes) -> None:
        """Give up; `on_end` follows as soon as the blocks are safe. Unknown tokens are ignored."""
        self._tell_receiver(CancelExpectation(token))

    # Prefill side.

    def open(self, order: SendOrder, on_event: Callable[[SendReleased | SendEnd], None]) -> None:
        """Connect and claim; chunks may be announced at once and are sent when granted. Raises ValueError."""
        self._check_open()
        instructions = self._sender.on(OpenOrder(order), self._clock())
        self._on_event[order.key] = on_event
        self._carry_out(instructions)

    def announce(self, key: HandoffKey, chunk: Chunk) -> None:
        """A forward pass for these blocks begins; they must stay until SendReleased. Raises ValueError, IndexError."""
        self._check_blocks(chunk.groups)
        self._tell_sender(Announce(key, chunk))

    def gather_ahead(self, keys: Iterable[HandoffKey], layer: int, stream: object) -> None:
        """From any thread, before `layer_ready`: this layer of the announced chunks was enqueued on a device's stream."""
        self._mover.gather_ahead(keys, layer, stream)

    def layer_ready(self, key: HandoffKey, layer: int) -> None:
        """The announced chunk's KV of that layer is in memory (layers may come in any order)."""
        self._tell_sender(LayerReady(key, layer))

    def abort(self, key: HandoffKey, reason: str) -> None:
        """There will be no more chunks; SendReleased and SendEnd follow. Unknown keys are ignored."""
        self._tell_sender(AbortOrder(key, reason))

    def _check_blocks(self, groups: Iterable[GroupBlocks]) -> None:
        if any(not 0 <= block < self._pool.blocks for group in groups for block in group.block_ids):
            raise IndexError(f"a block outside of the pool of {self._pool.blocks}")

    def _check_open(self) -> None:
        if self._is_closed:
            raise TransportError("the hand-off endpoint is closed")

    # The machines.

    def _tell_receiver(self, event: ReceiverEvent) -> None:
        self._carry_out(self._receiver.on(event, self._clock()))

    def _tell_sender(self, event: SenderEvent) -> None:
        self._carry_out(self._sender.on(event, self._clock()))

    def _tell_both(self, event: FrameReceived | LinkActive | LinkLostEvent | Tick | Close) -> None:
        self._tell_receiver(event)
        self._tell_sender(event)

    def _carry_out(self, instructions: list[Instruction]) -> None:
        """Instructions run in the order they were given, also those that carrying out one of them brings about."""
        self._todo.extend(instructions)
        if self._is_working:
            return
        self._is_working = True
        try:
            while self._todo:
                self._do(self._todo.popleft())
        finally:
            self._is_working = False
        self._arm_timer()

    def _arm_timer(self) -> None:
        is_greeted = all(peer.hello for peer in self._peers.values())
        if self._timer is None and not (self._receiver.is_idle and self._sender.is_idle and is_greeted):
            self._timer = self._loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = self._clock()
        for link_id, peer in list(self._peers.items()):
            received = peer.link.bytes_received
            if received != peer.bytes_seen:
                peer.bytes_seen = received
                self._tell_both(LinkActive(link_id))
            if peer.hello is None and now > peer.hello_by:
                self._abort(link_id, "said no hello")
        self._tell_both(Tick())

    def _do(self, instruction: Instruction) -> None:
        match instruction:
            case SendFrame():
                peer = self._peers.get(instruction.link)
                if peer and not peer.is_aborting:
                    self._say(peer, instruction)
            case PostReceive():
                self._post_receive(instruction)
            case PlanSend():
                self._plan(instruction)
            case PostSend():
                self._post_send(instruction)
            case ComputeDigest():
                self._mover.digest(
                    instruction.message,
                    instruction.extents,
                    lambda digest: self._tell_receiver(Digested(instruction.message, digest)),
                )
            case AbortLink():
                self._abort(instruction.link, instruction.why)
            case Dial():
                self._own(self._dial_any(instruction), "dial")
            case Emit():
                self._emit(instruction.event)

    def _emit(self, event: ReceiveEnd | SendReleased | SendEnd) -> None:
        match event:
            case ReceiveEnd():
                self._stats.received["landed" if event.is_landed else event.reason] += 1
                self._on_end.pop(event.token)(event)
            case SendEnd():
                self._mover.forget(event.key)
                self._stats.sent["landed" if event.is_landed else event.reason] += 1
                self._on_event.pop(event.key)(event)
            case SendReleased():
                self._on_event[event.key](event)

    # Messages and digests.

    def _say(self, peer: _Peer, instruction: SendFrame) -> None:
        try:
            peer.link.send_control(frames.encode(instruction.frame))
        except LinkLost:
            log.debug("frame to %s after its link was lost", peer.link.peer)

    def _post_receive(self, instruction: PostReceive) -> None:
        message, nbytes = instruction.message, instruction.nbytes

        def done(error: BaseException | None) -> None:
            if error is None:
                self._stats.kv_bytes_received += nbytes
            self._tell_receiver(MessageDone(message, error))

        if link := self._link(message.link):
            self._mover.receive(link, message, instruction.extents, nbytes, done)
        else:
            done(LinkLost("the link was dropped"))

    def _plan(self, instruction: PlanSend) -> None:
        if instruction.messages and (link := self._link(instruction.messages[0][0].link)):
            self._mover.plan(link, instruction.messages)

    def _post_send(self, instruction: PostSend) -> None:
        message, nbytes = instruction.message, instruction.nbytes
        link = self._link(message.link)

        def done(error: BaseException | None) -> None:
            if error is None:
                self._stats.kv_bytes_sent += nbytes
            self._tell_sender(MessageDone(message, error))

        def digested(digest: int) -> None:
            self._tell_sender(Digested(message, digest))

        if link and instruction.extents:
            self._mover.send(link, message, instruction.extents, nbytes, done, digested)
            return
        try:
            if link is None:
                raise LinkLost("the link was dropped")
            link.post_send(tag_of(message), (), done)
        except LinkLost as error:
            done(error)
            if instruction.extents:
                digested(0)

    def _link(self, link_id: LinkId) -> Link | None:
        peer = self._peers.get(link_id)
        return None if peer is None or peer.is_aborting else peer.link

    # Links.

    def _accept(self, link: Link) -> None:
        self._adopt(link, address=None)

    def _adopt(self, link: Link, address: str | None) -> LinkId:
        self._last_link += 1
        link_id = LinkId(self._last_link)
        peer = _Peer(link, address, self._loop.create_future(), hello_by=self._clock() + HELLO_TIMEOUT_S)
        self._peers[link_id] = peer
        if address is not None:
            self._dialled[address] = link_id

        def on_control(payload: bytes) -> None:
            self._on_control(link_id, peer, payload)

        def on_lost(error: Exception) -> None:
            self._on_lost(link_id, peer, error)

        link.start(on_control, on_lost)
        if self._is_closed:
            self._abort(link_id, "closing")
            return link_id
        try:
            link.send_control(self._hello)
        except LinkLost:
            log.debug("lost %s before the hello", link.peer)
        self._arm_timer()
        return link_id

    def _on_control(self, link_id: LinkId, peer: _Peer, payload: bytes) -> None:
        if peer.is_aborting:
            return
        try:
            frame = frames.decode(payload)
        except frames.BadFrame as error:
            self._abort(link_id, str(error))
            return
        if peer.hello is None:
            self._greet(link_id, peer, frame)
            return
        self._tell_both(FrameReceived(link_id, frame))

    def _greet(self, link_id: LinkId, peer: _Peer, frame: frames.Frame) -> None:
        if not isinstance(frame, frames.Hello) or frame.protocol != HANDOFF_PROTOCOL:
            self._abort(link_id, f"no hello of protocol {HANDOFF_PROTOCOL}")
            return
        peer.hello = frame
        log.info("linked to %s at %s over %s", frame.worker, peer.link.peer, peer.link.transport)
        layout = self._pool.layout
        if frame.fingerprint != layout.fingerprint():
            shape = layout.shape  # Its claims will be refused with the reason.
        else:
            shape = frame.shape
        try:
            sizes = sizes_for(self._pool, shape)
            self._tell_receiver(LinkGreeted(link_id, Wire(layout, shape, i_send=False, sizes=sizes)))
            peer.greeted.set_result(Wire(layout, shape, i_send=True, sizes=sizes))
        except ValueError as error:
            self._abort(link_id, str(error))

    def _on_lost(self, link_id: LinkId, peer: _Peer, error: Exception) -> None:
        self._mover.drop(peer.link)
        peer.greeted.cancel()
        del self._peers[link_id]
        if peer.address is not None and self._dialled.get(peer.address) == link_id:
            del self._dialled[peer.address]
        if not self._is_closed:
            self._stats.links_lost += 1
            log.info("lost %s: %s", peer.link.peer, error)
        self._tell_both(LinkLostEvent(link_id))

    def _abort(self, link_id: LinkId, why: str) -> None:
        peer = self._peers.get(link_id)
        if peer is None or peer.is_aborting:
            return
        peer.is_aborting = True
        if peer.address is not None and self._dialled.get(peer.address) == link_id:
            del self._dialled[peer.address]  # The next order makes a new one.
        log.log(logging.DEBUG if why == "closing" else logging.WARNING, "aborted %s: %s", peer.link.peer, why)
        self._own(peer.link.abort(), "abort")

    async def _dial_any(self, dial: Dial) -> None:
        failures: list[str] = []
        for address in dial.addresses:
            try:
                link_id = await self._connect(address)
            except (TransportError, ValueError) as error:
                failures.append(str(error))
                continue
            peer = self._peers.get(link_id)
            if peer:
                await asyncio.wait({peer.greeted})
                if not peer.greeted.cancelled() and self._link(link_id):
                    self._tell_sender(LinkUp(dial.key, link_id, peer.greeted.result()))
                    return
            failures.append(f"lost {address} at once")
        log.warning("found no way to a decode worker: %s", "; ".join(failures))
        self._tell_sender(DialFailed(dial.key, "; ".join(failures)))

    async def _connect(self, address: str) -> LinkId:
        """The one link to this address, made when there is none. Raises LinkLost, ValueError."""
        if (link_id := self._dialled.get(address)) is not None:
            return link_id
        dial = self._dials.get(address)
        if dial is None:
            dial = self._dials[address] = self._loop.create_task(self._dial(address), name=f"dial {address}")
            dial.add_done_callback(lambda _: self._dials.pop(address))
        return await asyncio.shield(dial)

    async def _dial(self, address: str) -> LinkId:
        scheme = address.partition("://")[0]
        for transport in self._transports:
            if transport.scheme == scheme:
                link = await transport.connect(address, timeout_s=DIAL_TIMEOUT_S)
                return self._adopt(link, address)
        running = ", ".join(transport.scheme for transport in self._transports)
        raise LinkLost(f"no transport for {address!r}; running: {running}")

    def _own(self, work: Coroutine[None, None, None], name: str) -> None:
        task = self._loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
