"""Links between two processes of one host: the receiver reads the KV straight out of the sender's memory.

One copy, by the kernel (cross memory attach) or, of memory that can be mapped (`mapped.py`), by ourselves, where a socket
needs two and a shared-memory queue two more. Control frames and offers go over a Unix socket (`unix.py`).

A peer is who the kernel says it is (SO_PEERCRED): of our own user, and the process whose memory holds the random number
that it has just sent. A process id is used again some time after its process has died, but the socket's end has ended
the link by then; a read that was under way brings bytes whose digest does not fit.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Sequence

import numpy as np

from ..base import Buffer
from ..errors import LinkLost, TransportUnavailable
from .cursor import host_buffers
from .mapped import PeerMemory
from .pull_link import OFFER_BYTES_MAX, PullLink
from .pulls import PullThreads
from .tcp import TcpLink
from .unix import UnixTransport, boot_id, exchange_verdicts, peer_pid, receive_exactly
from .vm import Reader, allow_readers, ranges_of, read_memory, why_not

MAGIC = b"HOCKCMA1"
HELLO = struct.Struct("<8s36sQQ16sQ")  # magic, boot id, pid, pid namespace, nonce, where the nonce lies


class CmaMover:
    """Reads one peer process."""

    name = "cma"
    moves_device_memory = False

    def __init__(self, pid: int) -> None:
        self._memory = PeerMemory(pid)

    def offer(self, buffers: Sequence[Buffer]) -> bytes:
        words = ranges_of(host_buffers(buffers)).tobytes()
        if len(words) > OFFER_BYTES_MAX:
            raise ValueError(f"message of {len(words) // 16} pieces of memory; at most {OFFER_BYTES_MAX // 16}")
        return words

    def pull(self, words: bytes, nbytes: int, buffers: Sequence[Buffer]) -> Reader:
        return Reader(self._memory, words, nbytes, host_buffers(buffers))


class CmaTransport(UnixTransport[PullLink]):
    """Cross memory attach: host memory, one host, one user."""

    scheme = "cma"

    def __init__(self) -> None:
        super().__init__()
        self._threads: PullThreads | None = None

    async def start(self) -> None:
        """Raises TransportUnavailable where the system forbids to read a process's memory."""
        probe = np.frombuffer(os.urandom(16), np.uint8)
        try:
            is_right = read_memory(os.getpid(), probe.ctypes.data, 16) == probe.tobytes()
        except OSError as error:
            raise TransportUnavailable(f"process_vm_readv does not work here: {why_not(error)}") from error
        assert is_right
        allow_readers()
        self._threads = PullThreads("cma")

    async def aclose(self) -> None:
        await super().aclose()
        if self._threads:
            await self._threads.aclose()
            self._threads = None

    async def _greet(self, connection: socket.socket, peer: str) -> PullLink:
        """Once each side has read a random number out of the other."""
        pid = await _greet(connection, peer)
        channel = TcpLink(connection, peer, frame_bytes_max=OFFER_BYTES_MAX + 64)
        return PullLink(channel, CmaMover(pid), self._running(), self._links.discard)

    def _check_started(self) -> None:
        self._running()

    def _running(self) -> PullThreads:
        if self._threads is None:
            raise TransportUnavailable("cma was not started")
        return self._threads


async def _greet(connection: socket.socket, peer: str) -> int:
    """Whose memory it is that the other side offers. Raises LinkLost, OSError."""
    loop = asyncio.get_running_loop()
    nonce = np.frombuffer(os.urandom(16), np.uint8)
    hello = HELLO.pack(
        MAGIC,
        boot_id().encode(),
        os.getpid(),
        _pid_namespace(),
        nonce.tobytes(),
        nonce.ctypes.data,
    )
    await loop.sock_sendall(connection, hello)
    refusal = ""
    pid = 0
    try:
        pid = _checked_pid(connection, await receive_exactly(connection, HELLO.size))
    except LinkLost as error:
        refusal = str(error)
    await exchange_verdicts(connection, peer, refusal)
    return pid


def _checked_pid(connection: socket.socket, hello: bytes) -> int:
    magic, boot, said_pid, namespace, nonce, address = HELLO.unpack(hello)
    if magic != MAGIC:
        raise LinkLost("it speaks another version")
    if boot != boot_id().encode():
        raise LinkLost(f"it is on another host ({boot.decode(errors='replace')})")
    pid = peer_pid(connection)
    if not pid:
        raise LinkLost("it is in a pid namespace that this process does not see")
    if namespace == _pid_namespace() and said_pid != pid:
        raise LinkLost(f"it says that it is process {said_pid}, the kernel that it is {pid}")
    try:
        found = read_memory(pid, address, len(nonce))
    except OSError as error:
        raise LinkLost(f"no access to the memory of process {pid}: {why_not(error)}") from error
    if found != nonce:
        raise LinkLost(f"the memory of process {pid} is not the peer's")
    return pid


def _pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino
