"""Slots that are lent: read in place once they are filled, given back once they are read, and never read too late."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import pytest_asyncio
from shm_ring import ShmKvPool, ShmSlot, make_shm_pool
from transport_rig import make_layout, until

from hocket.transport import Extent, Link, LinkLost, TransportError, TransportUnavailable
from hocket.transport.base import DeviceBuffer, Place
from hocket.transport.links.cuda_ipc import HELLO, MAGIC, CudaIpcTransport
from hocket.transport.links.ring_link import RingLink
from hocket.transport.links.unix import VERDICT_BYTES, boot_id
from hocket.transport.poller import Poller
from hocket.transport.stager import LendingLink, Slot, Ticket

BLOCKS = 8
EXTENTS = (Extent(0, (1, 4, 2)), Extent(1, (1, 4, 2)))
NBYTES = 2 * 3 * 4096
OFFER = struct.Struct("<BQQQQQ")


@dataclass
class End:
    """One side: its pool, its link, and what was reported."""

    pool: ShmKvPool
    transport: CudaIpcTransport
    link: RingLink = field(init=False)
    done: dict[int, BaseException | None] = field(default_factory=dict)
    digests: dict[int, int] = field(default_factory=dict)
    lost: list[Exception] = field(default_factory=list)
    controls: list[bytes] = field(default_factory=list)
    scattered: list[int] = field(default_factory=list)

    @classmethod
    async def make(cls, seed: int | None) -> End:
        pool = make_shm_pool(make_layout(), BLOCKS, seed, staging_bytes=4 << 20)
        transport = CudaIpcTransport()
        transport.bind(pool, Poller())
        await transport.start()
        return cls(pool, transport)

    def take(self, link: Link) -> None:
        assert isinstance(link, RingLink)
        self.link = link
        link.start(self.controls.append, self.lost.append)

    def lend(self, tag: int) -> ShmSlot:
        slot = self.pool.reserve(NBYTES, on_device=True)
        assert isinstance(slot, ShmSlot)
        ticket = self.pool.arm(EXTENTS, slot, is_gather=True)
        self.link.lend(tag, slot, ticket, lambda error: self._on_done(tag, error))
        self.link.go([tag])
        self.pool.launch(ticket)
        return slot

    def borrow(self, tag: int, nbytes: int = NBYTES) -> None:
        def done(error: BaseException | None, digest: int) -> None:
            self.digests[tag] = digest
            self._on_done(tag, error)

        self.link.borrow(tag, nbytes, Scatter(self, tag), done)

    def _on_done(self, tag: int, error: BaseException | None) -> None:
        assert tag not in self.done, "done was called twice"
        self.done[tag] = error

    def blocks(self) -> list[bytes]:
        return [self.pool.arrays[extent.layer][list(extent.block_ids)].tobytes() for extent in EXTENTS]


class Scatter:
    """A reader that notes when it was launched."""

    def __init__(self, end: End, tag: int) -> None:
        self._end, self._tag = end, tag

    def arm(self, slot: Slot) -> None:
        self._ticket = self._end.pool.arm(EXTENTS, slot, is_gather=False)

    def launch(self) -> Ticket:
        self._end.scattered.append(self._tag)
        return self._end.pool.launch(self._ticket)

    def cancel(self) -> None:
        self._end.pool.disarm(self._ticket)


class Refusing(Scatter):
    def launch(self) -> Ticket:
        self.cancel()
        raise TransportError("this KV pool's staging memory is closed")


@dataclass
class Ends:
    near: End
    far: End


@pytest_asyncio.fixture
async def ends() -> AsyncIterator[Ends]:
    both = Ends(await End.make(seed=3), await End.make(seed=None))
    accepted: list[Link] = []
    listener = await both.far.transport.listen("", accepted.append)
    both.near.take(await both.near.transport.connect(listener.address, timeout_s=5.0))
    await until(lambda: accepted)
    both.far.take(accepted[0])
    yield both
    for end in (both.near, both.far):
        end.pool.finish()
        async with asyncio.timeout(5.0):
            await end.transport.aclose()
        assert all(ring.is_closed for ring in end.pool.mapped), "a ring stays mapped"
    assert not both.far.pool.armed, "a ticket was neither launched nor disarmed"
    await listener.aclose()


async def told(ends: Ends) -> None:
    """What near has said until now was heard."""
    seen = len(ends.far.controls)
    ends.near.link.send_control(b"so far")
    await until(lambda: len(ends.far.controls) > seen)


async def test_a_slot_is_scattered_where_it_lies_and_given_back(ends: Ends) -> None:
    assert isinstance(ends.near.link, LendingLink)
    ends.far.borrow(1)
    slot = ends.near.lend(1)
    await until(lambda: 1 in ends.near.done and 1 in ends.far.done)
    assert ends.near.done[1] is None
    assert ends.far.done[1] is None
    assert ends.far.blocks() == ends.near.blocks()
    assert ends.far.digests[1] == ends.near.pool.gather(EXTENTS, slot).poll()
    assert ends.far.link.bytes_received >= NBYTES


async def test_a_slot_is_not_read_before_its_gather_is_through(ends: Ends) -> None:
    ends.near.pool.is_slow = True
    ends.far.borrow(1)
    ends.near.lend(1)
    ends.far.borrow(2)
    await told(ends)
    await asyncio.sleep(0.01)  # Some turns of the poller, none of which may read it.
    assert not ends.far.scattered
    ends.near.pool.finish()
    await until(lambda: 1 in ends.far.done)
    assert ends.far.blocks() == ends.near.blocks()
    assert 2 not in ends.far.done


async def test_a_slot_stays_taken_until_it_was_read(ends: Ends) -> None:
    ends.far.pool.is_slow = True
    ends.near.lend(1)
    await told(ends)
    ends.far.borrow(1)
    await until(lambda: ends.far.scattered)
    await told(ends)
    assert 1 not in ends.near.done
    assert 1 not in ends.far.done
    ends.far.pool.finish()
    await until(lambda: 1 in ends.near.done and 1 in ends.far.done)


async def test_many_messages_in_any_order(ends: Ends) -> None:
    for tag in range(20):
        ends.near.lend(tag)
    for tag in reversed(range(20)):
        ends.far.borrow(tag)
    await until(lambda: len(ends.near.done) == len(ends.far.done) == 20)
    assert not any(ends.near.done.values())
    assert not any(ends.far.done.values())


@pytest.mark.parametrize("who", ["near", "far"])
async def test_an_abort_ends_what_is_not_read_yet_and_it_never_is(ends: Ends, who: str) -> None:
    ends.near.pool.is_slow = True
    ends.far.borrow(1)
    ends.far.borrow(2)
    ends.near.lend(1)
    ends.near.lend(3)
    await told(ends)
    async with asyncio.timeout(5.0):
        await (ends.near if who == "near" else ends.far).link.abort()
    await until(lambda: ends.near.lost and ends.far.lost)
    assert all(isinstance(ends.far.done[tag], LinkLost) for tag in (1, 2))
    assert all(isinstance(ends.near.done[tag], LinkLost) for tag in (1, 3))
    ends.near.pool.finish()
    await asyncio.sleep(0.01)
    assert not ends.far.scattered
    assert not any(any(blocks) for blocks in ends.far.blocks())


async def test_an_abort_waits_for_the_kernel_that_reads(ends: Ends) -> None:
    ends.far.pool.is_slow = True
    ends.far.borrow(1)
    ends.near.lend(1)
    await until(lambda: ends.far.scattered)
    abort = asyncio.create_task(ends.far.link.abort())
    await until(lambda: ends.near.lost)
    assert isinstance(ends.near.done[1], LinkLost)
    assert not abort.done()
    assert not ends.far.lost
    assert not ends.far.pool.mapped[0].is_closed, "unmapped under a kernel"
    ends.far.pool.finish()
    async with asyncio.timeout(5.0):
        await abort
    assert isinstance(ends.far.done[1], LinkLost)
    assert len(ends.far.lost) == 1


async def test_an_empty_message_ends_a_borrow_with_an_error_and_leaves_the_link(ends: Ends) -> None:
    ends.far.borrow(1)
    ends.near.link.post_send(1, (), lambda error: ends.near._on_done(1, error))
    await until(lambda: 1 in ends.far.done and 1 in ends.near.done)
    assert isinstance(ends.far.done[1], TransportError)
    assert ends.near.done[1] is None
    ends.far.borrow(2)
    ends.near.lend(2)
    await until(lambda: 2 in ends.far.done)
    assert not ends.far.lost


@pytest.mark.parametrize(("nbytes", "is_lost"), [(NBYTES + 4096, False), (NBYTES - 4096, True)])
async def test_a_message_of_another_length_is_not_read(ends: Ends, nbytes: int, is_lost: bool) -> None:
    ends.far.borrow(1, nbytes)
    ends.near.lend(1)
    await until(lambda: 1 in ends.far.done and 1 in ends.near.done)
    assert isinstance(ends.far.done[1], TransportError)
    assert not ends.far.scattered
    assert bool(ends.far.lost) == is_lost


async def test_a_scatter_that_cannot_be_launched_ends_the_link(ends: Ends) -> None:
    errors: list[BaseException | None] = []
    ends.far.link.borrow(1, NBYTES, Refusing(ends.far, 1), lambda error, _: errors.append(error))
    ends.near.lend(1)
    await until(lambda: ends.far.lost and ends.near.lost)
    assert isinstance(errors[0], LinkLost)
    assert isinstance(ends.near.done[1], LinkLost)


# Slots into memory that is named (probes do it).


async def test_a_lent_slot_comes_into_a_place_when_there_is_room(ends: Ends) -> None:
    target = ends.far.pool.reserve(NBYTES, on_device=True)
    assert isinstance(target, ShmSlot)
    room: list[list[DeviceBuffer]] = []
    asked: list[int] = []

    def take() -> list[DeviceBuffer] | None:
        asked.append(1)
        return room[0] if room else None

    ends.far.link.post_receive(1, Place(NBYTES, take), lambda error: ends.far._on_done(1, error))
    slot = ends.near.lend(1)
    await until(lambda: asked)
    ends.far.link.retry_receives()
    assert len(asked) == 2
    assert isinstance(target.buffer, DeviceBuffer)
    room.append([target.buffer])
    ends.far.link.retry_receives()
    await until(lambda: 1 in ends.far.done and 1 in ends.near.done)
    assert ends.far.done[1] is None
    assert target.view.tobytes() == slot.view.tobytes()


async def test_memory_of_the_ring_is_sent_without_a_gather_and_other_memory_not_at_all(ends: Ends) -> None:
    slot = ends.near.pool.reserve(NBYTES, on_device=True)
    assert isinstance(slot, ShmSlot)
    slot.view[:] = 7
    ends.far.borrow(1)
    ends.near.link.post_send(1, [slot.buffer], lambda error: ends.near._on_done(1, error))
    await until(lambda: 1 in ends.far.done and 1 in ends.near.done)
    assert set(ends.far.blocks()[0]) == {7}
    other = np.zeros(4096, np.uint8)
    with pytest.raises(TypeError, match="device memory"):
        ends.near.link.post_send(2, [DeviceBuffer(other.ctypes.data, 4096, other)], lambda error: None)


# A peer that says what it likes.


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        ([OFFER.pack(2, 1, NBYTES, (4 << 20) - 4096, 0, 0)], "offered"),
        ([OFFER.pack(2, 1, NBYTES, 1 << 63, 0, 0)], "offered"),
        ([OFFER.pack(2, 1, NBYTES, 0, 1 << 40, 0)], "offered"),
        ([OFFER.pack(2, 9, NBYTES, 0, 0, 0)] * 2, "nobody expects"),
        ([OFFER.pack(2, 1, NBYTES, 0, 0, 1 << 63)] * 2, "nobody expects"),
        ([struct.pack("<BQ", 4, 77)], "was not offered"),
        ([b"\x02short"], "frame of kind 2"),
        ([b"\x09"], "frame of kind 9"),
    ],
)
async def test_a_false_frame_ends_the_link(ends: Ends, frames: list[bytes], why: str) -> None:
    ends.far.borrow(1)
    for frame in frames:
        ends.near.link._channel.send_control(frame)
    await until(lambda: ends.far.lost)
    assert why in str(ends.far.lost[0])
    assert isinstance(ends.far.done[1], LinkLost)
    assert not ends.far.scattered


async def test_too_many_early_offers_end_the_link(ends: Ends) -> None:
    for tag in range(5000):
        ends.near.link._channel.send_control(OFFER.pack(2, tag, NBYTES, 0, 0, 0))
    await until(lambda: ends.far.lost)


# Who may have a link.


async def greeted(change: Callable[[dict[str, object]], None]) -> str:
    """What a listener answers to a hello that is true but for the change."""
    far, own = await End.make(seed=None), make_shm_pool(make_layout(), 1)
    listener = await far.transport.listen("", far.take)
    told: dict[str, object] = {"magic": MAGIC, "boot": boot_id().encode(), "words": own.nonce, "fds": own.fds}
    change(told)

    def talk() -> str:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(5.0)
            connection.connect("\0hocket-cuda_ipc-" + listener.address.rpartition(":")[2])
            words = told["words"]
            assert isinstance(words, bytes)
            hello = HELLO.pack(told["magic"], told["boot"], len(words), words)
            socket.send_fds(connection, [hello], told["fds"])  # type: ignore[arg-type]
            _, fds, _, _ = socket.recv_fds(connection, HELLO.size, 4)
            for fd in fds:
                os.close(fd)
            verdict = connection.recv(VERDICT_BYTES, socket.MSG_WAITALL)
            return verdict.rstrip(b"\0").decode() if verdict else "hung up"

    try:
        return await asyncio.to_thread(talk)
    finally:
        await listener.aclose()
        await far.transport.aclose()


async def test_a_true_hello_is_welcome() -> None:
    assert await greeted(lambda told: None) == ""


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"words": bytes(16)}, "not the peer's memory"),
        ({"fds": [os.open(__file__, os.O_RDONLY), os.open(__file__, os.O_RDONLY)]}, "cut off"),
        ({"fds": []}, "not enough values"),
    ],
)
async def test_a_ring_that_cannot_be_read_is_refused_with_the_reason(change: dict[str, object], verdict: str) -> None:
    assert verdict in await greeted(lambda told: told.update(change))


@pytest.mark.parametrize("change", [{"magic": b"HOCKIPC9"}, {"boot": b"0" * 36}])
async def test_a_stranger_is_hung_up_on(change: dict[str, object]) -> None:
    assert await greeted(lambda told: told.update(change)) == "hung up"


async def test_either_side_can_refuse_and_both_hear_why() -> None:
    near, far = await End.make(seed=1), await End.make(seed=None)
    listener = await far.transport.listen("", far.take)
    far.pool.refusal = "the two GPUs cannot reach each other's memory"
    with pytest.raises(LinkLost, match="cannot reach each other"):
        await near.transport.connect(listener.address, timeout_s=5.0)
    assert near.pool.mapped[0].is_closed
    far.pool.refusal, near.pool.refusal = "", "a process cannot map its own GPU memory"
    with pytest.raises(LinkLost, match="its own GPU memory"):
        await near.transport.connect(listener.address, timeout_s=5.0)
    await listener.aclose()
    for end in (near, far):
        await end.transport.aclose()


async def test_without_memory_to_lend_it_does_not_start() -> None:
    with pytest.raises(TransportUnavailable, match="not in GPU memory"):
        await CudaIpcTransport().start()
