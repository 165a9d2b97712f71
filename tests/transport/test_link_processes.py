"""A link whose peer is another process that is killed or stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import pytest_asyncio
from transport_rig import make_transport, until

from hocket.transport import Link, LinkLost
from hocket.transport.base import Place

CHILD = Path(__file__).parent / "link_child.py"
SCHEMES = ["tcp", "ucx", "cma", "cuda_ipc"]


@dataclass
class Receiving:
    """This end, with a receive posted for each of the child's messages."""

    link: Link
    child: asyncio.subprocess.Process
    rows: npt.NDArray[np.uint8]
    done: list[BaseException | None] = field(default_factory=list)
    lost_at: float = 0.0
    act_after: int | None = None  # act when so many messages are done; later would be too late
    act: Callable[[], object] | None = None
    acted: asyncio.Event = field(default_factory=asyncio.Event)

    def on_done(self, error: BaseException | None) -> None:
        self.done.append(error)
        if len(self.done) == self.act_after:
            if self.act:
                self.act()
            self.acted.set()

    def stop_child(self) -> None:
        os.kill(self.child.pid, signal.SIGSTOP)


Receive = Callable[..., Awaitable[Receiving]]


@pytest_asyncio.fixture
async def receive() -> AsyncIterator[Receive]:
    cleanups: list[Callable[[], Awaitable[None]]] = []

    async def begin(
        scheme: str,
        messages: int,
        buffers: int,
        buffer_bytes: int,
        *,
        act_after: int | None = None,
        stops: bool = False,
    ) -> Receiving:
        transport = make_transport(scheme)
        await transport.start()
        links: list[Link] = []
        controls: list[bytes] = []
        state: list[Receiving] = []
        rows = np.zeros((messages, 2 * buffers, buffer_bytes), np.uint8)
        rows[:] = 0  # Touch every page now.

        def on_lost(_: Exception) -> None:
            state[0].lost_at = time.monotonic()

        def on_link(link: Link) -> None:
            links.append(link)
            link.start(controls.append, on_lost)

        listener = await transport.listen("127.0.0.1", on_link)
        arguments = [listener.address, str(messages), str(buffers), str(buffer_bytes)]
        child = await asyncio.create_subprocess_exec(sys.executable, CHILD, *arguments, stdout=asyncio.subprocess.PIPE)

        async def cleanup() -> None:
            if child.returncode is None:
                child.kill()
            await child.wait()
            await listener.aclose()
            await transport.aclose()

        cleanups.append(cleanup)
        await until(lambda: controls)
        receiving = Receiving(links[0], child, rows, act_after=act_after)
        receiving.act = receiving.stop_child if stops else None
        state.append(receiving)
        for tag in range(messages):
            links[0].post_receive(tag, Place.of(list(rows[tag, ::2])), receiving.on_done)
        return receiving

    yield begin
    for cleanup in cleanups:
        async with asyncio.timeout(10.0):
            await cleanup()


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_messages_arrive_from_another_process(receive: Receive, scheme: str) -> None:
    receiving = await receive(scheme, 16, 20, 32 << 10)
    await until(lambda: len(receiving.done) == 16)
    assert receiving.done == [None] * 16
    assert (receiving.rows[:, ::2] == 7).all()
    assert not receiving.rows[:, 1::2].any(), "a byte between the buffers was written"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("is_idle", [False, True])
async def test_a_killed_peer_is_noticed_within_half_a_second(receive: Receive, scheme: str, is_idle: bool) -> None:
    receiving = await receive(scheme, 4 if is_idle else 100, 16, 128 << 10)
    await until(lambda: len(receiving.done) >= 4)
    receiving.child.kill()
    killed_at = time.monotonic()
    await until(lambda: receiving.lost_at, timeout_s=5.0)
    assert receiving.lost_at - killed_at < 0.5
    assert len(receiving.done) == len(receiving.rows)
    with pytest.raises(LinkLost):
        receiving.link.send_control(b"anybody?")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("messages", "buffers", "buffer_bytes"),
    [(60, 16, 128 << 10), (60, 1, 2 << 20), (4000, 2, 4 << 10), (3000, 1, 15 << 10), (1000, 3, 20 << 10)],
    ids=["scattered", "contiguous", "eager", "eager-long", "short-rendezvous"],
)
async def test_a_stopped_sender_writes_nothing_after_the_abort(
    receive: Receive, scheme: str, messages: int, buffers: int, buffer_bytes: int
) -> None:
    receiving = await receive(scheme, messages, buffers, buffer_bytes, act_after=messages // 20, stops=True)
    async with asyncio.timeout(20.0):
        await receiving.acted.wait()
    before = len(receiving.done)
    async with asyncio.timeout(5.0):
        await receiving.link.abort()
    assert receiving.lost_at
    assert len(receiving.done) == messages
    assert before < messages, "the sender was too fast to be caught"
    receiving.rows[:] = 0
    os.kill(receiving.child.pid, signal.SIGCONT)
    assert receiving.child.stdout is not None
    async with asyncio.timeout(10.0):
        line = await receiving.child.stdout.readline()
    assert line.split()[0] == b"lost"
    assert int(line.split()[1]) == messages, "every send of the other side has ended too"
    assert not receiving.rows.any(), "bytes were written after the abort"


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_buffers_that_are_used_again_after_an_abort_stay_as_they_are(receive: Receive, scheme: str) -> None:
    receiving = await receive(scheme, 100, 4, 1 << 20, act_after=3)
    async with asyncio.timeout(20.0):
        await receiving.acted.wait()
        await receiving.link.abort()
    assert len(receiving.done) == 100
    assert any(isinstance(error, LinkLost) for error in receiving.done), "the sender was too fast to be caught"
    receiving.rows[:] = 0
    assert receiving.child.stdout is not None
    async with asyncio.timeout(10.0):
        line = await receiving.child.stdout.readline()
    assert line.split() == [b"lost", b"100"]
    assert not receiving.rows.any(), "bytes were written after the abort"


async def test_what_a_stopped_process_has_offered_can_still_be_read(receive: Receive) -> None:
    receiving = await receive("cma", 16, 20, 128 << 10, act_after=1, stops=True)
    await until(lambda: len(receiving.done) == 16)
    assert receiving.done == [None] * 16
    assert (receiving.rows[:, ::2] == 7).all()
