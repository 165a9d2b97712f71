"""Links between two processes of one host: the receiver reads the KV straight out of the sender's memory.

One copy, by the kernel (cross memory attach) or, of memory that can be mapped (`mapped.py`), by ourselves, where a socket
needs two and a shared-memory queue two more. Control frames
and offers go over a Unix socket of the abstract namespace, which no other host and no other network namespace reaches;
the address carries the host's boot id, so that a peer elsewhere is told so at once.

A peer is who the kernel says it is (SO_PEERCRED): of our own user, and the process whose memory holds the random number
that it has just sent. A process id is used again some time after its process has died, but the socket's end has ended
the link by then; a read that was under way brings bytes whose digest does not fit.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..base import Buffer
from ..base import Link as LinkContract
from ..errors import LinkLost, TransportUnavailable
from .cursor import host_buffers
from .mapped import PeerMemory
from .pull_link import OFFER_BYTES_MAX, PullLink
from .pulls import PullThreads
from .tcp import TcpLink
from .vm import Reader, allow_readers, ranges_of, read_memory, why_not

log = logging.getLogger(__name__)
GREET_S = 1.0
MAGIC = b"HOCKCMA1"
HELLO = struct.Struct("<8s36sQQ16sQ")  # magic, boot id, pid, pid namespace, nonce, where the nonce lies
VERDICT_BYTES = 256  # what each says of the other: empty, or why not; padded with zeros
_ADDRESS = re.compile(r"cma://([0-9A-Za-z.-]+):([0-9a-f]+)")
_CREDENTIALS = struct.Struct("iII")  # struct ucred


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


class CmaListener:
    def __init__(self, transport: CmaTransport, on_link: Callable[[LinkContract], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._on_link = on_link
        self._tasks: set[asyncio.Task[None]] = set()
        number = os.urandom(8).hex()
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.setblocking(False)
        self._server.bind(_socket_name(number))
        self._server.listen(128)
        self._address = f"cma://{boot_id()}:{number}"
        self._loop.add_reader(self._server, self._accept)

    @property
    def address(self) -> str:
        return self._address

    async def aclose(self) -> None:
        self._loop.remove_reader(self._server)
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _accept(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError as error:
            log.warning("did not accept a connection: %s", error)
            return
        connection.setblocking(False)
        task = self._loop.create_task(self._greet(connection), name="cma-accept")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _greet(self, connection: socket.socket) -> None:
        try:
            link = await self._transport.greet(connection, "cma://dialler", timeout_s=GREET_S)
        except LinkLost as error:
            log.warning("did not accept a connection: %s", error)
            return
        self._on_link(link)


class CmaTransport:
    """Cross memory attach: host memory, one host, one user."""

    scheme = "cma"

    def __init__(self) -> None:
        self._threads: PullThreads | None = None
        self._links: set[PullLink] = set()

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

    async def listen(self, host: str, on_link: Callable[[LinkContract], None]) -> CmaListener:
        """`host` plays no part: only this one's processes get here."""
        self._running()
        return CmaListener(self, on_link)

    async def connect(self, address: str, *, timeout_s: float) -> PullLink:
        """Raises LinkLost when nobody answers in time or it is on another host, ValueError for another scheme."""
        self._running()
        matched = _ADDRESS.fullmatch(address)
        if not matched:
            raise ValueError(f"not an address of cma: {address!r}")
        if matched[1] != boot_id():
            raise LinkLost(f"{address} is on another host than this one ({boot_id()})")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            async with asyncio.timeout_at(deadline):
                await loop.sock_connect(connection, _socket_name(matched[2]))
        except (OSError, TimeoutError) as error:
            connection.close()
            why = "another network namespace, or gone" if isinstance(error, ConnectionRefusedError) else error
            raise LinkLost(f"no answer from {address}: {why or 'timeout'}") from error
        except asyncio.CancelledError:
            connection.close()
            raise
        return await self.greet(connection, address, timeout_s=deadline - loop.time())

    async def aclose(self) -> None:
        for link in list(self._links):
            await link.abort()
        if self._threads:
            await self._threads.aclose()
            self._threads = None

    async def greet(self, connection: socket.socket, peer: str, *, timeout_s: float) -> PullLink:
        """Make a link of a connection, once each side has read a random number out of the other; closes it if not."""
        try:
            async with asyncio.timeout(timeout_s):
                pid = await _greet(connection, peer)
        except BaseException as error:
            connection.close()
            if isinstance(error, OSError) and not isinstance(error, LinkLost):  # TimeoutError is one.
                raise LinkLost(f"lost {peer} while connecting: {error or 'timeout'}") from error
            raise
        channel = TcpLink(connection, peer, frame_bytes_max=OFFER_BYTES_MAX + 64)
        link = PullLink(channel, CmaMover(pid), self._running(), self._links.discard)
        self._links.add(link)
        return link

    def _running(self) -> PullThreads:
        if self._threads is None:
            raise TransportUnavailable("cma was not started")
        return self._threads


def boot_id() -> str:
    """Which run of which host this is: 36 characters, random at each boot, the same in every container."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _socket_name(number: str) -> str:
    return f"\0hocket-cma-{number}"


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
        pid = _checked_pid(connection, await _receive(connection, HELLO.size))
    except LinkLost as error:
        refusal = str(error)
    await loop.sock_sendall(connection, refusal.encode()[:VERDICT_BYTES].ljust(VERDICT_BYTES, b"\0"))
    if refusal:
        raise LinkLost(f"cannot read {peer}: {refusal}")
    verdict = (await _receive(connection, VERDICT_BYTES)).rstrip(b"\0").decode(errors="replace")
    if verdict:
        raise LinkLost(f"{peer} cannot read this process: {verdict}")
    return pid


def _checked_pid(connection: socket.socket, hello: bytes) -> int:
    magic, boot, said_pid, namespace, nonce, address = HELLO.unpack(hello)
    if magic != MAGIC:
        raise LinkLost("it speaks another version")
    if boot != boot_id().encode():
        raise LinkLost(f"it is on another host ({boot.decode(errors='replace')})")
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    if uid != os.geteuid():
        raise LinkLost(f"it is of user {uid}, this process of user {os.geteuid()}")
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
    return int(pid)


def _pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


async def _receive(connection: socket.socket, nbytes: int) -> bytes:
    loop = asyncio.get_running_loop()
    received = b""
    while len(received) < nbytes:
        piece = await loop.sock_recv(connection, nbytes - len(received))
        if not piece:
            raise ConnectionError("it closed the connection")
        received += piece
    return received
