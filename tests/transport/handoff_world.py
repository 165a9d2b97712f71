"""A world in virtual time where one receiver and several senders meet every order of events, loss, delay and late writes.

Everything that may happen next is an action; a seeded random source picks. The world keeps the promises that `handoff`
lists and no others: messages overtake frames, a peer learns of a lost link late, digests take their time, a message may
be half written when its link ends. Blocks are few: what one request gives back, another gets at once and fills.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from math import lcm

from handoff_parts import (
    CELL_BYTES,
    LAYERS,
    Blocks,
    Cell,
    Job,
    Prefill,
    Request,
    Side,
    Wire,
    cells_of,
    cut_into_chunks,
    digest_of,
    make_layouts,
)

from hocket.transport import errors
from hocket.transport.base import Expectation, GroupBlocks, HandoffKey, ReceiveEnd, SendEnd, SendOrder, SendReleased
from hocket.transport.frames import Claim, Frame, Grant, Refuse, decode, encode
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
    LayersReady,
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
    ReceiverEvent,
    SenderEvent,
    SendFrame,
    Tick,
)
from hocket.transport.receiver import Receiver
from hocket.transport.sender import Sender
from hocket.transport.wire import MessageSizes
from hocket.transport.wire import Wire as KvWire

EPOCH = 9
TICK_S = 0.1
PREFILLS_MAX = 3
WHYS = {"stalled", "did not drain"}  # for two machines of ours there is no other reason to abort a link
Action = Callable[[], None]


class World:
    """Some prompts and everybody who works on them."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.now = 100.0
        self.are_faults_on = True
        self.layout, self.prefill_layout = make_layouts(rng)
        self.sizes = MessageSizes(rng.choice([12, 20, 200]), rng.choice([2, 2, 8]), rng.choice([2, 8, 100]))
        self.requests = [self.make_request() for _ in range(rng.choice([1, 2, 2, 3]))]
        needed = [sum(request.blocks_needed(self.layout)) for request in self.requests]
        self.pool = Blocks(self.layout, max(needed) + rng.randint(0, 3))
        self.receiver = self.make_receiver()
        self.receiver_paused_until = 0.0
        self.backlog: deque[ReceiverEvent] = deque()  # what comes while it is stopped
        self.digests: list[ComputeDigest] = []
        self.wires: list[Wire] = []
        self.prefills: list[Prefill] = []
        self.seen: Counter[str] = Counter()  # of what makes a world worth running
        self.corruptions = rng.choice([0, 0, 0, 1, 2])
        self.deaths = rng.choice([0, 0, 1, 2])
        self.cuts = rng.choice([0, 0, 1, 2, 4])
        self.pauses = rng.choice([0, 0, 1, 2])
        self.receiver_pauses = rng.choice([0, 0, 0, 1, 2])
        self.engine_aborts = rng.choice([0, 0, 0, 1])
        self.cancels = rng.choice([0, 0, 0, 1, 2])

    def make_request(self) -> Request:
        rng = self.rng
        unit = lcm(*self.layout.shape.block_tokens)
        hit_tokens = rng.choice([0, 0, unit])
        end_token = hit_tokens + rng.randint(0, 6)
        truth = [[rng.getrandbits(32) for _ in range(end_token)] for _ in range(LAYERS)]
        attempt, timeout_s, jobs_max = rng.choice([1, 1, 1, 2]), rng.choice([8.0, 20.0]), rng.choice([1, 1, 2, 3, 4])
        return Request(rng.randbytes(16), attempt, end_token, hit_tokens, timeout_s, jobs_max, truth)

    def make_receiver(self) -> Receiver:
        return Receiver(self.layout, epoch=EPOCH)

    def make_sender(self) -> Sender:
        return Sender(layers=LAYERS)

    # The run.

    def run(self) -> None:
        """Faults at will for a while, then none: everybody who lives must finish."""
        for _ in range(500):
            self.step()
        self.are_faults_on = False
        limit = self.now + 90.0
        while self.now < limit and not self.is_finished:
            self.step()
        assert self.is_finished, "somebody never finished"
        self.check_end()

    @property
    def is_finished(self) -> bool:
        if self.backlog or any(request.end is None for request in self.requests):
            return False
        return all(
            len(job.events) == 2 for prefill in self.prefills if prefill.is_alive for job in prefill.jobs.values()
        )

    @property
    def is_receiver_running(self) -> bool:
        return self.now >= self.receiver_paused_until

    def step(self) -> None:
        if self.backlog and self.is_receiver_running:
            self.tell_receiver(self.backlog.popleft())
            return
        actions = list(self.actions())
        if self.rng.random() < 0.15 or not actions:
            self.tick()
        else:
            self.rng.choice(actions)()

    def tick(self) -> None:
        self.now += TICK_S
        if self.is_receiver_running and not self.backlog and not self.receiver.is_idle:
            self.tell_receiver(Tick())
        for prefill in self.running():
            if not prefill.machine.is_idle:
                self.tell_sender(prefill, Tick())

    def running(self) -> list[Prefill]:
        return [prefill for prefill in self.prefills if prefill.is_alive and self.now >= prefill.paused_until]

    # What may happen next.

    def actions(self) -> Iterator[Action]:
        running = self.running()
        if self.is_receiver_running:
            yield from self.receiver_actions()
        for request in self.requests:
            if len(request.jobs) < request.jobs_max and (self.are_faults_on or not request.jobs):
                yield partial(self.deliver_job, request)
        for wire in self.wires:
            if wire.near.is_open or wire.far.is_open:
                yield from self.wire_actions(wire, can_send=wire.sender in running)
        for prefill in running:
            yield from self.sender_actions(prefill)
        if self.are_faults_on and self.rng.random() < 0.05:
            yield from self.faults(running)

    def receiver_actions(self) -> Iterator[Action]:
        for request in self.requests:
            if not request.is_expected and sum(request.blocks_needed(self.layout)) <= len(self.pool.free):
                yield partial(self.expect, request)
        for compute in self.digests:
            yield partial(self.finish_digest, compute)

    def wire_actions(self, wire: Wire, *, can_send: bool) -> Iterator[Action]:
        near, far = wire.near, wire.far
        can_receive = self.is_receiver_running
        if can_receive and far.inbox and far.is_open:
            yield partial(self.deliver_to_receiver, wire)
        if can_send and near.inbox and near.is_open:
            yield partial(self.deliver_to_sender, wire)
        if can_send and wire.is_whole:
            for message in near.posted:
                if message in far.posted:
                    yield partial(self.move, wire, message)  # A stopped receiver is written to all the same.
        for side, is_running in ((near, can_send), (far, can_receive)):
            if is_running and side.is_open and (side.is_aborting or not wire.is_whole):
                yield partial(self.close, wire, side)

    def sender_actions(self, prefill: Prefill) -> Iterator[Action]:
        for dial in prefill.dials:
            if self.is_receiver_running:
                yield partial(self.finish_dial, prefill, dial)
        for compute in prefill.digests:
            yield partial(self.finish_sender_digest, prefill, compute)
        for job in prefill.jobs.values():
            if job.ready < LAYERS and job.announced:
                yield partial(self.compute_layer, prefill, job)
            elif job.announced < len(job.chunks):
                yield partial(self.announce, prefill, job)

    def faults(self, running: list[Prefill]) -> Iterator[Action]:
        if self.cuts and (wires := [wire for wire in self.wires if wire.is_whole]):
            yield partial(self.cut, self.rng.choice(wires))
        for prefill in running:
            if self.deaths:
                yield partial(self.die, prefill)
            if self.pauses:
                yield partial(self.pause, prefill)
            if self.engine_aborts and prefill.jobs:
                yield partial(self.engine_abort, prefill)
        if self.receiver_pauses and self.is_receiver_running:
            yield self.pause_receiver
        if self.cancels and self.is_receiver_running:
            expected = [request for request in self.requests if request.is_expected and not request.end]
            if expected:
                yield partial(self.cancel, self.rng.choice(expected))

    # Doing it: the engines.

    def expect(self, request: Request) -> None:
        request.is_expected = True
        groups = []
        for first, count in zip(request.first_blocks(self.layout), request.blocks_needed(self.layout), strict=True):
            block_ids = self.pool.take(request, count, self.rng)
            self.seen["reused"] += not self.pool.used.isdisjoint(block_ids)
            groups.append(GroupBlocks(first, tuple(block_ids)))
        request.groups = tuple(groups)
        self.tell_receiver(
            Expect(Expectation(request.token, request.attempt, request.groups, request.end_token, request.timeout_s))
        )

    def next_key(self, request: Request) -> HandoffKey:
        """The router tries again, or the queue delivers again; sometimes it is an older job that comes late."""
        attempt, delivery = max(request.jobs, default=(1, 0))
        newer = [(attempt, delivery + 1), (attempt + 1, 1)]
        older = [(attempt - 1, 5), (attempt, delivery - 1)] if self.rng.random() < 0.2 else []
        older = [key for key in older if min(key) > 0 and key not in request.jobs]
        request.jobs.append(self.rng.choice(older or (newer if request.jobs else newer[:1])))
        return HandoffKey(request.token, *request.jobs[-1])

    def deliver_job(self, request: Request) -> None:
        key = self.next_key(request)
        prefill = self.rng.choice([*self.running(), None])
        if prefill is None or key in prefill.jobs:
            prefill = (
                self.rng.choice([*self.running()]) if self._has_enough_prefills(key) else Prefill(self.make_sender())
            )
            if prefill not in self.prefills:
                self.prefills.append(prefill)
        epoch = EPOCH - (self.rng.random() < 0.05)
        fingerprint = self.layout.fingerprint()
        order = SendOrder(key, ("sim://0", "sim://1"), epoch, fingerprint, request.end_token, 20.0)
        job = Job(request, order, cut_into_chunks(self.rng, self.prefill_layout, request.end_token), {})
        prefill.jobs[key] = job
        self.tell_sender(prefill, OpenOrder(order))

    def _has_enough_prefills(self, key: HandoffKey) -> bool:
        free = [prefill for prefill in self.running() if key not in prefill.jobs]
        return len(free) == len(self.running()) >= PREFILLS_MAX

    def announce(self, prefill: Prefill, job: Job) -> None:
        job.announced += 1
        job.ready = 0
        self.tell_sender(prefill, Announce(job.order.key, job.chunks[job.announced - 1]))

    def compute_layer(self, prefill: Prefill, job: Job) -> None:
        if not job.events:
            job.compute(self.prefill_layout, job.ready)
        job.ready += 1
        self.tell_sender(prefill, LayersReady(job.order.key, frozenset((job.ready - 1,))))

    # Doing it: links, messages, digests.

    def finish_dial(self, prefill: Prefill, dial: Dial) -> None:
        prefill.dials.remove(dial)
        if self.are_faults_on and self.rng.random() < 0.1:
            self.tell_sender(prefill, DialFailed(dial.key, "nobody"))
            return
        address = dial.addresses[0]
        mine = [wire for wire in self.wires if wire.sender is prefill and wire.address == address]
        wire = next((wire for wire in mine if wire.near.is_open and not wire.near.is_aborting), None)
        if wire is None:
            wire = Wire(LinkId(len(self.wires) + 1), prefill, address)
            self.wires.append(wire)
            theirs = self.prefill_layout.shape
            self.tell_receiver(LinkGreeted(wire.number, KvWire(self.layout, theirs, i_send=False, sizes=self.sizes)))
        kv_wire = KvWire(self.prefill_layout, self.layout.shape, i_send=True, sizes=self.sizes)
        self.tell_sender(prefill, LinkUp(dial.key, wire.number, kv_wire))

    def finish_digest(self, compute: ComputeDigest) -> None:
        self.digests.remove(compute)
        values = [self.pool.memory[cell] for cell in cells_of(self.layout, compute.extents)]
        self.tell_receiver(Digested(compute.message, digest_of(values)))

    def finish_sender_digest(self, prefill: Prefill, compute: PostSend) -> None:
        prefill.digests.remove(compute)
        job = prefill.jobs[compute.message.key]
        job.reading -= 1
        values = job.read(cells_of(self.prefill_layout, compute.extents))
        self.tell_sender(prefill, Digested(compute.message, digest_of(values)))

    def deliver_to_receiver(self, wire: Wire) -> None:
        frame = decode(wire.far.inbox.popleft())
        if isinstance(frame, Claim):
            request = self.request_of(frame.key.token)
            request.newest_claimed = max(request.newest_claimed, (frame.key.attempt, frame.key.delivery))
        self.tell_receiver(FrameReceived(wire.number, frame))

    def deliver_to_sender(self, wire: Wire) -> None:
        self.tell_sender(wire.sender, FrameReceived(wire.number, decode(wire.near.inbox.popleft())))

    def move(self, wire: Wire, message: MessageId) -> None:
        """Write half of a message, or the rest of it and say so on both sides."""
        source, target = wire.near.posted[message], wire.far.posted[message]
        job = wire.sender.jobs[message.key]
        if len(source) == len(target):
            half = len(source) // 2
            is_rest = message in wire.half_written
            part = slice(half, None) if is_rest else slice(0, half)
            self.write(message, job.read(source[part]), target[part])
            if not is_rest:
                wire.half_written.add(message)
                return
        error = None if len(source) == len(target) else OSError("short")
        del wire.near.posted[message], wire.far.posted[message]
        job.reading -= 1
        done = [
            partial(self.tell_receiver, MessageDone(message, error)),
            partial(self.tell_sender, wire.sender, MessageDone(message)),
        ]
        self.rng.shuffle(done)
        for tell in done:
            tell()

    def write(self, message: MessageId, values: list[int], target: list[Cell]) -> None:
        request = self.request_of(message.key.token)
        for cell, value in zip(target, values, strict=True):
            assert self.pool.owner.get(cell[1]) is request, "a block was written after its expectation had ended"
            assert request.writer == (message.link, message.transfer), "somebody wrote whose grant was over"
            is_wrong = self.corruptions and self.are_faults_on and self.rng.random() < 0.05
            self.corruptions -= bool(is_wrong)
            self.pool.memory[cell] = value ^ bool(is_wrong)

    def close(self, wire: Wire, side: Side) -> None:
        """One side's link ends: first its messages, then the link."""
        side.is_open = False
        posted = list(side.posted)
        self.seen["half written at the end of its link"] += not wire.half_written.isdisjoint(posted)
        self.rng.shuffle(posted)
        side.posted.clear()
        if side is wire.far:
            for message in posted:
                self.tell_receiver(MessageDone(message, errors.LinkLost("lost")))
            self.tell_receiver(LinkLost(wire.number))
        else:
            for message in posted:
                wire.sender.jobs[message.key].reading -= 1
                self.tell_sender(wire.sender, MessageDone(message, errors.LinkLost("lost")))
            self.tell_sender(wire.sender, LinkLost(wire.number))

    # Doing it: faults.

    def cut(self, wire: Wire) -> None:
        self.cuts -= 1
        self.close(wire, self.rng.choice([wire.near, wire.far]) if self.is_receiver_running else wire.near)

    def die(self, prefill: Prefill) -> None:
        self.deaths -= 1
        prefill.is_alive = False
        for wire in self.wires:
            if wire.sender is prefill:
                wire.near.is_open = False

    def pause(self, prefill: Prefill) -> None:
        self.pauses -= 1
        self.seen["pause"] += bool(prefill.jobs)
        prefill.paused_until = self.now + self.rng.choice([1.0, 4.0, 15.0])

    def pause_receiver(self) -> None:
        self.receiver_pauses -= 1
        self.receiver_paused_until = self.now + self.rng.choice([1.0, 4.0, 15.0])

    def engine_abort(self, prefill: Prefill) -> None:
        self.engine_aborts -= 1
        job = self.rng.choice(list(prefill.jobs.values()))
        job.announced, job.ready = len(job.chunks), LAYERS
        self.tell_sender(prefill, AbortOrder(job.order.key, "aborted"))

    def cancel(self, request: Request) -> None:
        self.cancels -= 1
        self.tell_receiver(CancelExpectation(request.token))

    # Carrying out.

    def tell_receiver(self, event: ReceiverEvent) -> None:
        if not self.is_receiver_running:
            self.backlog.append(event)
            return
        for instruction in self.receiver.on(event, self.now):
            self.carry_out_for_receiver(instruction)

    def carry_out_for_receiver(self, instruction: Instruction) -> None:
        match instruction:
            case SendFrame():
                self.check_said(instruction)
                self.send_frame(instruction.link, instruction.frame, is_from_sender=False)
            case PostReceive():
                wire = self.wires[instruction.message.link - 1]
                request = self.request_of(instruction.message.key.token)
                assert not request.end, "a receive was posted after the end"
                if wire.far.is_open and not wire.far.is_aborting:
                    cells = cells_of(self.layout, instruction.extents)
                    assert instruction.nbytes == CELL_BYTES * len(cells) <= self.sizes.bytes_max
                    wire.far.posted[instruction.message] = cells
                else:
                    self.tell_receiver(MessageDone(instruction.message, errors.LinkLost("gone")))
            case ComputeDigest():
                self.digests.append(instruction)
            case AbortLink():
                assert instruction.why in WHYS, instruction.why
                self.wires[instruction.link - 1].far.is_aborting = True
            case Emit():
                assert isinstance(instruction.event, ReceiveEnd)
                self.check_received(instruction.event)
            case _:
                raise AssertionError(instruction)

    def tell_sender(self, prefill: Prefill, event: SenderEvent) -> None:
        if prefill.is_alive:
            for instruction in prefill.machine.on(event, self.now):
                self.carry_out_for_sender(prefill, instruction)

    def carry_out_for_sender(self, prefill: Prefill, instruction: Instruction) -> None:
        match instruction:
            case SendFrame():
                self.send_frame(instruction.link, instruction.frame, is_from_sender=True)
            case PostSend():
                wire = self.wires[instruction.message.link - 1]
                job = prefill.jobs[instruction.message.key]
                job.reading += 1
                if instruction.extents:
                    job.reading += 1
                    prefill.digests.append(instruction)
                if wire.near.is_open and not wire.near.is_aborting:
                    wire.near.posted[instruction.message] = cells_of(self.prefill_layout, instruction.extents)
                else:
                    job.reading -= 1
                    self.tell_sender(prefill, MessageDone(instruction.message, errors.LinkLost("gone")))
            case PlanSend():
                for _, extents, nbytes in instruction.messages:
                    assert nbytes == CELL_BYTES * len(cells_of(self.prefill_layout, extents))
            case AbortLink():
                assert instruction.why in WHYS, instruction.why
                self.wires[instruction.link - 1].near.is_aborting = True
            case Dial():
                prefill.dials.append(instruction)
            case Emit():
                assert not isinstance(instruction.event, ReceiveEnd)
                self.check_sent(prefill.jobs[instruction.event.key], instruction.event)
            case _:
                raise AssertionError(instruction)

    def send_frame(self, link: LinkId, frame: Frame, *, is_from_sender: bool) -> None:
        wire = self.wires[link - 1]
        mine, theirs = (wire.near, wire.far) if is_from_sender else (wire.far, wire.near)
        if mine.is_open and not mine.is_aborting and theirs.is_open:
            theirs.inbox.append(encode(frame))

    # What must hold.

    def request_of(self, token: bytes) -> Request:
        return next(request for request in self.requests if request.token == token)

    def check_said(self, said: SendFrame) -> None:
        match said.frame:
            case Grant(key=wire_key, transfer=transfer):
                request = self.request_of(wire_key.token)
                self.seen[request.replaced_by(wire_key.key)] += 1
                assert not self.receives_of(request), "a second writer was granted beside the first"
                request.grant(self.wires[said.link - 1].sender.jobs[wire_key.key].order, EPOCH, (said.link, transfer))
            case Refuse(key=wire_key, reason="stale_attempt"):
                request, key = self.request_of(wire_key.token), (wire_key.attempt, wire_key.delivery)
                assert key <= max(request.newest_claimed, (request.attempt, 0)), "the newest attempt was refused"

    def receives_of(self, request: Request) -> list[MessageId]:
        """Posted receives that somebody may fill."""
        return [message for wire in self.wires for message in wire.far.posted if message.key.token == request.token]

    def check_received(self, end: ReceiveEnd) -> None:
        request = self.request_of(end.token)
        assert not request.end, "ended twice"
        request.end = end
        assert not self.receives_of(request), "blocks were given back while a receive was posted"
        good = end.good_token
        assert 0 <= good <= request.end_token
        self.pool.check_good(request, good)
        self.seen["kept a good part"] += 0 < good < request.end_token
        if end.is_landed:
            assert good == request.end_token
            assert not end.reason
        else:
            assert end.reason in ("timeout", "cancelled", "digest", "sender_failed", "link_lost", "stalled"), end.reason
        self.pool.give_back([block for group in request.groups for block in group.block_ids])

    def check_sent(self, job: Job, event: SendReleased | SendEnd) -> None:
        kinds = [SendReleased, SendEnd]
        assert isinstance(event, kinds[len(job.events)]), "released once, then ended once"
        job.events.append(event)
        assert not job.reading, "source blocks were given back while something read them"
        job.source.clear()
        if isinstance(event, SendEnd) and event.is_landed:
            assert job.request.end, "landed for the sender before it landed"
            assert job.request.end.is_landed

    def check_end(self) -> None:
        assert not self.digests
        assert not any(self.receives_of(request) for request in self.requests)
        self.pool.check_end()
        assert not self.receiver.open_tokens
        assert all(prefill.machine.is_idle for prefill in self.prefills if prefill.is_alive)
