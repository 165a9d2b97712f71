"""A prefill or decode process is killed or stopped at 0, 50, 99 and after 100 % of a hand-off's bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio
from faults_rig import (
    ANSWER_TOKENS,
    COMPUTE_S,
    FAULT_S,
    LEASES_S,
    POSITIONS,
    Case,
    Died,
    Engine,
    Pair,
    cancel,
    check_answer,
    check_handed,
    others_of,
    over,
    right_answer,
)

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]
SHORT_S, LONG_S = 1.0, 6.0  # of a pause: shorter and longer than the silence that means death


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["tcp", "ucx"])
async def pairs(request: pytest.FixtureRequest) -> AsyncIterator[list[Pair]]:
    """One for each position: they meet their faults at the same time."""
    if request.param == "ucx":
        pytest.importorskip("ucxx")
    pairs = [Pair(Engine("prefill", request.param), Engine("decode", request.param)) for _ in POSITIONS]
    async with asyncio.TaskGroup() as tasks:
        for pair in pairs:
            for engine in pair.engines:
                tasks.create_task(engine.start())
    for pair in pairs:
        await pair.check_serves()
        await pair.check_settled()
    yield pairs
    for pair in pairs:
        for engine in pair.engines:
            await engine.aclose()


async def at_every_position(pairs: list[Pair], meet: Callable[[Case], Awaitable[None]]) -> None:
    """Begin a hand-off on each pair, let it meet its fault there, and see that everything is back afterwards."""

    async def run(pair: Pair, position: int) -> None:
        case = pair.begin(position)
        await pair.decode.came_to(case.token, position)
        try:
            await meet(case)
        finally:
            pair.resume()
        await pair.check_settled()
        await pair.check_serves()
        await pair.check_settled()

    async with asyncio.TaskGroup() as tasks:
        for pair, position in zip(pairs, POSITIONS, strict=True):
            tasks.create_task(run(pair, position), name=f"fault at {position} %")


async def test_a_killed_prefill_worker(pairs: list[Pair]) -> None:
    async def meet(case: Case) -> None:
        case.pair.prefill.kill()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(check_answer(case, FAULT_S + COMPUTE_S))
            await over(case)
            await others_of(case)
        await case.pair.prefill.restart()

    await at_every_position(pairs, meet)


async def test_a_killed_decode_worker(pairs: list[Pair]) -> None:
    async def meet(case: Case) -> None:
        pair = case.pair
        pair.decode.kill()
        with pytest.raises(Died):
            await case.answer
        await check_handed(case)
        await pair.decode.restart()
        again = pair.begin(case.position)
        async with asyncio.TaskGroup() as tasks:
            for check in (check_answer(again, LEASES_S), check_handed(again), others_of(again)):
                tasks.create_task(check)

    await at_every_position(pairs, meet)


async def test_a_prefill_worker_that_is_stopped_for_a_moment(pairs: list[Pair]) -> None:
    async def meet(case: Case) -> None:
        case.pair.prefill.pause()
        await asyncio.sleep(SHORT_S)
        case.pair.prefill.resume()
        ended = await check_answer(case, FAULT_S + COMPUTE_S)
        assert ended.computed_tokens == 1, "a pause so short was taken for its death"
        await check_handed(case)
        await others_of(case)

    await at_every_position(pairs, meet)


async def test_a_prefill_worker_that_is_stopped_for_long(pairs: list[Pair]) -> None:
    async def meet(case: Case) -> None:
        case.pair.prefill.pause()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(resume_after(case.pair.prefill, LONG_S))
            tasks.create_task(check_answer(case, FAULT_S + COMPUTE_S))
            await over(case)
            while case.pair.prefill.is_paused:
                await others_of(case)
            await others_of(case)
        await check_handed(case)

    await at_every_position(pairs, meet)


async def test_a_prefill_worker_that_is_stopped_while_the_client_goes(pairs: list[Pair]) -> None:
    """The blocks are others' while the stopped writer still has messages to write into them."""

    async def meet(case: Case) -> None:
        case.pair.prefill.pause()
        cancel(case)
        ended = await case.answer
        assert ended.error in ("cancelled", ""), "it was over before"
        await over(case)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(resume_after(case.pair.prefill, 0.05))
            while case.pair.prefill.is_paused:
                await others_of(case)
            await others_of(case)
        await check_handed(case)

    await at_every_position(pairs, meet)


@pytest.mark.parametrize("pause_s", [SHORT_S, LONG_S])
async def test_a_decode_worker_that_is_stopped(pairs: list[Pair], pause_s: float) -> None:
    async def meet(case: Case) -> None:
        case.pair.decode.pause()
        await resume_after(case.pair.decode, pause_s)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(check_answer(case, FAULT_S + COMPUTE_S))
            await over(case)
            await others_of(case)
        await check_handed(case)

    await at_every_position(pairs, meet)


async def test_a_job_that_is_delivered_again_while_its_first_worker_is_stopped(pairs: list[Pair]) -> None:
    """The second pair's prefill worker takes over from the first one's, which goes on later and finds nothing to write."""
    stopped, other = pairs[0], pairs[1]
    for position in (0, 50):
        case = stopped.begin(position)
        await stopped.decode.came_to(case.token, position)
        stopped.prefill.pause()
        takes_over = Pair(other.prefill, stopped.decode)
        second = takes_over.hand_over(case.token, case.prompt, delivery=2)
        ended = await check_answer(case, FAULT_S + COMPUTE_S)
        assert ended.computed_tokens == 1, "the newer delivery did not replace the older one"
        assert not (await second).error
        await resume_after(stopped.prefill, 0.0)
        await check_handed(case)
        await others_of(case)
        await stopped.check_settled(links=2)
    assert right_answer(case.prompt, ANSWER_TOKENS) == ended.token_ids


async def resume_after(engine: Engine, pause_s: float) -> None:
    await asyncio.sleep(pause_s)
    engine.resume()
