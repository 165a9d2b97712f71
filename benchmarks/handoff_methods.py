"""How `kv_handoff.py` moves KV: a sending and a receiving side for each method.

Both sides take their times from `time.perf_counter`, which is one clock for all processes of a host. A `Source` says when all
layers were ready, a `Sink` when the bytes had landed and were verified; what is sent beforehand is up to `prepare`.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from typing import Protocol

import msgspec
import numpy as np
from handoff_cases import EPOCH, Case, HostArena, HostMemory, Memory

from hocket.transport import HandoffEndpoint, HandoffKey, ReceiveEnd, SendEnd, SendReleased, open_transports

TIMEOUT_S = 30.0
SETTLE_S = 0.02  # claim, grant and the announcement of a chunk take 1 ms
NIXL_POLL_S = 1e-3
IOV_MAX = 512


class Facts(msgspec.Struct, frozen=True):
    """What one side tells the other one beforehand."""

    address: str = ""
    token: str = ""
    agent: bytes = b""
    memory: int = 0
    gpu: int = 0


class Source(Protocol):
    """The prefill side of one method."""

    async def open(self, theirs: Facts) -> Facts:
        """Once for a case."""

    async def prepare(self, theirs: Facts, *, ahead: bool) -> None:
        """Before each transfer; not measured. With `ahead` it does all that can be done before the KV is there."""

    async def send(self) -> float:
        """When all layers were ready. Returns as soon as the source blocks are free."""

    async def idle(self, seconds: float) -> None:
        """Wait for work."""
        await asyncio.sleep(seconds)

    async def aclose(self) -> None:
        """Nothing is open any more."""


class Sink(Protocol):
    """The decode side of one method."""

    async def open(self) -> Facts:
        """Once for a case."""
        return Facts()

    async def accept(self, theirs: Facts) -> None:
        """The other side is open."""

    async def prepare(self) -> Facts:
        """Before each transfer; not measured."""
        return Facts()

    async def receive(self) -> float:
        """When everything had landed."""

    async def idle(self, seconds: float) -> None:
        """Wait for work."""
        await asyncio.sleep(seconds)

    async def aclose(self) -> None:
        """Nothing is open any more."""


class LoneSink(Sink, Protocol):
    """Without another side: `receive` says how many seconds it took, not a time."""

    async def receive(self) -> float:
        return await asyncio.to_thread(self.move)

    def move(self) -> float:
        """Seconds."""


# Ours.


class Endpoints:
    """One endpoint for each scheme, whichever method asks."""

    def __init__(self, memory: Memory, *, is_decode: bool) -> None:
        self._memory = memory
        self._is_decode = is_decode
        self._running: dict[str, HandoffEndpoint] = {}

    async def get(self, scheme: str) -> HandoffEndpoint:
        """Raises TransportUnavailable."""
        if scheme not in self._running:
            name = "decode" if self._is_decode else "prefill"
            endpoint = HandoffEndpoint(
                self._memory.pool, open_transports(scheme), worker_name=name, epoch=EPOCH, listens=self._is_decode
            )
            await endpoint.start()
            self._running[scheme] = endpoint
        return self._running[scheme]

    def link_of(self, scheme: str) -> str:
        """What moves the bytes: "ucx(sysv,cma)"."""
        endpoint = self._running.get(scheme)
        return ", ".join(endpoint.stats.links.values()) if endpoint else ""

    async def aclose(self) -> None:
        for endpoint in self._running.values():
            await endpoint.aclose()
        self._running.clear()


class HandoffSource(Source):
    """Ours. Ahead: claimed, granted and announced, the receives of the first messages posted."""

    def __init__(self, case: Case, endpoints: Endpoints, scheme: str) -> None:
        self._case, self._endpoints, self._scheme = case, endpoints, scheme
        self._chunk = case.chunk()
        self._is_claimed = False

    async def open(self, theirs: Facts) -> Facts:
        self.endpoint = await self._endpoints.get(self._scheme)
        self._address = theirs.address
        return Facts()

    async def prepare(self, theirs: Facts, *, ahead: bool) -> None:
        self.key = HandoffKey(bytes.fromhex(theirs.token), 1, 1)
        self._is_claimed = ahead
        if ahead:
            self._claim()
            await asyncio.sleep(SETTLE_S)

    def _claim(self) -> None:
        self._ended: asyncio.Future[SendEnd] = asyncio.get_running_loop().create_future()

        def on_event(event: SendReleased | SendEnd) -> None:
            if isinstance(event, SendEnd):
                self._ended.set_result(event)

        order = self._case.order(self.key, self._address, self.endpoint.layout.fingerprint())
        self.endpoint.open(order, on_event)
        self.endpoint.announce(self.key, self._chunk)

    async def send(self) -> float:
        started = time.perf_counter()
        if not self._is_claimed:
            self._claim()
        self.endpoint.layers_ready(self.key, range(self._case.layers))
        await self.landed()
        return started

    async def landed(self) -> None:
        """Raises RuntimeError when it did not."""
        end = await self._ended
        if not end.is_landed:
            raise RuntimeError(f"the hand-off failed: {end.reason}")


class LayerSource(HandoffSource):
    """As an engine does it whose computing needs no CPU: layer after layer; `send` counts from the end of the last one."""

    async def send(self) -> float:
        at = await asyncio.to_thread(self._compute, asyncio.get_running_loop())
        await self.landed()
        return at

    def _compute(self, loop: asyncio.AbstractEventLoop) -> float:
        for layer in range(self._case.layers):
            time.sleep(self._case.layer_ms / 1e3)
            ended = time.perf_counter()
            self._ready(loop, layer, None)
        return ended

    def _ready(self, loop: asyncio.AbstractEventLoop, layer: int, stream: object) -> None:
        loop.call_soon_threadsafe(self.endpoint.layer_ready, self.key, layer)


class HandoffSink(Sink):
    """Ours."""

    def __init__(self, case: Case, endpoints: Endpoints, scheme: str) -> None:
        self._case, self._endpoints, self._scheme = case, endpoints, scheme

    async def open(self) -> Facts:
        self._endpoint = await self._endpoints.get(self._scheme)
        return Facts(address=self._endpoint.addresses[0])

    async def prepare(self) -> Facts:
        token = os.urandom(16)
        self._landed: asyncio.Future[tuple[ReceiveEnd, float]] = asyncio.get_running_loop().create_future()

        def on_end(end: ReceiveEnd) -> None:
            self._landed.set_result((end, time.perf_counter()))

        self._endpoint.expect(self._case.expectation(token), on_end)
        return Facts(token=token.hex())

    async def receive(self) -> float:
        end, at = await self._landed
        if not end.is_landed:
            raise RuntimeError(f"the hand-off failed: {end.reason}")
        return at


# Plain sockets.


class SocketSource(Source):
    """A blocking thread: scatter-gather, no protocol, no digest."""

    def __init__(self, case: Case, memory: HostMemory) -> None:
        self._views = block_views(case, memory, "prefill")

    async def open(self, theirs: Facts) -> Facts:
        host, port = theirs.address.split(":")
        self._connection = socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Facts()

    async def send(self) -> float:
        return await asyncio.to_thread(self._send)

    def _send(self) -> float:
        started = time.perf_counter()
        views = list(self._views)
        while views:
            drop(views, self._connection.sendmsg(views[:IOV_MAX]))
        self._connection.recv(1)
        return started

    async def aclose(self) -> None:
        self._connection.close()


class SocketSink(Sink):
    """Likewise."""

    def __init__(self, case: Case, memory: HostMemory) -> None:
        self._views = block_views(case, memory, "decode")

    async def open(self) -> Facts:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(TIMEOUT_S)
        return Facts(address=f"127.0.0.1:{self._server.getsockname()[1]}")

    async def accept(self, theirs: Facts) -> None:
        self._connection, _ = await asyncio.to_thread(self._server.accept)
        self._connection.settimeout(TIMEOUT_S)

    async def receive(self) -> float:
        return await asyncio.to_thread(self._receive)

    def _receive(self) -> float:
        views = list(self._views)
        while views:
            drop(views, self._connection.recvmsg_into(views[:IOV_MAX])[0])
        at = time.perf_counter()
        self._connection.send(b"!")
        return at

    async def aclose(self) -> None:
        self._connection.close()
        self._server.close()


def block_views(case: Case, memory: HostMemory, side: str) -> list[memoryview]:
    """All layers, the prompt's blocks in their order; one view for a run."""
    if case.is_one_run:
        return [rows.reshape(-1).data for rows in memory.rows]
    return [rows[block].data for rows in memory.rows for block in case.block_ids(side)]


def drop(views: list[memoryview], moved_bytes: int) -> None:
    """Take what was moved from the front. Raises ConnectionError when the other side has gone."""
    if not moved_bytes:
        raise ConnectionError("the other side closed")
    done = 0
    while done < len(views) and moved_bytes >= views[done].nbytes:
        moved_bytes -= views[done].nbytes
        done += 1
    del views[:done]
    if moved_bytes:
        views[0] = views[0][moved_bytes:]


# One process.


class CopySink(LoneSink):
    """One pass over the same blocks inside this process, by one thread (`np.take`, `np.copyto`)."""

    def __init__(self, case: Case, memory: HostMemory) -> None:
        self._case, self._memory = case, memory
        self._source = HostMemory(case, HostArena(case.kv_bytes))
        self._source.fill()
        # The block that comes into row i is the one that prefill has at the same place of the prompt.
        place = np.empty(case.blocks, np.int64)
        place[list(case.block_ids("decode"))] = case.block_ids("prefill")
        self._place = place

    def move(self) -> float:
        started = time.perf_counter()
        for source, target in zip(self._source.rows, self._memory.rows, strict=True):
            if self._case.is_one_run:
                np.copyto(target, source)
            else:
                np.take(source, self._place, axis=0, out=target, mode="clip")  # "raise" would copy once more.
        return time.perf_counter() - started

    async def aclose(self) -> None:
        del self._source


def until(condition: Callable[[], bool], what: str) -> None:
    """Ask again and again, without a pause: the fastest way where there is no event to wait for. Raises TimeoutError."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} in {TIMEOUT_S:.0f} s")
