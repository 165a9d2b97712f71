"""UCX over TCP between two network namespaces: packets are lost, refused, slowed and changed at every part of a hand-off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest
import pytest_asyncio
from faults_network import Network, unavailable
from faults_rig import (
    COMPUTE_S,
    FAULT_S,
    HANDOFF_BYTES,
    POSITIONS,
    Case,
    Engine,
    Pair,
    check_answer,
    check_broken,
)

WHY_NOT = unavailable()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(120),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]
# Two namespaces of one host share memory, and UCX would find it.
ENVIRONMENT = {"UCX_TLS": "tcp,self"}
SLOW_BITS_PER_S = 1_000_000
CHANGED_BYTES = 3000  # two packets


@dataclass
class Wired:
    """A pair of engine processes and the network between them."""

    pair: Pair
    network: Network


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def wired() -> AsyncIterator[list[Wired]]:
    pytest.importorskip("ucxx")
    networks = [Network(number) for number in range(len(POSITIONS))]
    wired = []
    try:
        async with asyncio.TaskGroup() as tasks:
            for network in networks:
                await network.build()
                prefill = Engine("prefill", "ucx", wrap=network.wrap(0))
                decode = Engine("decode", "ucx", bind=network.hosts[1], wrap=network.wrap(1))
                wired.append(Wired(Pair(prefill, decode), network))
                for engine in (prefill, decode):
                    tasks.create_task(engine.start(ENVIRONMENT))
        for each in wired:
            await each.pair.check_serves()
            await each.pair.check_settled()
        yield wired
        for each in wired:
            for engine in each.pair.engines:
                await engine.aclose()
    finally:
        for network in networks:
            network.remove()


async def begin_and_break(wired: Wired, position: int, break_link: Callable[[Network], None]) -> Case:
    """The prefill process is stopped while the rule is made: a hundredth of a hand-off is over before."""
    case = wired.pair.begin(position)
    await wired.pair.decode.came_to(case.token, position)
    wired.pair.prefill.pause()
    break_link(wired.network)
    wired.pair.prefill.resume()
    return case


@pytest.mark.parametrize("is_cancelled", [False, True], ids=["", "client-goes"])
@pytest.mark.parametrize(
    "break_link",
    [
        Network.reset,
        lambda network: network.silence("forward", "backward"),
        lambda network: network.silence("forward"),
        lambda network: network.silence("backward"),
    ],
    ids=["reset", "silent", "prefill-unheard", "decode-unheard"],
)
async def test_a_broken_network(wired: list[Wired], break_link: Callable[[Network], None], is_cancelled: bool) -> None:
    async def run(each: Wired, position: int) -> None:
        case = await begin_and_break(each, position, break_link)
        await check_broken(case, each.network.heal, is_cancelled=is_cancelled)

    async with asyncio.TaskGroup() as tasks:
        for each, position in zip(wired, POSITIONS, strict=True):
            tasks.create_task(run(each, position))


async def test_a_slow_network_is_not_taken_for_a_dead_one(wired: list[Wired]) -> None:
    async def run(each: Wired, position: int) -> None:
        case = await begin_and_break(each, position, lambda network: network.slow(SLOW_BITS_PER_S))
        ended = await check_answer(case, 8 * HANDOFF_BYTES / SLOW_BITS_PER_S + FAULT_S)
        assert ended.computed_tokens == 1, "it was given up"
        await check_broken(case, each.network.heal)

    async with asyncio.TaskGroup() as tasks:
        for each, position in zip(wired, POSITIONS, strict=True):
            tasks.create_task(run(each, position))


async def test_changed_packets_are_sent_again(wired: list[Wired]) -> None:
    async def run(each: Wired, position: int) -> None:
        for _ in range(10):  # On a busy machine the rest may have left when the rule is made.
            case = await begin_and_break(each, position, lambda network: network.corrupt(CHANGED_BYTES))
            ended = await check_answer(case, FAULT_S + COMPUTE_S)
            assert ended.computed_tokens == 1, "it was given up"
            has_corrupted = each.network.has_corrupted()
            await check_broken(case, each.network.heal)
            if has_corrupted:
                return
        raise AssertionError(f"never was a packet changed after {position} %")

    async with asyncio.TaskGroup() as tasks:
        for each, position in zip(wired, POSITIONS[:3], strict=False):
            tasks.create_task(run(each, position))
