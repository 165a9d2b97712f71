"""What every link owes; a new transport adds its scheme and gets every test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import pytest_asyncio
from transport_rig import make_transport, until

from hocket.transport import Link, LinkLost, Listener, Transport
from hocket.transport.base import DeviceBuffer, HostBuffer, Place
from hocket.transport.frames import FRAME_BYTES_MAX

SCHEMES = ["inproc", "lab", "tcp", "ucx", "cma", "cuda_ipc"]


@dataclass
class End:
    """One end of a link and everything it reported, in order."""

    link: Link
    controls: list[bytes] = field(default_factory=list)
    done: dict[int, BaseException | None] = field(default_factory=dict)
    lost: list[Exception] = field(default_factory=list)
    order: list[object] = field(default_factory=list)

    def start(self) -> None:
        self.link.start(self.controls.append, self._on_lost)

    def _on_lost(self, error: Exception) -> None:
        self.lost.append(error)
        self.order.append("lost")

    def send(self, tag: int, buffers: Sequence[HostBuffer]) -> None:
        self.link.post_send(tag, buffers, lambda error: self._on_done(tag, error))

    def receive(self, tag: int, buffers: Sequence[HostBuffer]) -> None:
        self.receive_into(tag, Place.of(buffers))

    def receive_into(self, tag: int, place: Place) -> None:
        self.link.post_receive(tag, place, lambda error: self._on_done(tag, error))

    def _on_done(self, tag: int, error: BaseException | None) -> None:
        assert tag not in self.done, "done was called twice"
        self.done[tag] = error
        self.order.append(tag)


@dataclass
class Ends:
    near: End
    far: End
    transports: list[Transport]
    listener: Listener


@pytest_asyncio.fixture(params=SCHEMES)
async def ends(request: pytest.FixtureRequest) -> AsyncIterator[Ends]:
    dialling, listening = make_transport(request.param), make_transport(request.param)
    await dialling.start()
    await listening.start()
    accepted: list[End] = []

    def on_link(link: Link) -> None:
        accepted.append(End(link))
        accepted[0].start()

    listener = await listening.listen("127.0.0.1", on_link)
    near = End(await dialling.connect(listener.address, timeout_s=5.0))
    near.start()
    await until(lambda: accepted)
    yield Ends(near, accepted[0], [dialling, listening], listener)
    async with asyncio.timeout(5.0):
        await near.link.abort()
        await accepted[0].link.abort()
        await listener.aclose()
        await dialling.aclose()
        await listening.aclose()


def scattered(pattern: Sequence[int], seed: int | None = None) -> list[HostBuffer]:
    """Buffers of these lengths with holes between them."""
    pool = np.zeros(sum(pattern) + len(pattern), np.uint8)
    if seed is not None:
        pool[:] = np.random.default_rng(seed).integers(0, 256, pool.shape, np.uint8)
    starts = np.cumsum([0, *(length + 1 for length in pattern[:-1])])
    return [pool[start : start + length] for start, length in zip(starts, pattern, strict=True)]


def joined(buffers: Sequence[HostBuffer]) -> bytes:
    return b"".join(bytes(buffer) for buffer in buffers)


async def test_control_frames_of_any_length_arrive_in_order(ends: Ends) -> None:
    frames = [bytes([number % 256]) * length for number, length in enumerate([1, 7, 8191, 8192, 100_000, 1 << 20, 3])]
    for frame in frames:
        ends.near.link.send_control(frame)
        ends.far.link.send_control(frame[::-1])
    await until(lambda: len(ends.far.controls) == len(ends.near.controls) == len(frames))
    assert ends.far.controls == frames
    assert ends.near.controls == frames


async def test_many_control_frames_keep_their_order(ends: Ends) -> None:
    frames = [b"%d" % number for number in range(500)]
    for frame in frames:
        ends.near.link.send_control(frame)
    await until(lambda: len(ends.far.controls) == 500)
    assert ends.far.controls == frames


async def test_a_control_frame_over_the_limit_is_wrong_use(ends: Ends) -> None:
    with pytest.raises(ValueError, match="control frame"):
        ends.near.link.send_control(bytes(FRAME_BYTES_MAX + 1))


@pytest.mark.parametrize(
    ("from_pattern", "to_pattern"),
    [
        ([1], [1]),
        ([100] * 10, [1000]),
        ([1 << 14], [1 << 13, 1 << 13]),
        ([(1 << 14) - 1], [(1 << 14) - 1]),
        ([1 << 20], [1 << 16] * 16),
        ([1 << 15] * 40, [1 << 16] * 20),
        ([5 << 20, 1, 1 << 20], [1 << 20, (5 << 20) + 1]),
        ([4096] * 1500, [4096] * 1500),
    ],
)
async def test_a_message_fills_the_posted_buffers_however_both_sides_are_cut(
    ends: Ends, from_pattern: list[int], to_pattern: list[int]
) -> None:
    source, target = scattered(from_pattern, seed=1), scattered(to_pattern)
    ends.far.receive(5, target)
    ends.near.send(5, source)
    await until(lambda: 5 in ends.far.done and 5 in ends.near.done)
    assert ends.far.done[5] is None
    assert ends.near.done[5] is None
    assert joined(source) == joined(target)
    pool = target[0].base
    assert pool is not None
    assert np.count_nonzero(pool) == sum(np.count_nonzero(buffer) for buffer in target), "a hole was written"


async def test_messages_find_their_receives_in_any_order_and_both_ways(ends: Ends) -> None:
    sources = {tag: scattered([1 << 16, 1 << 12], seed=tag) for tag in range(20)}
    targets = {tag: scattered([1 << 12, 1 << 16]) for tag in range(20)}
    back = {tag: scattered([1 << 12, 1 << 16]) for tag in range(20)}
    for tag in range(20):
        ends.near.send(tag, sources[tag])
        ends.far.send(100 + tag, sources[tag])
    for tag in reversed(range(20)):
        ends.far.receive(tag, targets[tag])
        ends.near.receive(100 + tag, back[tag])
    await until(lambda: len(ends.near.done) == len(ends.far.done) == 40)
    assert all(joined(sources[tag]) == joined(targets[tag]) == joined(back[tag]) for tag in range(20))


async def test_a_message_waits_for_its_receive(ends: Ends) -> None:
    source, target = scattered([1 << 20], seed=2), scattered([1 << 20])
    ends.near.send(9, source)
    ends.near.link.send_control(b"sent")
    await until(lambda: ends.far.controls)
    ends.far.receive(9, target)
    await until(lambda: 9 in ends.far.done)
    assert joined(source) == joined(target)


@pytest.mark.parametrize("length", [0, 100, 1 << 16])
async def test_a_shorter_message_ends_its_receive_with_an_error_and_leaves_the_link(ends: Ends, length: int) -> None:
    target = scattered([1 << 17, 1 << 17])
    ends.far.receive(3, target)
    ends.near.send(3, scattered([length], seed=1) if length else [])
    await until(lambda: 3 in ends.far.done and 3 in ends.near.done)
    assert ends.far.done[3] is not None
    assert ends.near.done[3] is None
    ends.near.link.send_control(b"still here")
    await until(lambda: ends.far.controls)
    assert not ends.far.lost


async def test_an_empty_message_for_an_empty_receive_is_fine(ends: Ends) -> None:
    ends.far.receive(3, [])
    ends.near.send(3, [])
    await until(lambda: 3 in ends.far.done and 3 in ends.near.done)
    assert ends.far.done[3] is None


async def test_a_longer_message_writes_nothing_behind_the_buffers(ends: Ends) -> None:
    target = scattered([1 << 16])
    ends.far.receive(3, [target[0][: 1 << 15]])
    ends.near.send(3, scattered([1 << 16], seed=1))
    await until(lambda: 3 in ends.far.done)
    assert ends.far.done[3] is not None
    assert not target[0][1 << 15 :].any()


async def test_abort_ends_everything_that_is_outstanding_before_it_says_lost(ends: Ends) -> None:
    for tag in range(5):
        ends.far.receive(tag, scattered([1 << 17]))
        ends.near.send(100 + tag, scattered([1 << 17], seed=tag))
    async with asyncio.timeout(5.0):
        await ends.far.link.abort()
    assert all(isinstance(ends.far.done[tag], LinkLost) for tag in range(5))
    assert ends.far.order[-1] == "lost"
    await until(lambda: ends.near.lost)
    assert sorted(ends.near.done) == [100, 101, 102, 103, 104], "a send may have left for the kernel, but it has ended"
    assert ends.near.order[-1] == "lost"
    assert len(ends.far.lost) == len(ends.near.lost) == 1


@dataclass
class Slots:
    """A few equal buffers that messages take when they come."""

    buffers: list[HostBuffer]
    asked: list[int] = field(default_factory=list)  # tags, in order
    taken: dict[int, HostBuffer] = field(default_factory=dict)

    def place(self, tag: int, nbytes: int) -> Place:
        return Place(nbytes, lambda: self._take(tag))

    def _take(self, tag: int) -> list[HostBuffer] | None:
        self.asked.append(tag)
        if not self.buffers:
            return None
        self.taken[tag] = self.buffers.pop()
        return [self.taken[tag]]


@pytest.mark.parametrize("nbytes", [100, 1 << 17, 3 << 20])
async def test_a_place_without_room_is_asked_again_when_told_and_not_before(ends: Ends, nbytes: int) -> None:
    slots, source = Slots([]), scattered([nbytes], seed=3)
    ends.far.receive_into(1, slots.place(1, nbytes))
    ends.near.send(1, source)
    await until(lambda: slots.asked)
    for _ in range(20):  # What else happens on the link asks nothing again.
        ends.far.link.send_control(b"still no room")
        await until(lambda: len(ends.near.controls) == 1)
        ends.near.controls.clear()
    assert slots.asked == [1]
    ends.far.link.retry_receives()
    await until(lambda: slots.asked == [1, 1])
    slots.buffers += scattered([nbytes])
    ends.far.link.retry_receives()
    await until(lambda: 1 in ends.far.done and 1 in ends.near.done)
    assert ends.far.done[1] is None
    assert ends.near.done[1] is None
    assert slots.asked == [1, 1, 1], "buffers were given once"
    assert joined([slots.taken[1]]) == joined(source)


async def test_a_place_is_asked_for_only_when_its_message_comes(ends: Ends) -> None:
    slots = Slots(scattered([1 << 17]))
    ends.far.receive_into(1, slots.place(1, 1 << 17))
    ends.far.receive_into(2, slots.place(2, 1 << 17))
    ends.far.link.retry_receives()
    ends.near.send(2, scattered([1 << 17], seed=1))
    await until(lambda: 2 in ends.far.done)
    assert slots.asked == [2]


@pytest.mark.parametrize("nbytes", [100, 1 << 17])
async def test_messages_that_wait_for_room_get_it_in_the_order_of_their_coming(ends: Ends, nbytes: int) -> None:
    slots, count = Slots([]), 6
    for tag in reversed(range(count)):
        ends.far.receive_into(tag, slots.place(tag, nbytes))
    for tag in range(count):
        ends.near.send(tag, scattered([nbytes], seed=tag))
    await until(lambda: slots.asked)
    assert slots.asked[0] == 0
    for tag in range(count):
        slots.buffers += scattered([nbytes])
        ends.far.link.retry_receives()
        await until(lambda tag=tag: tag in ends.far.done)
        assert list(slots.taken) == list(range(tag + 1))
    assert all(joined([slots.taken[tag]]) == joined(scattered([nbytes], seed=tag)) for tag in range(count))


async def test_one_that_waits_for_room_does_not_hold_up_another_link(ends: Ends) -> None:
    links: list[Link] = []
    listener = await ends.transports[1].listen("127.0.0.1", links.append)
    other = End(await ends.transports[0].connect(listener.address, timeout_s=5.0))
    other.start()
    await until(lambda: links)
    far = End(links[0])
    far.start()
    slots = Slots([])
    ends.far.receive_into(1, slots.place(1, 1 << 20))
    ends.near.send(1, scattered([1 << 20], seed=1))
    await until(lambda: slots.asked)
    target = scattered([1 << 20])
    far.receive(1, target)
    other.send(1, scattered([1 << 20], seed=2))
    await until(lambda: 1 in far.done)
    assert joined(target) == joined(scattered([1 << 20], seed=2))
    assert 1 not in ends.far.done
    await other.link.abort()
    await until(lambda: far.lost)
    await listener.aclose()


@pytest.mark.parametrize("nbytes", [100, 1 << 17])
@pytest.mark.parametrize("who", ["near", "far"])
async def test_abort_ends_what_waits_for_room(ends: Ends, nbytes: int, who: str) -> None:
    slots = Slots([])
    for tag in range(3):
        ends.far.receive_into(tag, slots.place(tag, nbytes))
        ends.near.send(tag, scattered([nbytes], seed=tag))
    await until(lambda: slots.asked)
    async with asyncio.timeout(5.0):
        await (ends.near if who == "near" else ends.far).link.abort()
    await until(lambda: ends.far.lost and ends.near.lost)
    assert all(isinstance(ends.far.done[tag], LinkLost) for tag in range(3))
    assert len(ends.near.done) == 3
    asked = list(slots.asked)
    slots.buffers += scattered([nbytes])
    ends.far.link.retry_receives()
    await asyncio.sleep(0)
    assert slots.asked == asked, "a lost link asked for a place"


async def test_a_link_that_moves_no_device_memory_says_so(ends: Ends) -> None:
    owner = np.zeros(1 << 16, np.uint8)
    assert not ends.near.link.moves_device_memory  # This machine has no GPU.
    with pytest.raises(TypeError, match="device memory"):
        ends.near.link.post_send(1, [DeviceBuffer(owner.ctypes.data, owner.nbytes, owner)], lambda error: None)


async def test_nothing_can_be_posted_on_a_lost_link(ends: Ends) -> None:
    await ends.near.link.abort()
    await until(lambda: ends.far.lost)
    for end in (ends.near, ends.far):
        with pytest.raises(LinkLost):
            end.link.send_control(b"x")
        with pytest.raises(LinkLost):
            end.link.post_send(1, [], lambda error: None)
        with pytest.raises(LinkLost):
            end.link.post_receive(1, Place.of([]), lambda error: None)
    await ends.near.link.abort()
    assert len(ends.near.lost) == 1


async def test_aclose_delivers_what_was_queued(ends: Ends) -> None:
    target = scattered([1 << 20])
    ends.far.receive(1, target)
    source = scattered([1 << 20], seed=4)
    ends.near.send(1, source)
    ends.near.link.send_control(b"the last word")
    async with asyncio.timeout(5.0):
        await ends.near.link.aclose()
    await until(lambda: ends.far.lost)
    assert ends.far.controls == [b"the last word"]
    assert joined(target) == joined(source)


async def test_bytes_received_grows_with_messages_and_frames(ends: Ends) -> None:
    before = ends.far.link.bytes_received
    ends.near.link.send_control(b"x" * 100)
    await until(lambda: ends.far.controls)
    middle = ends.far.link.bytes_received
    ends.far.receive(1, scattered([1 << 18]))
    ends.near.send(1, scattered([1 << 18], seed=1))
    await until(lambda: 1 in ends.far.done)
    assert before < middle <= ends.far.link.bytes_received - (1 << 18)


async def test_links_of_one_transport_do_not_mix_their_tags(ends: Ends) -> None:
    links: list[Link] = []
    listener = await ends.transports[1].listen("127.0.0.1", links.append)
    other = End(await ends.transports[0].connect(listener.address, timeout_s=5.0))
    other.start()
    await until(lambda: links)
    far = End(links[0])
    far.start()
    first, second = scattered([1 << 16]), scattered([1 << 16])
    ends.far.receive(1, first)
    far.receive(1, second)
    other.send(1, scattered([1 << 16], seed=2))
    await until(lambda: 1 in far.done)
    assert 1 not in ends.far.done
    assert not first[0].any()
    ends.near.send(1, scattered([1 << 16], seed=1))
    await until(lambda: 1 in ends.far.done)
    assert joined(first) == joined(scattered([1 << 16], seed=1))
    assert joined(second) == joined(scattered([1 << 16], seed=2))
    await other.link.abort()
    await until(lambda: far.lost)
    await listener.aclose()


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_connecting_to_nobody_and_to_another_scheme_is_refused(scheme: str) -> None:
    transport = make_transport(scheme)
    await transport.start()
    with pytest.raises(LinkLost):
        await transport.connect(f"{scheme}://127.0.0.1:1", timeout_s=3.0)
    with pytest.raises(ValueError, match="not an address"):
        await transport.connect("pigeon://127.0.0.1:1", timeout_s=1.0)
    await transport.aclose()
