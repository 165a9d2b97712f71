"""One process's side of every hand-off: carries out what the two machines decide, on the links of its transports."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from . import frames
from .base import (
    Chunk,
    Expectation,
    GroupBlocks,
    HandoffKey,
    KvPool,
    Link,
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
    LayersReady,
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
from .mover import Mover, tag_of
from .movers import CUT_BYTES, lend_slots, mover_for, sizes_for
from .peers import Peers
from .pool import HostKvPool
from .probe import PROBE_FRAMES, ProbeReport, Probes
from .receiver import Receiver
from .sender import Sender
from .wire import Wire

log = logging.getLogger(__name__)
STAGING_BYTES = 32 << 20  # host memory, used only for ranks of other shapes


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
        staging_bytes: int = STAGING_BYTES,
        clock: Callable[[], float] = time.monotonic,
        nonce: bytes | None = None,
        make_mover: Callable[[KvPool, int], Mover] = mover_for,
    ) -> None:
        layout = pool.layout
        if len(layout.layers) > frames.LAYERS_MAX or pool.blocks > frames.BLOCKS_MAX:
            raise ValueError(f"at most {frames.LAYERS_MAX} layers and {frames.BLOCKS_MAX} blocks")
        if staging_bytes < 2 * CUT_BYTES:
            raise ValueError(f"{staging_bytes} B of staging memory; two messages are {2 * CUT_BYTES} B")
        self._pool = pool
        self._bind_host = bind_host if listens else None
        self._staging_bytes = staging_bytes
        self._clock = clock
        self._epoch = epoch
        self._make_mover = make_mover
        hello = frames.Hello(
            HANDOFF_PROTOCOL, worker_name[:256], nonce or os.urandom(16), layout.fingerprint(), epoch, layout.shape
        )
        self._peers = Peers(transports, hello, self)
        self._receiver = Receiver(layout, epoch=epoch)
        self._sender = Sender(layers=len(layout.layers))
        self._on_end: dict[bytes, Callable[[ReceiveEnd], None]] = {}
        self._on_event: dict[HandoffKey, Callable[[SendReleased | SendEnd], None]] = {}
        self._wires: dict[LinkId, Wire] = {}  # for what we send
        self._todo: deque[Instruction] = deque()
        self._is_working = False
        self._timer: asyncio.TimerHandle | None = None
        self._stats = EndpointStats()
        self._is_closed = False

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where prefill workers connect, best first; empty when it does not listen."""
        return self._peers.addresses

    @property
    def layout(self) -> KvLayout:
        return self._pool.layout

    @property
    def stats(self) -> EndpointStats:
        self._stats.refusals = self._receiver.refusals
        self._stats.links_lost = self._peers.lost
        self._stats.links = self._peers.transports
        self._stats.receiving = self._receiver.open_tokens
        self._stats.sending = self._sender.open_keys
        return self._stats

    async def start(self) -> None:
        """Raises TransportUnavailable when none of the transports runs here."""
        self._loop = asyncio.get_running_loop()
        self._mover = self._make_mover(self._pool, self._staging_bytes)
        lend_slots(self._peers.offered, self._pool, self._mover)
        self._probes = Probes(
            self._peers,
            self._mover,
            epoch=self._epoch,
            kv_memory="host" if isinstance(self._pool, HostKvPool) else "device",
            is_idle=lambda: self._receiver.is_idle and self._sender.is_idle,
        )
        await self._peers.start(self._bind_host)

    async def aclose(self) -> None:
        """Abort everything; every callback that is due comes before this returns."""
        if self._is_closed:
            return
        self._is_closed = True
        await self._peers.stop_dialling()
        self._tell_both(Close())
        await self._peers.aclose()
        self._mover.close()
        await asyncio.sleep(0)  # Digests that came home while we waited are delivered by call_soon.
        if self._timer:
            self._timer.cancel()
        await self._peers.close_transports()

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

    def gather_ahead(self, keys: Iterable[HandoffKey], layers: Sequence[int], stream: object) -> None:
        """From any thread, before `layer_ready` of the last one: layers of the chunks announced last are on a device's stream.

        All of them so far, in any order.
        """
        self._mover.gather_ahead(keys, layers, stream)

    def layer_ready(self, key: HandoffKey, layer: int) -> None:
        """The announced chunk's KV of that layer is in memory (layers may come in any order)."""
        self.layers_ready(key, (layer,))

    def layers_ready(self, key: HandoffKey, layers: Iterable[int]) -> None:
        """Several of one chunk at once: of a prefix that was cached, or of an engine that tells of no single ones."""
        found = frozenset(layers)
        self._mover.start(key, found)
        _note("computed a layer", key.token)
        self._tell_sender(LayersReady(key, found))

    def abort(self, key: HandoffKey, reason: str) -> None:
        """There will be no more chunks; SendReleased and SendEnd follow. Unknown keys are ignored."""
        self._tell_sender(AbortOrder(key, reason))

    async def probe(self, addresses: Sequence[str], *, decode_epoch: int) -> ProbeReport:
        """Measure the link that an order to these addresses would take, beside what runs on it; about a second.

        Raises LinkLost when nobody answers there, HandoffRefused ("busy", "no_room", "wrong_epoch").
        """
        self._check_open()
        return await self._probes.probe(addresses, decode_epoch)

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
        if self._timer is None and not (self._receiver.is_idle and self._sender.is_idle):
            self._timer = self._loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        for link_id in self._peers.active():
            self._tell_both(LinkActive(link_id))
        self._tell_both(Tick())

    def _do(self, instruction: Instruction) -> None:
        match instruction:
            case SendFrame():
                self._peers.say(instruction.link, instruction.frame)
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
                self._peers.abort(instruction.link, instruction.why)
            case Dial():
                self._peers.own(self._dial(instruction), "dial")
            case Emit():
                self._emit(instruction.event)

    def _emit(self, event: ReceiveEnd | SendReleased | SendEnd) -> None:
        match event:
            case ReceiveEnd():
                self._stats.received["landed" if event.is_landed else event.reason] += 1
                _note("landed" if event.is_landed else "did not land", event.token)
                self._on_end.pop(event.token)(event)
            case SendEnd():
                self._mover.forget(event.key)
                self._stats.sent["landed" if event.is_landed else event.reason] += 1
                self._on_event.pop(event.key)(event)
            case SendReleased():
                self._on_event[event.key](event)

    # Messages and digests.

    def _post_receive(self, instruction: PostReceive) -> None:
        message, nbytes = instruction.message, instruction.nbytes

        def done(error: BaseException | None) -> None:
            if error is None:
                self._stats.kv_bytes_received += nbytes
                _note("received a message", message.key.token)
            self._tell_receiver(MessageDone(message, error))

        if link := self._peers.link(message.link):
            self._mover.receive(link, message, instruction.extents, nbytes, done)
        else:
            done(LinkLost("the link was dropped"))

    def _plan(self, instruction: PlanSend) -> None:
        if instruction.messages and (link := self._peers.link(instruction.messages[0][0].link)):
            _note("began to send a chunk", instruction.key.token)
            self._mover.plan(link, instruction.messages)

    def _post_send(self, instruction: PostSend) -> None:
        message, nbytes = instruction.message, instruction.nbytes
        link = self._peers.link(message.link)

        def done(error: BaseException | None) -> None:
            if error is None:
                self._stats.kv_bytes_sent += nbytes
            self._tell_sender(MessageDone(message, error))

        def digested(digest: int) -> None:
            self._tell_sender(Digested(message, digest))

        if link and instruction.extents:
            _note("sent a message", message.key.token)
            self._mover.send(link, message, instruction.extents, nbytes, done, digested)
            return
        self._mover.skip(message)
        try:
            if link is None:
                raise LinkLost("the link was dropped")
            link.post_send(tag_of(message), (), done)
        except LinkLost as error:
            done(error)
            if instruction.extents:
                digested(0)

    # Links.

    async def _dial(self, dial: Dial) -> None:
        try:
            link_id = await self._peers.dial_any(dial.addresses)
        except LinkLost as error:
            log.warning("found no way to a decode worker: %s", error)
            self._tell_sender(DialFailed(dial.key, str(error)))
        else:
            self._tell_sender(LinkUp(dial.key, link_id, self._wires[link_id]))

    def on_greeted(self, link_id: LinkId, hello: frames.Hello) -> None:
        """For `Peers`."""
        layout = self._pool.layout
        # Who has another fingerprint is told so when it claims.
        shape = hello.shape if hello.fingerprint == layout.fingerprint() else layout.shape
        link = self._peers.link(link_id)
        assert link, "greeted on a link that is gone"
        receives, sends = (
            Wire(layout, shape, i_send=i_send, sizes=sizes_for(self._pool, shape, link, i_send=i_send))
            for i_send in (False, True)
        )
        self._tell_receiver(LinkGreeted(link_id, receives))
        self._wires[link_id] = sends

    def on_frame(self, link_id: LinkId, frame: frames.Frame) -> None:
        """For `Peers`."""
        if isinstance(frame, PROBE_FRAMES):
            self._probes.on_frame(link_id, frame)
        else:
            self._tell_both(FrameReceived(link_id, frame))

    def on_lost(self, link_id: LinkId, link: Link) -> None:
        """For `Peers`."""
        self._mover.drop(link)
        self._wires.pop(link_id, None)
        self._probes.on_lost(link_id)
        self._tell_both(LinkLostEvent(link_id))


def _note(fact: str, token: bytes) -> None:
    """For who asks where a hand-off's time goes. A token is a secret as long as it is good: its beginning tells them apart."""
    if log.isEnabledFor(logging.DEBUG):
        log.debug(fact, extra={"handoff": token[:4].hex()})
