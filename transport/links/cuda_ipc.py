"""Links between two processes of one host that keep KV in GPU memory, on one GPU or on two that reach each other.

Each side maps the other one's staging ring (CUDA IPC) and reads it with its own kernels (`ring_link.py`); control frames take a
Unix socket (`unix.py`), and with the first one come the descriptors of the host memory in which kernels raise their flags.
Whether it works is tried at the start of every link: a kernel of ours must find in the peer's ring the random number that the
peer has just told us. If not, the link is refused with the reason, and the next address is tried.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from collections.abc import Sequence

from ..errors import LinkLost, TransportError, TransportUnavailable
from ..frames import FRAME_BYTES_MAX
from ..poller import Poller
from ..stager import RING_WORDS_MAX, LendingStager, MappedRing, Ring
from .ring_link import RingLink
from .tcp import TcpLink
from .unix import UnixTransport, boot_id, exchange_verdicts, peer_pid

MAGIC = b"HOCKIPC1"
HELLO = struct.Struct(f"<8s36sI{RING_WORDS_MAX}s")  # magic, boot id, bytes of the words, the words
FDS_MAX = 4


class CudaIpcTransport(UnixTransport[RingLink]):
    """GPU memory of one host. `bind` says whose."""

    scheme = "cuda_ipc"

    def __init__(self) -> None:
        super().__init__()
        self._bound: tuple[LendingStager, Poller] | None = None
        self._running: tuple[Ring, Poller] | None = None

    def bind(self, stager: LendingStager, poller: Poller) -> None:
        """Whose slots are lent, and who watches the device; before `start`."""
        self._bound = stager, poller

    async def start(self) -> None:
        """Raises TransportUnavailable without GPU memory that other processes can map."""
        if self._bound is None:
            raise TransportUnavailable("the KV is not in GPU memory")
        stager, poller = self._bound
        self._running = stager.ring(), poller

    async def aclose(self) -> None:
        await super().aclose()
        self._running = None

    def _started(self) -> tuple[Ring, Poller]:
        if self._running is None:
            raise TransportUnavailable("cuda_ipc was not started")
        return self._running

    def _check_started(self) -> None:
        self._started()

    async def _greet(self, connection: socket.socket, peer: str) -> RingLink:
        """Once each side has read the other's ring."""
        ring, poller = self._started()
        words, fds = await _exchange_hellos(connection, ring)
        mapped: MappedRing | None = None
        refusal = ""
        try:
            mapped = await _map(ring, words, fds)
        except TransportError as error:
            refusal = str(error)
        try:
            await exchange_verdicts(connection, peer, refusal)
        except BaseException:  # Also when it is cancelled: nobody else knows of it.
            if mapped:
                mapped.close()
            raise
        assert mapped
        channel = TcpLink(connection, peer, frame_bytes_max=FRAME_BYTES_MAX + 1)  # A byte for the kind.
        return RingLink(channel, ring, mapped, poller, self._links.discard)


async def _exchange_hellos(connection: socket.socket, ring: Ring) -> tuple[bytes, list[int]]:
    """The other ring's words and descriptors, which are the caller's to close. Raises LinkLost, OSError."""
    peer_pid(connection)  # Nobody else's process gets ours.
    hello = HELLO.pack(MAGIC, boot_id().encode(), len(ring.words), ring.words)
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", ring.fds).tobytes())
    sent = connection.sendmsg([hello], [rights])  # Into an empty socket: it takes all of it.
    assert sent == len(hello)
    await _readable(connection)
    received, fds, _, _ = socket.recv_fds(connection, HELLO.size, FDS_MAX)
    try:
        if len(received) != HELLO.size:
            raise ConnectionError("it closed the connection" if not received else "its hello is too short")
        magic, boot, nbytes, words = HELLO.unpack(received)
        if magic != MAGIC:
            raise LinkLost("it speaks another version")
        if boot != boot_id().encode():
            raise LinkLost(f"it is on another host ({boot.decode(errors='replace')})")
    except OSError:
        _close(fds)
        raise
    return words[:nbytes], fds


async def _map(ring: Ring, words: bytes, fds: Sequence[int]) -> MappedRing:
    """In a thread, for it takes milliseconds; one that comes too late is unmapped at once. Raises TransportUnavailable."""
    mapping = asyncio.ensure_future(asyncio.to_thread(ring.map, words, fds))
    try:
        return await asyncio.shield(mapping)
    except asyncio.CancelledError:
        mapping.add_done_callback(_unmap)
        raise


def _unmap(mapping: asyncio.Future[MappedRing]) -> None:
    if not mapping.cancelled() and mapping.exception() is None:
        mapping.result().close()


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    is_readable = asyncio.Event()
    loop.add_reader(connection, is_readable.set)
    try:
        await is_readable.wait()
    finally:
        loop.remove_reader(connection)


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
