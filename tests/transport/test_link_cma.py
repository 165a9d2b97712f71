"""Who may make a cma link, and what a peer that has one can do wrong: everything as bytes on the socket."""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import struct
import threading
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import pytest_asyncio
import xxhash
from transport_rig import until

from hocket.transport import Link, LinkLost
from hocket.transport.base import Place
from hocket.transport.links.cma import HELLO, MAGIC, CmaTransport
from hocket.transport.links.pull_link import PullLink
from hocket.transport.links.unix import VERDICT_BYTES, boot_id

SETRESUID = 117  # on x86-64
FRAME = struct.Struct("<BxxxIQQ")  # and its CRC-32
OFFER = struct.Struct("<BQQ")
OTHER_BOOT = "00000000-0000-4000-8000-000000000000"


@dataclass
class Listening:
    transport: CmaTransport
    address: str
    links: list[Link] = field(default_factory=list)
    lost: list[Exception] = field(default_factory=list)

    @property
    def socket_name(self) -> str:
        return "\0hocket-cma-" + self.address.rpartition(":")[2]


@pytest_asyncio.fixture
async def listening() -> AsyncIterator[Listening]:
    transport = CmaTransport()
    await transport.start()
    state = Listening(transport, "")

    def on_link(link: Link) -> None:
        state.links.append(link)
        link.start(lambda _: None, state.lost.append)

    listener = await transport.listen("127.0.0.1", on_link)
    state.address = listener.address
    yield state
    await listener.aclose()
    await transport.aclose()


class RawPeer:
    """This process as a peer that says what it likes."""

    def __init__(self) -> None:
        self.nonce = np.frombuffer(os.urandom(16), np.uint8)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(5.0)

    def hello(self, **changes: bytes | int) -> bytes:
        """A true one but for the changes."""
        fields: dict[str, bytes | int] = {
            "magic": MAGIC,
            "boot": boot_id().encode(),
            "pid": os.getpid(),
            "namespace": os.stat("/proc/self/ns/pid").st_ino,
            "nonce": self.nonce.tobytes(),
            "address": self.nonce.ctypes.data,
        }
        return HELLO.pack(*(fields | changes).values())

    def greet(self, name: str, hello: bytes) -> str:
        """What the listener says of this peer: nothing when it is content."""
        self.socket.connect(name)
        self.socket.sendall(hello)
        assert len(self.receive(HELLO.size)) == HELLO.size
        verdict = self.receive(VERDICT_BYTES).rstrip(b"\0").decode()
        if not verdict:
            self.socket.sendall(bytes(VERDICT_BYTES))
        return verdict

    def receive(self, nbytes: int) -> bytes:
        return self.socket.recv(nbytes, socket.MSG_WAITALL)

    def send_frame(self, payload: bytes) -> None:
        header = FRAME.pack(1, len(payload), 0, len(payload))
        self.socket.sendall(header + zlib.crc32(header).to_bytes(4, "little") + payload)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"magic": b"HOCKCMA9"}, "another version"),
        ({"boot": OTHER_BOOT.encode()}, "another host"),
        ({"pid": 1}, "says that it is process 1"),
        ({"nonce": bytes(16)}, "is not the peer's"),
        ({"address": 16}, "no access to the memory"),
    ],
)
async def test_a_false_hello_is_refused_with_the_reason(
    listening: Listening, changes: dict[str, bytes | int], verdict: str
) -> None:
    peer = RawPeer()
    assert verdict in await asyncio.to_thread(peer.greet, listening.socket_name, peer.hello(**changes))
    assert await asyncio.to_thread(peer.receive, 1) == b"", "the socket was closed"
    peer.socket.close()
    assert not listening.links


async def test_a_peer_that_says_nothing_is_dropped(listening: Listening) -> None:
    peer = RawPeer()
    peer.socket.connect(listening.socket_name)
    assert len(await asyncio.to_thread(peer.receive, HELLO.size)) == HELLO.size
    assert await asyncio.to_thread(peer.receive, 1) == b""
    peer.socket.close()
    assert not listening.links


@pytest.mark.skipif(os.geteuid() != 0 or os.uname().machine != "x86_64", reason="changes one thread's user")
async def test_another_user_is_refused(listening: Listening) -> None:
    peer, verdicts = RawPeer(), []

    def as_nobody() -> None:
        # The bare system call: of this thread alone, which ends with it.
        assert ctypes.CDLL(None).syscall(SETRESUID, -1, 65534, -1) == 0
        verdicts.append(peer.greet(listening.socket_name, peer.hello()))

    thread = threading.Thread(target=as_nobody)
    thread.start()
    await asyncio.to_thread(thread.join)
    peer.socket.close()
    assert len(verdicts) == 1
    assert "of user 65534" in verdicts[0]
    assert not listening.links


async def test_an_address_of_another_host_fails_at_once(listening: Listening) -> None:
    elsewhere = listening.address.replace(boot_id(), OTHER_BOOT)
    with pytest.raises(LinkLost, match="another host"):
        await listening.transport.connect(elsewhere, timeout_s=0.0)


async def test_a_dialler_is_told_why_the_listener_refused_it(listening: Listening) -> None:
    """A listener that says that it cannot read the dialler."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind("\0hocket-cma-feed")
    server.listen(1)
    peer = RawPeer()

    def answer() -> None:
        connection, _ = server.accept()
        connection.sendall(peer.hello() + b"it may not".ljust(VERDICT_BYTES, b"\0"))
        connection.recv(HELLO.size + VERDICT_BYTES, socket.MSG_WAITALL)
        connection.close()

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(LinkLost, match="cannot read this process: it may not"):
        await listening.transport.connect(f"cma://{boot_id()}:feed", timeout_s=5.0)
    await asyncio.to_thread(thread.join)
    server.close()
    peer.socket.close()


def offer(tag: int, nbytes: int, *ranges: tuple[int, int]) -> bytes:
    return OFFER.pack(2, tag, nbytes) + np.array(ranges, "<u8").tobytes()


SOURCE = np.full(1 << 16, 7, np.uint8)
AT = SOURCE.ctypes.data


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        ([offer(1, 100, (AT, 99))], "are not 100 B"),
        ([offer(1, 100, (AT, 50), (AT, 51))], "are not 100 B"),
        ([offer(1, 100, (AT, 100), (AT, 0))], "are not 100 B"),
        ([offer(1, 100, (AT, (1 << 64) - 28), (AT, 128))], "are not 100 B"),
        ([offer(1, 100)], "are not 100 B"),
        ([offer(1, 100) + b"seven b"], "are not 100 B"),
        ([offer(1, 100, (16, 100))], "while reading its memory"),
        ([offer(1, 101, (AT, 101))], "sent 101 B for a receive of 100 B"),
        ([offer(1, 1 << 62, (AT, 1 << 62))], "nobody expects"),
        ([offer(2, 9, (AT, 9)), offer(2, 9, (AT, 9))], "nobody expects"),
        ([struct.pack("<BQ", 3, 5)], "which was not offered"),
        ([struct.pack("<B", 9)], "a frame of kind 9"),
        ([struct.pack("<BH", 2, 5)], "a frame of kind 2"),
    ],
)
async def test_a_false_offer_costs_the_link_and_writes_nothing(
    listening: Listening, frames: list[bytes], error: str
) -> None:
    peer, target, done = RawPeer(), np.zeros(100, np.uint8), []
    assert not await asyncio.to_thread(peer.greet, listening.socket_name, peer.hello())
    await until(lambda: listening.links)
    listening.links[0].post_receive(1, Place.of([target]), done.append)
    for frame in frames:
        peer.send_frame(frame)
    await until(lambda: listening.lost)
    assert error in str(listening.lost[0])
    assert len(done) == 1
    assert isinstance(done[0], LinkLost)
    assert not target.any()
    peer.socket.close()


async def test_more_offers_than_anybody_expects_cost_the_link(listening: Listening) -> None:
    peer = RawPeer()
    assert not await asyncio.to_thread(peer.greet, listening.socket_name, peer.hello())
    await until(lambda: listening.links)

    def flood() -> None:
        for tag in range(5000):
            peer.send_frame(offer(tag, 9, (AT, 9)))

    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        await asyncio.to_thread(flood)
    await until(lambda: listening.lost)
    assert "nobody expects" in str(listening.lost[0])
    peer.socket.close()


@dataclass
class Joined:
    """A link to this process, both ends."""

    near: PullLink
    far: PullLink


@pytest_asyncio.fixture
async def join(listening: Listening) -> AsyncIterator[Callable[[], Awaitable[Joined]]]:
    dialler = CmaTransport()
    await dialler.start()

    async def connect() -> Joined:
        count = len(listening.links)
        near = await dialler.connect(listening.address, timeout_s=5.0)
        near.start(lambda _: None, lambda _: None)
        await until(lambda: len(listening.links) > count)
        far = listening.links[count]
        assert isinstance(far, PullLink)
        return Joined(near, far)

    yield connect
    await dialler.aclose()


Join = Callable[[], Awaitable[Joined]]


@pytest.mark.parametrize("pattern", [[100], [1 << 20], [9 << 20], [1 << 14] * 700, [4097] * 1500])
async def test_the_digest_is_of_the_bytes_that_arrived(join: Join, pattern: list[int]) -> None:
    joined = await join()
    joined.far.makes_digests = True
    source = np.random.default_rng(3).integers(0, 256, sum(pattern), np.uint8)
    pool = np.zeros(2 * sum(pattern), np.uint8)
    starts = np.cumsum([0, *pattern[:-1]]).tolist()
    target = [pool[2 * start : 2 * start + length] for start, length in zip(starts, pattern, strict=True)]
    found: list[int | None] = []
    joined.far.post_receive(1, Place.of(target), lambda _: found.append(joined.far.received_digest(1)))
    joined.near.post_send(1, [source], lambda _: None)
    await until(lambda: found)
    assert found == [xxhash.xxh3_64_intdigest(source)]
    assert np.concatenate(target).tobytes() == source.tobytes()
    assert joined.far.received_digest(1) is None, "it is there for `done` alone"


async def test_a_link_with_much_to_read_leaves_the_others_their_turn(join: Join) -> None:
    busy, other = await join(), await join()
    source, order = np.full(16 << 20, 7, np.uint8), []
    targets = np.zeros((8, 16 << 20), np.uint8)
    for tag in range(8):
        busy.far.post_receive(tag, Place.of([targets[tag]]), lambda _: order.append("busy"))
        busy.near.post_send(tag, [source], lambda _: None)
    other.far.post_receive(1, Place.of([np.zeros(8 << 20, np.uint8)]), lambda _: order.append("other"))
    other.near.post_send(1, [source[: 8 << 20]], lambda _: None)
    await until(lambda: len(order) == 9)
    assert order[-1] == "busy"
    assert (targets == 7).all()


async def test_a_closed_transport_leaves_no_thread(join: Join, listening: Listening) -> None:
    joined = await join()
    done: list[object] = []
    joined.far.post_receive(1, Place.of([np.zeros(8 << 20, np.uint8)]), done.append)
    joined.near.post_send(1, [np.ones(8 << 20, np.uint8)], lambda _: None)
    await until(lambda: done)
    assert any(thread.name.startswith("cma") for thread in threading.enumerate())
    await listening.transport.aclose()
    assert not any(thread.name.startswith("cma") for thread in threading.enumerate())


async def test_a_message_in_many_small_pieces_of_memory_arrives(join: Join) -> None:
    """More ranges than one system call takes, cut differently on both sides."""
    joined = await join()
    source = np.random.default_rng(5).integers(0, 256, 9000, np.uint8)
    pool, done = np.zeros(9000 + 1800, np.uint8), []
    target = [pool[start : start + 5] for start in range(0, len(pool), 6)]
    joined.far.post_receive(1, Place.of(target), done.append)
    joined.near.post_send(1, [source[at : at + 3] for at in range(0, 6000, 3)][::-1] + [source[6000:]], done.append)
    await until(lambda: len(done) == 2)
    assert done == [None, None]
    expected = np.concatenate([source[:6000].reshape(-1, 3)[::-1].reshape(-1), source[6000:]])
    assert np.concatenate(target).tobytes() == expected.tobytes()
    assert not pool[5::6].any()
