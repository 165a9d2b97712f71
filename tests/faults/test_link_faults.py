"""The TCP link of two processes is cut, reset, silenced, slowed and corrupted at 0, 50, 99 and after 100 % of the bytes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
from fault_proxy import Direction, FaultProxy
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
    others_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]
SLOW_BYTES_PER_S = (
    120e3  # 1 Mbit/s: the hand-off takes six seconds instead of half a one, one message of it more than one
)
BOTH: tuple[Direction, ...] = ("forward", "backward")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pairs() -> AsyncIterator[list[Pair]]:
    """One for each position, each with a proxy between its two processes."""
    pairs = [Pair(Engine("prefill", "tcp"), Engine("decode", "tcp")) for _ in POSITIONS]
    async with asyncio.TaskGroup() as tasks:
        for pair in pairs:
            for engine in pair.engines:
                tasks.create_task(engine.start())
    for pair in pairs:
        host, port = pair.decode.ready.addresses[0].removeprefix("tcp://").split(":")
        pair.proxy = FaultProxy(host, int(port))
        pair.address = f"tcp://127.0.0.1:{await pair.proxy.start()}"
        await pair.check_serves()
        await pair.check_settled()
    yield pairs
    for pair in pairs:
        for engine in pair.engines:
            await engine.aclose()
        await proxy_of(pair).aclose()


Break = Callable[[FaultProxy], None]


def proxy_of(pair: Pair) -> FaultProxy:
    assert pair.proxy
    return pair.proxy


async def begin_and_break(pair: Pair, position: int, break_link: Break) -> Case:
    """The fault comes at the very byte, not one earlier or later; at 0 when the hand-off is granted, at 100 when it is over."""
    proxy = proxy_of(pair)
    case = pair.begin(position)
    if 0 < position < 100:
        broken = asyncio.Event()

        def at_the_byte() -> None:
            break_link(proxy)
            broken.set()

        proxy.at("forward", HANDOFF_BYTES * position // 100, at_the_byte)
        await broken.wait()
    else:
        await pair.decode.came_to(case.token, position)
        break_link(proxy)
    return case


@pytest.mark.parametrize("is_cancelled", [False, True], ids=["", "client-goes"])
@pytest.mark.parametrize(
    "break_link",
    [
        FaultProxy.cut,
        FaultProxy.reset,
        lambda proxy: proxy.silence(*BOTH),
        lambda proxy: proxy.silence("forward"),
        lambda proxy: proxy.silence("backward"),
    ],
    ids=["cut", "reset", "silent", "prefill-unheard", "decode-unheard"],
)
async def test_a_broken_link(pairs: list[Pair], break_link: Break, is_cancelled: bool) -> None:
    async def run(pair: Pair, position: int) -> None:
        case = await begin_and_break(pair, position, break_link)
        await check_broken(case, proxy_of(pair).heal, is_cancelled=is_cancelled)

    async with asyncio.TaskGroup() as tasks:
        for pair, position in zip(pairs, POSITIONS, strict=True):
            tasks.create_task(run(pair, position), name=f"fault at {position} %")


async def test_a_link_that_breaks_and_heals_at_once_lands_all_the_same(pairs: list[Pair]) -> None:
    for position in (0, 50, 99):
        case = await begin_and_break(pairs[0], position, FaultProxy.reset)
        ended = await check_answer(case, FAULT_S + COMPUTE_S)
        assert ended.computed_tokens == 1, "it was computed again, and the sender could have claimed again"
        assert (await case.handed).error == ""
        await check_broken(case, proxy_of(case.pair).heal)


async def test_a_slow_link_is_not_taken_for_a_dead_one(pairs: list[Pair]) -> None:
    async def run(pair: Pair, position: int) -> None:
        case = await begin_and_break(pair, position, lambda proxy: proxy.slow(SLOW_BYTES_PER_S))
        ended = await check_answer(case, HANDOFF_BYTES / SLOW_BYTES_PER_S + COMPUTE_S)
        assert ended.computed_tokens == 1, "it was given up"
        await check_broken(case, proxy_of(case.pair).heal)

    async with asyncio.TaskGroup() as tasks:
        for pair, position in zip(pairs, POSITIONS, strict=True):
            tasks.create_task(run(pair, position))


async def test_a_changed_byte_of_kv_is_sent_again(pairs: list[Pair]) -> None:
    async def run(pair: Pair, position: int) -> None:
        before = (await pair.decode.state()).received.get("landed", 0)
        # A thousandth further on: behind the frames, within KV.
        for further in (0, 32):  # One of two bytes so far apart is none of the padding of the last block.
            proxy_of(pair).flip("forward", HANDOFF_BYTES * position // 100 + HANDOFF_BYTES // 1000 + further)
        case = pair.begin(position)
        ended = await check_answer(case, FAULT_S + COMPUTE_S)
        assert ended.computed_tokens == 1
        assert (await case.handed).error == ""
        assert (await pair.decode.state()).received["landed"] == before + 1
        await check_broken(case, proxy_of(case.pair).heal)

    async with asyncio.TaskGroup() as tasks:
        for pair, position in zip(pairs, POSITIONS[:3], strict=False):
            tasks.create_task(run(pair, position))


async def deliver_until_answered(case: Case) -> None:
    """The queue: a prefill worker that could not hand over gives its job back, and it comes again."""
    handed, delivery = case.handed, 1
    while (await handed).error and not case.answer.done():
        delivery += 1
        handed = case.pair.hand_over(case.token, case.prompt, delivery)


@pytest.mark.parametrize("seed", range(4))
async def test_changed_bytes_anywhere_change_no_answer(pairs: list[Pair], seed: int) -> None:
    """Also in headers and frames, either way: whatever they say then, nobody believes wrong KV, and nobody hangs."""
    rng = random.Random(seed)

    async def run(pair: Pair) -> None:
        for _ in range(4):
            proxy_of(pair).flip("forward", rng.choice([rng.randrange(200), rng.randrange(HANDOFF_BYTES)]))
            proxy_of(pair).flip("backward", rng.randrange(150))
            case = pair.begin(0)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(deliver_until_answered(case))
                await check_answer(case, FAULT_S + COMPUTE_S)
            proxy_of(pair).heal()
            await others_of(case)
        await pair.check_settled()

    async with asyncio.TaskGroup() as tasks:
        for pair in pairs:
            tasks.create_task(run(pair))
