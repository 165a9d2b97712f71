"""How two processes begin a link over UCX: their connection ids, and a second endpoint for control frames where it needs one.

Over TCP an endpoint sends a message of KV as one run of bytes, and what was posted after it waits until all of it has left: on
a slow network a keepalive came 6 s late [behind 32 MiB at 5 MB/s]. So where TCP is all there is, control frames have an endpoint,
and with it a connection, of their own. Shared memory and RDMA take a message's bytes in pieces, or at once.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import LinkLost
from .ucx_engine import CONNECTIONS_MAX, RNDV_BYTES, Engine

if TYPE_CHECKING:
    import ucxx._lib.libucxx as core

CONTROL_PIECE_BYTES = 8 << 10
_HELLO = struct.Struct("<8sIIIIQ")  # magic, connection, sizes, of which connection this is the control endpoint, key
_MAGIC = b"HOCKET2\0"
_NOBODY = CONNECTIONS_MAX

Lobby = dict[tuple[int, int], "asyncio.Future[core.UCXEndpoint]"]
"""Of a listener: connection and key -> who waits for its control endpoint."""


@dataclass(frozen=True, slots=True)
class Ends:
    """What a link is made of."""

    endpoint: core.UCXEndpoint
    control: core.UCXEndpoint | None  # None: control frames take `endpoint`, too
    mine: int
    theirs: int


async def dial(engine: Engine, open_endpoint: Callable[[], core.UCXEndpoint], peer: str, timeout_s: float) -> Ends:
    """Raises LinkLost."""
    async with _opening(engine, peer, timeout_s) as opened:
        mine = engine.new_connection()
        opened.append(open_endpoint())
        theirs, _, key = await _exchange(engine, opened[0], peer, (mine, _NOBODY, _new_key()))
        if needs_control := engine.ucp.transports(opened[0].handle) == ("tcp",):
            opened.append(open_endpoint())
            await _exchange(engine, opened[1], peer, (mine, theirs, key))
        word = np.array([needs_control], np.uint8)
        await engine.greet(opened[0].stream_send(engine.array(word)))
        return Ends(opened[0], opened[1] if needs_control else None, mine, theirs)


async def answer(engine: Engine, endpoint: core.UCXEndpoint, lobby: Lobby, peer: str, timeout_s: float) -> Ends | None:
    """None: it is the control endpoint that another call waits for. Raises LinkLost."""
    mine, key = engine.new_connection(), _new_key()
    control = lobby[mine, key] = engine.loop.create_future()
    try:
        async with _opening(engine, peer, timeout_s) as opened:
            opened.append(endpoint)
            theirs, joined, their_key = await _exchange(engine, endpoint, peer, (mine, _NOBODY, key))
            if joined != _NOBODY:
                waiting = lobby.pop((joined, their_key), None)
                if waiting is None or waiting.done():
                    raise LinkLost(f"{peer} brought a control endpoint that nobody waits for")
                waiting.set_result(endpoint)
                return None
            word = np.zeros(1, np.uint8)
            await engine.greet(endpoint.stream_recv(engine.array(word)))
            if word[0]:
                opened.append(await control)
            return Ends(endpoint, opened[1] if word[0] else None, mine, theirs)
    finally:
        lobby.pop((mine, key), None)


def _new_key() -> int:
    return int.from_bytes(os.urandom(8), "little")


@asynccontextmanager
async def _opening(engine: Engine, peer: str, timeout_s: float) -> AsyncIterator[list[core.UCXEndpoint]]:
    """Endpoints put into the list are closed when the greeting fails. Raises LinkLost."""
    opened: list[core.UCXEndpoint] = []
    try:
        async with asyncio.timeout(timeout_s):
            yield opened
    except BaseException as error:  # Also when it is cancelled.
        for endpoint in opened:
            endpoint.close_blocking()
        engine.kick()
        if isinstance(error, TimeoutError):
            raise LinkLost(f"no answer from {peer} within {timeout_s} s") from error
        if isinstance(error, engine.errors):
            raise LinkLost(f"lost {peer} while connecting: {error}") from error
        raise


async def _exchange(
    engine: Engine, endpoint: core.UCXEndpoint, peer: str, hello: tuple[int, int, int]
) -> tuple[int, int, int]:
    """(connection, whose control endpoint it is, key) of both, over the stream, which unlike tags belongs to the endpoint."""
    connection, joined, key = hello
    packed = _HELLO.pack(_MAGIC, connection, RNDV_BYTES, CONTROL_PIECE_BYTES, joined, key)
    out, arrived = np.frombuffer(bytearray(packed), np.uint8), np.zeros(_HELLO.size, np.uint8)  # UCX keeps neither.
    greetings: list[asyncio.Future[None]] = []
    try:
        greetings.append(engine.greet(endpoint.stream_send(engine.array(out))))
        greetings.append(engine.greet(endpoint.stream_recv(engine.array(arrived))))
        for greeting in greetings:
            await greeting
    finally:
        for greeting in greetings:
            greeting.cancel()  # After a failure nobody asks any more how it ended.
    magic, theirs, rndv_bytes, piece_bytes, joined, key = _HELLO.unpack(arrived.tobytes())
    is_ours = (magic, rndv_bytes, piece_bytes) == (_MAGIC, RNDV_BYTES, CONTROL_PIECE_BYTES)
    if not is_ours or theirs >= CONNECTIONS_MAX:
        raise LinkLost(f"{peer} speaks another version")
    return theirs, joined, key
