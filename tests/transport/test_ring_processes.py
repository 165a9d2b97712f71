"""A lent ring whose owner is killed or stopped: what it had gathered is exact, the rest ends, and nothing stays mapped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ring_rig import NBYTES, extents_of, lending_side
from shm_ring import ShmKvPool
from transport_rig import until

from hocket.transport import Link, LinkLost
from hocket.transport.links.ring_link import RingLink
from hocket.transport.stager import Slot, Ticket

MESSAGES = 8


class Scatter:
    def __init__(self, pool: ShmKvPool, tag: int) -> None:
        self._pool, self._tag = pool, tag

    def arm(self, slot: Slot) -> None:
        self._ticket = self._pool.arm(extents_of(self._tag), slot, is_gather=False)

    def launch(self) -> Ticket:
        return self._pool.launch(self._ticket)

    def cancel(self) -> None:
        self._pool.disarm(self._ticket)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("reads_first", [0, 3, MESSAGES - 1])
async def test_the_owner_of_a_ring_is_gone(number: signal.Signals, reads_first: int) -> None:
    pool, transport = await lending_side(MESSAGES, seed=None)
    links: list[Link] = []
    lost: list[Exception] = []
    controls: list[bytes] = []

    def on_link(link: Link) -> None:
        links.append(link)
        link.start(controls.append, lost.append)

    listener = await transport.listen("", on_link)
    script = str(Path(__file__).with_name("ring_child.py"))
    child = await asyncio.create_subprocess_exec(sys.executable, script, listener.address, str(MESSAGES))
    try:
        await until(lambda: links)
        link = links[0]
        assert isinstance(link, RingLink)
        done: dict[int, BaseException | None] = {}

        def borrow(tag: int) -> None:
            link.borrow(tag, NBYTES, Scatter(pool, tag), lambda error, _: done.update({tag: error}))

        for tag in range(reads_first):
            borrow(tag)
        await until(lambda: len(done) == reads_first)
        await until(lambda: controls)
        os.kill(child.pid, number)
        if number == signal.SIGSTOP:
            for tag in range(reads_first, MESSAGES):
                borrow(tag)
            await until(lambda: len(done) >= MESSAGES - 1)  # What was gathered can be read without its owner.
            began = time.monotonic()
            await link.abort()
            assert time.monotonic() - began < 1.0
        await until(lambda: lost)
        assert all(ring.is_closed for ring in pool.mapped)
        landed = [tag for tag, error in done.items() if error is None]
        assert set(range(reads_first)) <= set(landed)
        assert MESSAGES - 1 not in landed
        assert all(isinstance(error, LinkLost) for error in done.values() if error)
        wanted = np.random.default_rng(1).integers(0, 256, (MESSAGES, NBYTES // 2), np.uint8)
        assert all(np.array_equal(pool.arrays[0][tag], wanted[tag]) for tag in landed)
        with pytest.raises(LinkLost):
            borrow(99)
        assert not pool.armed
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
        await listener.aclose()
        await transport.aclose()
