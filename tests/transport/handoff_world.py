"""A world in virtual time where one receiver and several senders meet every order of events, loss, delay and late writes.

Everything that may happen next is an action; a seeded random source picks. The world keeps the promises that `handoff`
lists and no others: messages overtake frames, a peer learns of a lost link late, digests take their time.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from hocket.transport.base import (
    Chunk,
    Expectation,
    Extent,
    GroupBlocks,
    HandoffKey,
    ReceiveEnd,
    SendEnd,
    SendOrder,
    SendReleased,
)
from hocket.transport.frames import Frame, decode, encode
from hocket.transport.handoff import (
    AbortLink,
    AbortOrder,
    Announce,
    CancelExpectation,
    ComputeDigest,
    Dial,
    DialFailed,
    Digested,
    Emit,
    Expect,
    FrameReceived,
    Instruction,
    LayerReady,
    LinkGreeted,
    LinkId,
    LinkLost,
    LinkUp,
    MessageDone,
    MessageId,
    OpenOrder,
    PlanSend,
    PostReceive,
    PostSend,
    SendFrame,
    Tick,
)
from hocket.transport.layout import KvGroup, KvLayer, KvLayout, KvShape
from hocket.transport.receiver import Receiver
from hocket.transport.sender import Sender
from hocket.transport.wire import MessageSizes
from hocket.transport.wire import Wire as KvWire

LAYERS = 3
WINDOW = 2  # tokens that the second group's layer is wanted of, at most
LAYOUTS = [
    KvLayout("m", "r", "u8", "u8", tuple(KvLayer(str(layer), 1, 2) for layer in range(LAYERS)), KvShape((1,))),
    KvLayout(
        "m",
        "r",
        "u8",
        "u8",
        tuple(KvLayer(str(layer), 1, 2, group=layer % 2) for layer in range(LAYERS)),
        KvShape((1, 1)),
        groups=(KvGroup(), KvGroup("window", WINDOW)),
    ),
]
EPOCH = 9
TICK_S = 0.1
Action = Callable[[], None]
Cell = tuple[int, int]  # (layer, block)


def cells_of(extents: Sequence[Extent]) -> list[Cell]:
    """What a message reads or writes, in its order."""
    return [(extent.layer, block) for extent in extents for block in extent.block_ids]


@dataclass
class Side:
    """One machine's end of a link."""

    inbox: deque[bytes] = field(default_factory=deque)
    posted: dict[MessageId, list[Cell]] = field(default_factory=dict)
    is_open: bool = True
    is_aborting: bool = False


@dataclass
class Wire:
    """A link between the receiver and one sender."""

    number: LinkId
    sender: SenderProcess
    near: Side = field(default_factory=Side)  # the sender's
    far: Side = field(default_factory=Side)  # the receiver's
    half_written: set[MessageId] = field(default_factory=set)


@dataclass
class SenderProcess:
    """A prefill worker and its engine: one order."""

    order: SendOrder
    chunks: list[Chunk]
    machine: Sender = field(default_factory=lambda: Sender(layers=LAYERS))
    announced: int = 0
    ready: int = 0  # layers of the last announced chunk
    events: list[SendReleased | SendEnd] = field(default_factory=list)
    reading: int = 0  # sends and digests under way
    is_alive: bool = True
    paused_until: float = 0.0
    dials: list[HandoffKey] = field(default_factory=list)
    digests: list[PostSend] = field(default_factory=list)


class World:
    """One prompt and everybody who works on it."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 100.0
        self.are_faults_on = True
        self.layout = self.rng.choice(LAYOUTS)
        computed, bulk = self.rng.choice([2, 2, 8]), self.rng.choice([2, 8, 100])
        self.sizes = MessageSizes(self.rng.choice([2, 6, 100]), computed, bulk)
        self.first_block = self.rng.choice([0, 0, 2])
        count = self.rng.randint(0, 6)
        self.blocks = self.first_block + count
        self.truth = [[self.rng.getrandbits(32) for _ in range(self.blocks)] for _ in range(LAYERS)]
        self.groups = tuple(self.place(kind.span_tokens) for kind in self.layout.groups)
        self.memory: dict[tuple[int, int], int] = {}
        self.token = self.rng.randbytes(16)
        self.receiver = self.make_receiver()
        self.digests: list[ComputeDigest] = []
        self.received: list[ReceiveEnd] = []
        self.is_expected = False
        self.wires: list[Wire] = []
        self.senders: list[SenderProcess] = []
        self.corruptions = self.rng.choice([0, 0, 0, 1, 2])
        self.deaths = self.rng.choice([0, 0, 1, 2])
        self.cuts = self.rng.choice([0, 0, 1, 2, 4])
        self.pauses = self.rng.choice([0, 0, 1, 2])
        self.engine_aborts = self.rng.choice([0, 0, 0, 1])
        self.cancels = self.rng.choice([0, 0, 0, 0, 1])
        self.deliveries_max = self.rng.choice([1, 1, 2, 3])

    def make_receiver(self) -> Receiver:
        return Receiver(self.layout, epoch=EPOCH)

    def place(self, window: int) -> GroupBlocks:
        """Where a group's wanted blocks go."""
        first = max(self.first_block, self.blocks - window) if window else self.first_block
        return GroupBlocks(first, tuple(self.rng.sample(range(100, 140), self.blocks - first)))

    # The run.

    def run(self) -> None:
        """Faults at will for a while, then none: everybody who lives must finish."""
        for _ in range(400):
            self.step()
        self.are_faults_on = False
        if not self.is_expected:
            self.expect()
        limit = self.now + 60.0
        while self.now < limit and not self.is_finished:
            self.step()
        assert self.is_finished, "somebody never finished"
        self.check_end()

    @property
    def is_finished(self) -> bool:
        ends = [sender.events[-1:] for sender in self.senders if sender.is_alive]
        return len(self.received) == 1 and all(end and isinstance(end[0], SendEnd) for end in ends)

    def step(self) -> None:
        actions = list(self.actions())
        if self.rng.random() < 0.15 or not actions:
            self.tick()
        else:
            self.rng.choice(actions)()

    def tick(self) -> None:
        self.now += TICK_S
        if not self.receiver.is_idle:
            self.tell_receiver(Tick())
        for sender in self.running():
            if not sender.machine.is_idle:
                self.tell_sender(sender, Tick())

    def running(self) -> list[SenderProcess]:
        return [sender for sender in self.senders if sender.is_alive and self.now >= sender.paused_until]

    # What may happen next.

    def actions(self) -> Iterator[Action]:
        if not self.is_expected:
            yield self.expect
        if len(self.senders) < self.deliveries_max and (self.are_faults_on or not self.senders):
            yield self.deliver_job
        for wire in self.wires:
            yield from self.wire_actions(wire)
        for compute in self.digests:
            yield partial(self.finish_digest, compute)
        for sender in self.running():
            yield from self.sender_actions(sender)
        if self.are_faults_on:
            yield from self.faults()

    def wire_actions(self, wire: Wire) -> Iterator[Action]:
        can_send = wire.sender in self.running()
        if wire.far.inbox and wire.far.is_open:
            yield partial(self.deliver_to_receiver, wire)
        if can_send and wire.near.inbox and wire.near.is_open:
            yield partial(self.deliver_to_sender, wire)
        if can_send and wire.near.is_open and wire.far.is_open:
            for message in wire.near.posted:
                if message in wire.far.posted:
                    yield partial(self.move, wire, message)
        for side in (wire.near, wire.far):
            is_dying = side.is_open and (side.is_aborting or not (wire.near.is_open and wire.far.is_open))
            if is_dying and (side is wire.far or can_send):
                yield partial(self.close, wire, side)

    def sender_actions(self, sender: SenderProcess) -> Iterator[Action]:
        for key in sender.dials:
            yield partial(self.finish_dial, sender, key)
        for compute in sender.digests:
            yield partial(self.finish_sender_digest, sender, compute)
        if sender.ready < LAYERS and sender.announced:
            yield partial(self.compute_layer, sender)
        elif sender.announced < len(sender.chunks):
            yield partial(self.announce, sender)

    def faults(self) -> Iterator[Action]:
        if self.rng.random() > 0.05:
            return
        if self.cuts and (wires := [wire for wire in self.wires if wire.near.is_open and wire.far.is_open]):
            yield partial(self.cut, self.rng.choice(wires))
        for sender in self.running():
            if self.deaths:
                yield partial(self.die, sender)
            if self.pauses:
                yield partial(self.pause, sender)
            if self.engine_aborts:
                yield partial(self.engine_abort, sender)
        if self.cancels and self.is_expected:
            yield self.cancel

    # Doing it.

    def expect(self) -> None:
        self.is_expected = True
        attempt = 1
        expectation = Expectation(self.token, attempt, self.groups, self.blocks, self.rng.choice([8.0, 20.0]))
        self.tell_receiver(Expect(expectation))

    def deliver_job(self) -> None:
        key = HandoffKey(self.token, 1, len(self.senders) + 1)
        order = SendOrder(key, ("sim://0", "sim://1"), EPOCH, self.layout.fingerprint(), self.blocks, 20.0)
        chunks, start = [], 0
        while start < self.blocks:
            end = self.rng.randint(start + 1, self.blocks)
            groups = []
            for kind in self.layout.groups:
                first = min(end, max(start, self.blocks - WINDOW - 1)) if kind.span_tokens else start
                groups.append(GroupBlocks(first, tuple(range(first, end))))
            chunks.append(Chunk(start, end, tuple(groups)))
            start = end
        sender = SenderProcess(order, chunks)
        self.senders.append(sender)
        self.tell_sender(sender, OpenOrder(order))

    def announce(self, sender: SenderProcess) -> None:
        sender.announced += 1
        sender.ready = 0
        self.tell_sender(sender, Announce(sender.order.key, sender.chunks[sender.announced - 1]))

    def compute_layer(self, sender: SenderProcess) -> None:
        sender.ready += 1
        self.tell_sender(sender, LayerReady(sender.order.key, sender.ready - 1))

    def finish_dial(self, sender: SenderProcess, key: HandoffKey) -> None:
        sender.dials.remove(key)
        if self.are_faults_on and self.rng.random() < 0.1:
            self.tell_sender(sender, DialFailed(key, "nobody"))
            return
        wire = Wire(LinkId(len(self.wires) + 1), sender)
        self.wires.append(wire)
        shape = self.layout.shape
        self.tell_receiver(LinkGreeted(wire.number, KvWire(self.layout, shape, i_send=False, sizes=self.sizes)))
        self.tell_sender(sender, LinkUp(key, wire.number, KvWire(self.layout, shape, i_send=True, sizes=self.sizes)))

    def finish_digest(self, compute: ComputeDigest) -> None:
        self.digests.remove(compute)
        values = [self.memory[cell] for cell in cells_of(compute.extents)]
        self.tell_receiver(Digested(compute.message, digest_of(values)))

    def finish_sender_digest(self, sender: SenderProcess, compute: PostSend) -> None:
        sender.digests.remove(compute)
        sender.reading -= 1
        values = [self.truth[layer][block] for layer, block in cells_of(compute.extents)]
        self.tell_sender(sender, Digested(compute.message, digest_of(values)))

    def deliver_to_receiver(self, wire: Wire) -> None:
        self.tell_receiver(FrameReceived(wire.number, decode(wire.far.inbox.popleft())))

    def deliver_to_sender(self, wire: Wire) -> None:
        self.tell_sender(wire.sender, FrameReceived(wire.number, decode(wire.near.inbox.popleft())))

    def move(self, wire: Wire, message: MessageId) -> None:
        """Write half of a message, or the rest of it and say so on both sides."""
        source, target = wire.near.posted[message], wire.far.posted[message]
        if len(source) == len(target):
            half = len(source) // 2
            is_rest = message in wire.half_written
            self.write(*((source[half:], target[half:]) if is_rest else (source[:half], target[:half])))
            if not is_rest:
                wire.half_written.add(message)
                return
        error = None if len(source) == len(target) else OSError("short")
        del wire.near.posted[message], wire.far.posted[message]
        wire.sender.reading -= 1
        done = [
            partial(self.tell_receiver, MessageDone(message, error)),
            partial(self.tell_sender, wire.sender, MessageDone(message)),
        ]
        self.rng.shuffle(done)
        for tell in done:
            tell()

    def write(self, source: list[Cell], target: list[Cell]) -> None:
        assert not self.received or not target, "a block was written after its expectation had ended"
        for block, place in zip(source, target, strict=True):
            value = self.truth[block[0]][block[1]]
            if self.corruptions and self.are_faults_on and self.rng.random() < 0.05:
                self.corruptions -= 1
                value ^= 1
            self.memory[place] = value

    def close(self, wire: Wire, side: Side) -> None:
        """One side's link ends: first its messages, then the link."""
        side.is_open = False
        posted = list(side.posted)
        self.rng.shuffle(posted)
        side.posted.clear()
        if side is wire.far:
            for message in posted:
                self.tell_receiver(MessageDone(message, OSError("lost")))
            self.tell_receiver(LinkLost(wire.number))
        else:
            wire.sender.reading -= len(posted)
            for message in posted:
                self.tell_sender(wire.sender, MessageDone(message, OSError("lost")))
            self.tell_sender(wire.sender, LinkLost(wire.number))

    def cut(self, wire: Wire) -> None:
        self.cuts -= 1
        self.close(wire, self.rng.choice([wire.near, wire.far]))

    def die(self, sender: SenderProcess) -> None:
        self.deaths -= 1
        sender.is_alive = False
        for wire in self.wires:
            if wire.sender is sender:
                wire.near.is_open = False

    def pause(self, sender: SenderProcess) -> None:
        self.pauses -= 1
        sender.paused_until = self.now + self.rng.choice([1.0, 4.0, 15.0])

    def engine_abort(self, sender: SenderProcess) -> None:
        self.engine_aborts -= 1
        sender.announced, sender.ready = len(sender.chunks), LAYERS
        self.tell_sender(sender, AbortOrder(sender.order.key, "aborted"))

    def cancel(self) -> None:
        self.cancels -= 1
        self.tell_receiver(CancelExpectation(self.token))

    # Carrying out.

    def tell_receiver(
        self,
        event: Expect | CancelExpectation | FrameReceived | LinkGreeted | MessageDone | Digested | LinkLost | Tick,
    ) -> None:
        for instruction in self.receiver.on(event, self.now):
            self.carry_out_for_receiver(instruction)

    def carry_out_for_receiver(self, instruction: Instruction) -> None:
        match instruction:
            case SendFrame():
                self.send_frame(instruction.link, instruction.frame, is_from_sender=False)
            case PostReceive():
                wire = self.wires[instruction.message.link - 1]
                assert not self.received, "a receive was posted after the end"
                if wire.far.is_open and not wire.far.is_aborting:
                    assert instruction.nbytes == 2 * len(cells_of(instruction.extents))
                    wire.far.posted[instruction.message] = cells_of(instruction.extents)
                else:
                    self.tell_receiver(MessageDone(instruction.message, OSError("gone")))
            case ComputeDigest():
                self.digests.append(instruction)
            case AbortLink():
                self.wires[instruction.link - 1].far.is_aborting = True
            case Emit():
                assert isinstance(instruction.event, ReceiveEnd)
                self.check_received(instruction.event)
            case _:
                raise AssertionError(instruction)

    def tell_sender(
        self,
        sender: SenderProcess,
        event: OpenOrder
        | Announce
        | LayerReady
        | AbortOrder
        | LinkUp
        | DialFailed
        | FrameReceived
        | MessageDone
        | Digested
        | LinkLost
        | Tick,
    ) -> None:
        if sender.is_alive:
            for instruction in sender.machine.on(event, self.now):
                self.carry_out_for_sender(sender, instruction)

    def carry_out_for_sender(self, sender: SenderProcess, instruction: Instruction) -> None:
        match instruction:
            case SendFrame():
                self.send_frame(instruction.link, instruction.frame, is_from_sender=True)
            case PostSend():
                wire = self.wires[instruction.message.link - 1]
                sender.reading += 1
                if instruction.extents:
                    sender.reading += 1
                    sender.digests.append(instruction)
                if wire.near.is_open and not wire.near.is_aborting:
                    wire.near.posted[instruction.message] = cells_of(instruction.extents)
                else:
                    sender.reading -= 1
                    self.tell_sender(sender, MessageDone(instruction.message, OSError("gone")))
            case PlanSend():
                assert all(nbytes == 2 * len(cells_of(extents)) for _, extents, nbytes in instruction.messages)
            case AbortLink():
                self.wires[instruction.link - 1].near.is_aborting = True
            case Dial():
                sender.dials.append(instruction.key)
            case Emit():
                assert not isinstance(instruction.event, ReceiveEnd)
                self.check_sent(sender, instruction.event)
            case _:
                raise AssertionError(instruction)

    def send_frame(self, link: LinkId, frame: Frame, *, is_from_sender: bool) -> None:
        wire = self.wires[link - 1]
        mine, theirs = (wire.near, wire.far) if is_from_sender else (wire.far, wire.near)
        if mine.is_open and not mine.is_aborting and theirs.is_open:
            theirs.inbox.append(encode(frame))

    # What must hold.

    def check_received(self, end: ReceiveEnd) -> None:
        assert not self.received, "ended twice"
        self.received.append(end)
        assert not any(wire.far.posted for wire in self.wires), "blocks were given back while a receive was posted"
        good = end.good_token
        assert 0 <= good <= self.blocks
        for layer in range(LAYERS):
            first, block_ids = self.groups[self.layout.layers[layer].group]
            there = [self.memory[layer, block] for block in block_ids[: max(0, good - first)]]
            assert there == self.truth[layer][first : max(first, good)], "a good block is wrong"
        if end.is_landed:
            assert good == self.blocks
            assert not end.reason
        else:
            assert end.reason in ("timeout", "cancelled", "digest", "sender_failed", "link_lost", "stalled"), end.reason

    def check_sent(self, sender: SenderProcess, event: SendReleased | SendEnd) -> None:
        kinds = [SendReleased, SendEnd]
        assert isinstance(event, kinds[len(sender.events)]), "released once, then ended once"
        sender.events.append(event)
        assert not sender.reading, "source blocks were given back while something read them"
        if isinstance(event, SendEnd) and event.is_landed:
            assert self.received, "landed for the sender before it landed"
            assert self.received[0].is_landed

    def check_end(self) -> None:
        assert not self.digests
        assert self.receiver.is_idle or not self.receiver.open_tokens


def digest_of(values: list[int]) -> int:
    return hash(tuple(values)) & (1 << 64) - 1
