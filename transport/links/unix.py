"""Sockets between processes of one host and one user, for links that look into the other one's memory.

They have names in the abstract namespace, which no other host and no other network namespace reaches; an address carries the
host's boot id as well, so that a peer elsewhere is told so at once: "cma://<boot id>:<number>".
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Generic, TypeVar

from ..base import Link as LinkContract
from ..errors import LinkLost, TransportError

log = logging.getLogger(__name__)
GREET_S = 1.0
VERDICT_BYTES = 256  # what each says of the other: empty, or why not; padded with zeros
LinkT = TypeVar("LinkT", bound=LinkContract)
Greet = Callable[[socket.socket, str, float], Awaitable[LinkContract]]
"""Makes a link of a connection within so many seconds, and closes it if not. Raises LinkLost."""
_ADDRESS = re.compile(r"([a-z_]+)://([0-9A-Za-z.-]+):([0-9a-f]+)")
_CREDENTIALS = struct.Struct("iII")  # struct ucred


class UnixTransport(ABC, Generic[LinkT]):
    """What `base.Transport`s over such sockets have in common; each one adds `start`, and how two sides greet."""

    scheme: str

    def __init__(self) -> None:
        self._links: set[LinkT] = set()

    @abstractmethod
    def _check_started(self) -> None:
        """Raises TransportUnavailable."""

    @abstractmethod
    async def _greet(self, connection: socket.socket, peer: str) -> LinkT:
        """Make a link of a connection. Raises LinkLost, OSError; the connection is closed then."""

    async def listen(self, host: str, on_link: Callable[[LinkContract], None]) -> UnixListener:
        """`host` plays no part: only this one's processes get here."""
        self._check_started()
        return UnixListener(self.scheme, self._link, on_link)

    async def connect(self, address: str, *, timeout_s: float) -> LinkT:
        """Raises LinkLost when nobody answers in time, or either side refuses the other, ValueError for another scheme."""
        self._check_started()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        connection = await _connect(self.scheme, address, timeout_s=timeout_s)
        return await self._link(connection, address, deadline - loop.time())

    async def aclose(self) -> None:
        for link in list(self._links):
            await link.abort()

    async def _link(self, connection: socket.socket, peer: str, timeout_s: float) -> LinkT:
        try:
            async with asyncio.timeout(timeout_s):
                link = await self._greet(connection, peer)
        except BaseException as error:  # Also when it is cancelled.
            connection.close()
            if isinstance(error, OSError) and not isinstance(error, TransportError):  # TimeoutError is one.
                raise LinkLost(f"lost {peer} while connecting: {error or 'timeout'}") from error
            raise
        self._links.add(link)
        return link


class UnixListener:
    """Implements `base.Listener`; `greet` is a transport's `_link`."""

    def __init__(self, scheme: str, greet: Greet, on_link: Callable[[LinkContract], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._scheme = scheme
        self._greeting = greet
        self._on_link = on_link
        self._tasks: set[asyncio.Task[None]] = set()
        number = os.urandom(8).hex()
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.setblocking(False)
        self._server.bind(_socket_name(scheme, number))
        self._server.listen(128)
        self._address = f"{scheme}://{boot_id()}:{number}"
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
        task = self._loop.create_task(self._greet(connection), name=f"{self._scheme}-accept")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _greet(self, connection: socket.socket) -> None:
        try:
            link = await self._greeting(connection, f"{self._scheme}://dialler", GREET_S)
        except LinkLost as error:
            log.warning("did not accept a connection: %s", error)
            return
        self._on_link(link)


async def _connect(scheme: str, address: str, *, timeout_s: float) -> socket.socket:
    """Raises LinkLost when nobody answers in time or it is on another host, ValueError for another scheme."""
    matched = _ADDRESS.fullmatch(address)
    if not matched or matched[1] != scheme:
        raise ValueError(f"not an address of {scheme}: {address!r}")
    if matched[2] != boot_id():
        raise LinkLost(f"{address} is on another host than this one ({boot_id()})")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.get_running_loop().sock_connect(connection, _socket_name(scheme, matched[3]))
    except (OSError, TimeoutError) as error:
        connection.close()
        why = "another network namespace, or gone" if isinstance(error, ConnectionRefusedError) else error
        raise LinkLost(f"no answer from {address}: {why or 'timeout'}") from error
    except asyncio.CancelledError:
        connection.close()
        raise
    return connection


def boot_id() -> str:
    """Which run of which host this is: 36 characters, random at each boot, the same in every container."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def peer_pid(connection: socket.socket) -> int:
    """The process at the other end, as the kernel knows it; 0 when this process does not see it.

    Raises LinkLost when it is of another user.
    """
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    if uid != os.geteuid():
        raise LinkLost(f"it is of user {uid}, this process of user {os.geteuid()}")
    return int(pid)


async def exchange_verdicts(connection: socket.socket, peer: str, refusal: str) -> None:
    """Say why not, or nothing, and hear what the other side says. Raises LinkLost when either refuses, OSError."""
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_sendall(connection, refusal.encode()[:VERDICT_BYTES].ljust(VERDICT_BYTES, b"\0"))
    except (BrokenPipeError, ConnectionResetError):
        pass  # It has refused and closed already; what it said can still be read.
    if refusal:
        raise LinkLost(f"cannot read {peer}: {refusal}")
    verdict = (await receive_exactly(connection, VERDICT_BYTES)).rstrip(b"\0").decode(errors="replace")
    if verdict:
        raise LinkLost(f"{peer} cannot read this process: {verdict}")


async def receive_exactly(connection: socket.socket, nbytes: int) -> bytes:
    """Raises ConnectionError when it ends before."""
    loop = asyncio.get_running_loop()
    received = b""
    while len(received) < nbytes:
        piece = await loop.sock_recv(connection, nbytes - len(received))
        if not piece:
            raise ConnectionError("it closed the connection")
        received += piece
    return received


def _socket_name(scheme: str, number: str) -> str:
    return f"\0hocket-{scheme}-{number}"
