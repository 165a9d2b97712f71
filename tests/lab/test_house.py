"""A whole pool on virtual time: single faults, and what they must lead to."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

import pytest

from hocket.bus.messages import SamplingParams
from hocket.lab.clients import POISON, VOCABULARY, Request
from hocket.lab.house import House
from hocket.lab.log import EventLog
from hocket.lab.loop import VirtualLoop, run
from hocket.lab.members import Shape, WorkerMember

LONG = SamplingParams(max_tokens=30)


def house_run(
    shape: Shape, story: Callable[[House], Awaitable[None]], seed: int = 1, skews_s: Sequence[float] = ()
) -> House:
    """Play a story in a pool; nothing may be left at its end."""

    async def main(loop: VirtualLoop) -> House:
        house = House(loop, random.Random(seed), shape, EventLog(loop.time))
        with house.logging():
            await house.start(skews_s)
            await story(house)
            house.is_calm = True
            assert house.leaks() == []
            await house.stop()
        return house

    house = run(main)
    assert house.violations == []
    return house


def request(number: int = 0, prompt_tokens: int = 40, sampling: SamplingParams = LONG) -> Request:
    return Request(number, random.Random(number).choices(VOCABULARY, k=prompt_tokens), sampling, 0.0)


async def ended(request: Request, within_s: float) -> list[str]:
    loop = asyncio.get_running_loop()
    end_s = loop.time() + within_s
    while not request.ends and loop.time() < end_s:
        await asyncio.sleep(0.01)
    return request.ends


def test_a_pool_answers_and_the_same_seed_gives_the_same_log():
    async def story(house: House) -> None:
        requests = [request(number) for number in range(20)]
        for one in requests:
            house.send(one)
            await asyncio.sleep(0.5)
        assert {tuple(await ended(one, 10.0)) for one in requests} == {("answered",)}
        await asyncio.sleep(1.0)

    shape = Shape(routers=2, prefill=2, decode=2)
    first, again, other = (house_run(shape, story, seed).log.lines for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert any("hk.evt" in line for line in first)  # Prefill workers took part.


def test_a_router_that_was_away_for_too_long_ends_the_streams_that_its_worker_gave_up():
    async def story(house: House) -> None:
        one = request(sampling=SamplingParams(max_tokens=400))
        house.send(one)
        await asyncio.sleep(1.0)
        assert one.tokens
        router = house.routers[0]
        house.broker.faults.pending_max = 20
        router.process.pause()  # The server cuts it off; the worker is told that nobody listens.
        await asyncio.sleep(5.0)
        router.process.resume()
        assert await ended(one, 3.0) == ["tokens_lost"]
        await asyncio.sleep(1.0)

    house_run(Shape(prefill=0), story)


def test_a_router_that_was_paused_does_not_take_its_own_silence_for_the_workers():
    async def story(house: House) -> None:
        one = request(sampling=SamplingParams(max_tokens=100))
        house.send(one)
        await asyncio.sleep(1.0)
        house.routers[0].process.pause()
        await asyncio.sleep(5.0)
        house.routers[0].process.resume()
        assert await ended(one, 3.0) == ["answered"]
        await asyncio.sleep(1.0)

    house_run(Shape(prefill=0), story)


def test_a_cancel_that_could_not_be_sent_is_sent_when_the_connection_is_back():
    async def story(house: House) -> None:
        one = request(sampling=SamplingParams(max_tokens=2000))
        one.leaves_s = 1.0
        house.send(one)
        await asyncio.sleep(0.9)
        house.broker.forget(house.routers[0].bus)
        house.routers[0].process.call_soon(house.routers[0].bus.on_cut)
        await asyncio.sleep(0.11)
        assert one.ends == ["left"]
        assert house.workers[0].engine.load().running == 1
        await asyncio.sleep(0.5)
        assert house.workers[0].engine.load().running == 0
        await asyncio.sleep(1.0)

    house_run(Shape(prefill=0), story)


def test_a_server_that_is_away_for_long_costs_no_stream():
    async def story(house: House) -> None:
        requests = [request(number, sampling=SamplingParams(max_tokens=400)) for number in range(4)]
        for one in requests:
            house.send(one)
        await asyncio.sleep(1.0)
        house.broker.stop()
        await asyncio.sleep(6.0)
        house.broker.start()
        assert {tuple(await ended(one, 5.0)) for one in requests} == {("answered",)}
        await asyncio.sleep(1.0)

    house_run(Shape(prefill=0), story)


def test_tokens_are_asked_for_again_from_a_worker_that_is_back_later_than_its_router():
    async def story(house: House) -> None:
        one = request(sampling=SamplingParams(max_tokens=1000))
        house.send(one)
        await asyncio.sleep(1.0)
        router, worker = house.routers[0], house.workers[0]
        house.broker.faults.pending_max = 20
        router.process.pause()  # It is cut off, and its streams are given up by the worker.
        await asyncio.sleep(4.0)
        house.broker.partition(worker.bus)  # When the router is back, nobody listens.
        house.broker.forget(worker.bus)
        router.process.resume()
        await asyncio.sleep(1.0)
        house.broker.heal(worker.bus)
        worker.process.call_soon(worker.bus.on_cut)
        assert await ended(one, 5.0) == ["tokens_lost"]
        await asyncio.sleep(1.0)

    house_run(Shape(prefill=0), story)


def test_a_worker_whose_engine_hangs_is_noticed_and_its_requests_are_answered_elsewhere():
    async def story(house: House) -> None:
        for number in range(4):  # Both engines have made a step.
            house.send(warm := request(number))
            assert await ended(warm, 10.0) == ["answered"]
        victim = house.workers[0]
        victim.hang()
        requests = [request(number) for number in range(10, 16)]
        for one in requests:
            house.send(one)
        assert {tuple(await ended(one, 10.0)) for one in requests} == {("answered",)}
        assert not victim.is_alive  # Its supervisor starts another one.
        await asyncio.sleep(3.0)
        assert len(house.live_workers) == 2

    house_run(Shape(prefill=0, decode=2, policy="round_robin"), story)


def test_a_prefill_worker_whose_engine_hangs_gives_its_jobs_back():
    async def story(house: House) -> None:
        house.send(warm := request(prompt_tokens=60))
        assert await ended(warm, 10.0) == ["answered"]
        victim = house.workers[0]
        victim.hang()
        house.send(one := request(1, prompt_tokens=60))
        assert await ended(one, 6.0) == ["answered"]  # Before the hand-off's timeout.
        assert not victim.is_alive
        await asyncio.sleep(3.0)

    house_run(Shape(), story)


def test_without_a_watchdog_a_hang_lasts_until_the_deadline():
    async def story(house: House) -> None:
        house.send(warm := request())
        assert await ended(warm, 10.0) == ["answered"]
        house.workers[0].hang()
        house.send(one := request(1))
        assert await ended(one, 25.0) == ["timeout"]
        assert house.loop.time() > 20.0
        house.workers[0].go_on()
        await asyncio.sleep(3.0)

    house_run(Shape(prefill=0, hang_timeout_s=0.0, request_timeout_s=20.0), story)


def test_while_an_engine_stalls_new_requests_go_to_others():
    async def story(house: House) -> None:
        for number in range(4):
            house.send(warm := request(number))
            assert await ended(warm, 10.0) == ["answered"]
        victim, other = house.workers
        victim.hang()
        stalled = [request(number) for number in (10, 11)]
        for one in stalled:
            house.send(one)
        await asyncio.sleep(5.0)  # The router has heard that nothing moves there.
        assert [len(one.ends) for one in stalled].count(0) == 1
        requests = [request(number) for number in range(20, 26)]
        for one in requests:
            house.send(one)
            assert await ended(one, 2.0) == ["answered"]
        victim.go_on()
        assert {tuple(await ended(one, 10.0)) for one in stalled} == {("answered",)}
        await asyncio.sleep(1.0)

    house_run(Shape(prefill=0, decode=2, policy="round_robin", hang_timeout_s=60.0), story)


def test_prefill_workers_on_hosts_whose_clocks_are_an_hour_off_compute_prompts_as_others_do():
    async def story(house: House) -> None:
        requests = [request(number) for number in range(20)]
        for one in requests:
            one.timeout_s = 3.0
            house.send(one)
            await asyncio.sleep(0.1)
        assert {tuple(await ended(one, 5.0)) for one in requests} == {("answered",)}
        await asyncio.sleep(1.0)

    house = house_run(Shape(prefill=2, slots=16, kv_blocks=200), story, skews_s=[1e5, 1e5 + 3600.0, 1e5 - 3600.0])
    done = [line for line in house.log.lines if "deadline" in line or "prefill failed" in line]
    assert done == []


def test_a_job_that_is_too_late_is_dropped_whatever_its_workers_clock_shows():
    async def story(house: House) -> None:
        await asyncio.sleep(1.0)  # The workers have heard the router's clock.
        requests = [request(number, prompt_tokens=100) for number in range(8)]
        for one in requests:
            one.timeout_s = 3.0
            house.send(one)
        await asyncio.sleep(0.2)
        house.routers[0].process.pause()  # It cannot cancel them.
        await asyncio.sleep(6.0)
        house.routers[0].process.resume()
        await asyncio.sleep(5.0)
        assert "timeout" in {how for one in requests for how in one.ends}

    shape = Shape(prefill_slots=1, prefill_ms_per_token=10.0, chunk_tokens=200, kv_blocks=200, slots=8)
    house = house_run(shape, story, skews_s=[1e5, 1e5 + 3600.0])
    assert any("refused a job: its deadline has passed" in line for line in house.log.lines)


def poison(number: int, prompt_tokens: int = 40) -> Request:
    one = request(number, prompt_tokens)
    one.prompt[prompt_tokens // 2] = POISON
    return one


@pytest.mark.parametrize("prefill", [0, 2])
def test_a_request_that_kills_two_workers_is_refused_and_the_others_are_answered(prefill: int):
    async def story(house: House) -> None:
        house.send(bad := poison(1))
        await asyncio.sleep(0.005)
        requests = [request(number, 20) for number in range(10, 16)]
        for one in requests:
            house.send(one)
        assert await ended(bad, 30.0) == ["quarantined"]
        assert {tuple(await ended(one, 10.0)) for one in requests} == {("answered",)}
        [killed] = house.poisoned.values()
        assert killed <= 3
        before = house.loop.time()
        house.send(again := poison(1))
        assert await ended(again, 10.0) == ["quarantined"]
        assert house.loop.time() - before < 0.1
        await asyncio.sleep(5.0)
        assert sum(house.poisoned.values()) == killed

    house_run(Shape(prefill=prefill, decode=3, slots=8, kv_blocks=200), story)


def test_a_poison_alone_costs_two_workers():
    async def story(house: House) -> None:
        house.send(bad := poison(1))
        assert await ended(bad, 20.0) == ["quarantined"]
        assert sum(house.poisoned.values()) == 2
        await asyncio.sleep(5.0)

    house_run(Shape(prefill=0, decode=3), story)
    house_run(Shape(prefill=3), story)


def test_a_request_that_finds_nobody_where_a_poison_was_is_not_blamed_with_it():
    async def story(house: House) -> None:
        house.send(bad := poison(1))
        await asyncio.sleep(0.1)
        assert sum(house.poisoned.values()) == 1  # And no router knows yet.
        requests = [request(number) for number in (10, 11)]
        for one in requests:
            house.send(one)
        assert await ended(bad, 20.0) == ["quarantined"]
        assert {tuple(await ended(one, 10.0)) for one in requests} == {("answered",)}
        assert sum(house.poisoned.values()) == 2
        await asyncio.sleep(5.0)

    house_run(Shape(prefill=0, decode=2, policy="round_robin"), story)


def test_a_job_that_its_decode_worker_did_without_is_not_tried_again():
    async def story(house: House) -> None:
        bad = poison(1)
        bad.sampling = SamplingParams(max_tokens=200)  # It lasts until the death is noticed.
        house.send(bad)
        assert await ended(bad, 20.0) == ["answered"]  # Who computes what is left of a hand-off survives it.
        assert sum(house.poisoned.values()) == 1
        await asyncio.sleep(5.0)

    house_run(Shape(prefill=2, handoff_timeout_s=0.5), story)


def test_a_poison_past_the_queue_is_judged_by_workers_that_died_without_a_word():
    async def story(house: House) -> None:
        house.broker.lose_leader()
        house.broker.faults.delay_s = (0.2, 0.2)  # Their answers and claims die with them.
        house.send(bad := poison(1))
        assert await ended(bad, 30.0) == ["quarantined"]
        assert sum(house.poisoned.values()) <= 3
        house.broker.elect()
        house.broker.faults.delay_s = (0.0001, 0.001)
        await asyncio.sleep(15.0)

    house_run(Shape(prefill=2, decode=3), story)


def test_many_that_died_together_twice_are_tried_one_by_one():
    async def story(house: House) -> None:
        requests = [request(number, 100, SamplingParams(max_tokens=3)) for number in range(4)]
        for one in requests:
            house.send(one)
        for number in (1, 2):  # Two workers die with all of them on board, before any has a token.
            await asyncio.sleep(1.0)
            [victim] = [worker for worker in house.live_workers if on_board(worker) == 4]
            survivor = house.start_worker("decode", number)
            await asyncio.sleep(0.5)
            victim.kill()
            await has_on_board(survivor, 4 if number == 1 else 1)
        while not all(one.ends for one in requests):
            assert on_board(survivor) <= 2  # The second may still make tokens.
            await asyncio.sleep(0.25)
        assert {tuple(one.ends) for one in requests} == {("answered",)}
        await asyncio.sleep(3.0)

    house_run(Shape(prefill=0, slots=8, kv_blocks=200, prefill_ms_per_token=20.0), story)


def on_board(worker: WorkerMember) -> int:
    load = worker.engine.load()
    return load.running + load.waiting


async def has_on_board(worker: WorkerMember, requests: int) -> None:
    async with asyncio.timeout(5.0):
        while on_board(worker) != requests:
            await asyncio.sleep(0.01)
