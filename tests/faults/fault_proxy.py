"""A TCP proxy that does to a link what networks do: cut, reset, silence one way or both, slow down, flip a byte.

Silence is a network that delivers nothing: the bytes stay where they are and go on when it heals, as TCP's would.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Direction = Literal["forward", "backward"]  # from who connects, and to it
_RESET = struct.pack("ii", 1, 0)  # struct linger
READ_BYTES = 64 << 10
SLICE_S = 0.01  # a slow link sends so often


@dataclass(slots=True)
class _Lane:
    """One direction of all connections."""

    is_open: asyncio.Event = field(default_factory=asyncio.Event)
    bytes_passed: int = 0
    bytes_per_s: float = 0.0  # 0: as fast as it goes
    alarms: list[tuple[int, Callable[[], None]]] = field(default_factory=list)  # (at this byte, do that)
    flips: list[int] = field(default_factory=list)  # bytes to change, by their place in the stream

    def room(self, nbytes: int) -> int:
        """How many of these bytes may pass before something happens."""
        ahead = [at - self.bytes_passed for at, _ in self.alarms if at > self.bytes_passed]
        return min([nbytes, *ahead])

    def pass_on(self, piece: bytes) -> bytes:
        start, end = self.bytes_passed, self.bytes_passed + len(piece)
        changed = bytearray(piece)
        for at in [at for at in self.flips if start <= at < end]:
            self.flips.remove(at)
            changed[at - start] ^= 0x41
        self.bytes_passed = end
        return bytes(changed)

    def ring(self) -> None:
        due = [alarm for alarm in self.alarms if alarm[0] <= self.bytes_passed]
        self.alarms = [alarm for alarm in self.alarms if alarm not in due]
        for _, action in due:
            action()


class FaultProxy:
    """Listens on a port of its own for one address; every connection has the same fate."""

    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)  # may change, for connections to come
        self._lanes: dict[Direction, _Lane] = {"forward": _Lane(), "backward": _Lane()}
        self._connections: set[asyncio.Task[None]] = set()
        self._ends: set[socket.socket] = set()
        self.heal()

    async def start(self) -> int:
        """Returns its port."""
        self._loop = asyncio.get_running_loop()
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.setblocking(False)
        self._accepting = self._loop.create_task(self._accept(), name="fault proxy")
        return int(self._server.getsockname()[1])

    async def aclose(self) -> None:
        self._accepting.cancel()
        self.cut()
        await asyncio.wait([self._accepting, *self._connections])
        self._server.close()

    # Faults.

    def passed(self, direction: Direction) -> int:
        return self._lanes[direction].bytes_passed

    def at(self, direction: Direction, nbytes: int, action: Callable[[], None]) -> None:
        """Do it when so many more bytes have passed, and not one more."""
        lane = self._lanes[direction]
        lane.alarms.append((lane.bytes_passed + nbytes, action))

    def flip(self, direction: Direction, nbytes: int) -> None:
        """Change the byte that comes after so many more."""
        lane = self._lanes[direction]
        lane.flips.append(lane.bytes_passed + nbytes)

    def silence(self, *directions: Direction) -> None:
        for direction in directions:
            self._lanes[direction].is_open.clear()

    def heal(self) -> None:
        """Everything passes again; a connection that was cut stays cut."""
        for lane in self._lanes.values():
            lane.is_open.set()
            lane.bytes_per_s = 0.0
            lane.alarms.clear()
            lane.flips.clear()

    def slow(self, bytes_per_s: float) -> None:
        for lane in self._lanes.values():
            lane.bytes_per_s = bytes_per_s

    def cut(self) -> None:
        """Both sides see an end of the stream."""
        for connection in self._connections:
            connection.cancel()

    def reset(self) -> None:
        """Both sides see a reset."""
        for end in self._ends:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.cut()

    # Passing on.

    async def _accept(self) -> None:
        while True:
            near, _ = await self._loop.sock_accept(self._server)
            connection = self._loop.create_task(self._join(near), name="fault proxy")
            self._connections.add(connection)
            connection.add_done_callback(self._connections.discard)

    async def _join(self, near: socket.socket) -> None:
        far = socket.socket()
        self._ends |= {near, far}
        pumps: list[asyncio.Task[None]] = []
        try:
            for end in (near, far):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._lanes["forward"].is_open.wait()
            await self._loop.sock_connect(far, self.target)
            pumps.append(self._loop.create_task(self._pump(near, far, self._lanes["forward"])))
            pumps.append(self._loop.create_task(self._pump(far, near, self._lanes["backward"])))
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            pass  # Nobody listens there.
        finally:
            # A socket is closed when nobody waits for it any more: its number may soon be another's.
            for pump in pumps:
                pump.cancel()
            if pumps:
                await asyncio.wait(pumps)
            self._ends -= {near, far}
            near.close()
            far.close()

    async def _pump(self, source: socket.socket, target: socket.socket, lane: _Lane) -> None:
        try:
            while True:
                await lane.is_open.wait()
                limit = int(lane.bytes_per_s * SLICE_S) or READ_BYTES
                piece = await self._loop.sock_recv(source, lane.room(min(limit, READ_BYTES)))
                if not piece:
                    return
                await lane.is_open.wait()
                piece = lane.pass_on(piece)
                await self._loop.sock_sendall(target, piece)
                lane.ring()
                if lane.bytes_per_s:
                    await asyncio.sleep(len(piece) / lane.bytes_per_s)
        except OSError:
            pass  # A side has gone.
