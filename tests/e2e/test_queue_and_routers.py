"""The prefill queue and several routers, with real processes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pool import Pool
from test_sim_pool import Reference, body, client_of, complete

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

LANES = f"{Path(__file__).with_name('lanes.py')}:ToTarget"


@pytest.fixture(scope="module")
def reference(demo_model: Path) -> Reference:
    return Reference(demo_model)


@pytest.fixture
def pool(nats_url: str, demo_model: Path) -> Iterator[Pool]:
    built = Pool(nats_url, demo_model)
    yield built
    built.stop()


async def all_right(pool: Pool, reference: Reference, prompts: list[list[int]], within_s: float) -> list[asyncio.Task[None]]:
    """Begin every prompt at once; the tasks that check the answers."""
    client = client_of(pool)

    async def one(prompt: list[int]) -> None:
        async with asyncio.timeout(within_s):
            text, plan = await complete(client, prompt, 4)
        assert plan == "remote"
        assert text == reference.text(prompt, max_tokens=4)

    async def close(tasks: list[asyncio.Task[None]]) -> None:
        await asyncio.wait(tasks)
        await client.aclose()

    tasks = [asyncio.create_task(one(prompt)) for prompt in prompts]
    return [*tasks, asyncio.create_task(close(tasks))]


async def test_the_jobs_in_the_lane_of_a_killed_worker_are_done_by_others(pool: Pool, reference: Reference):
    pool.router(policy=LANES, lane_wait_s=60)  # They are taken because their worker is lost, not because they waited.
    pool.worker("decode", slots=64, kv_blocks=4000, sim_itl_ms=2)
    target = pool.worker("prefill", worker_id="target", slots=2, sim_prefill_ms_per_token=50, chunk_tokens=16)
    pool.worker("prefill", worker_id="other", slots=8)
    pool.wait_workers(prefill=2, decode=1)
    rng = random.Random(1)
    tasks = await all_right(pool, reference, [reference.prompt(rng, 200) for _ in range(20)], 12.0)  # ack_wait is 15 s.
    await asyncio.sleep(1.0)  # All of them are in the lane, two at work.
    assert not any(task.done() for task in tasks)
    target.kill()
    await asyncio.gather(*tasks)


async def test_jobs_that_wait_too_long_in_a_busy_workers_lane_are_done_by_others(pool: Pool, reference: Reference):
    pool.router(policy=LANES, lane_wait_s=0.3)
    pool.worker("decode", slots=64, kv_blocks=4000, sim_itl_ms=2)
    pool.worker("prefill", worker_id="target", slots=1, sim_prefill_ms_per_token=100, chunk_tokens=16)
    pool.worker("prefill", worker_id="other", slots=8)
    pool.wait_workers(prefill=2, decode=1)
    rng = random.Random(2)
    first = await all_right(pool, reference, [reference.prompt(rng, 150)], 60.0)  # 15 s of prefill
    await asyncio.sleep(0.5)  # The target has it.
    others = await all_right(pool, reference, [reference.prompt(rng, 40) for _ in range(10)], 12.0)
    await asyncio.gather(*others)
    assert not first[0].done()
    await asyncio.gather(*first)


async def receipt_of(base_url: str, prompt: list[int]) -> dict[str, object]:
    async with httpx.AsyncClient(base_url=base_url, timeout=30, trust_env=False) as client:
        answer = await client.post("/v1/completions", json=body(prompt, 1), headers={"x-hocket-explain": "1"})
        assert answer.status_code == 200, answer.text
        receipt = answer.json()["hocket_receipts"][0]
        assert isinstance(receipt, dict)
        return receipt


async def test_a_new_router_knows_hits_and_loads_when_it_begins_to_listen(pool: Pool, reference: Reference):
    pool.router(policy="kv", reuse_port=True)
    first_url = pool.base_url
    for _ in range(2):
        pool.worker("decode", slots=16, kv_blocks=4000, sim_itl_ms=100)
    pool.worker("prefill", slots=8)
    pool.wait_workers(prefill=1, decode=2)
    rng = random.Random(3)
    prompt = reference.prompt(rng, 320)
    async with client_of(pool) as client:
        first = await client.post("/v1/completions", json=body(prompt, 1))
        holder = first.headers["x-hocket-decode-worker"]
        streams = [asyncio.create_task(client.post("/v1/completions", json=body(reference.prompt(rng, 40), 100)))
                   for _ in range(8)]  # fmt: skip
        await asyncio.sleep(1.0)  # They run.
        pool.router(policy="kv", reuse_port=True)
        assert pool.base_url != first_url
        old = candidates_of(await receipt_of(first_url, prompt))
        new = candidates_of(await receipt_of(pool.base_url, prompt))
        assert {worker: row["hit_blocks"] for worker, row in new.items()} == {
            worker: row["hit_blocks"] for worker, row in old.items()
        }
        assert new[holder]["hit_blocks"] >= 9
        assert sum(row["running"] for row in new.values()) >= 8
        assert sum(row["in_flight"] for row in new.values()) >= 8  # The other router's, as it said.
        for answer in await asyncio.gather(*streams):
            assert answer.status_code == 200


def candidates_of(receipt: dict[str, object]) -> dict[str, dict[str, int]]:
    attempts = receipt["attempts"]
    assert isinstance(attempts, list)
    return {row["worker_id"]: row for row in attempts[0]["candidates"]}


async def test_two_routers_never_give_a_worker_more_than_it_takes(pool: Pool, reference: Reference):
    pool.router(policy="least_loaded")
    first_url = pool.base_url
    for _ in range(4):
        pool.worker("decode", slots=48, kv_blocks=4000, sim_itl_ms=20)
    pool.worker("prefill", slots=16)
    pool.router(policy="least_loaded")
    pool.wait_workers(prefill=1, decode=4)
    rng = random.Random(4)
    prompts = [reference.prompt(rng, 40) for _ in range(200)]
    running: list[int] = []

    async def one(client: httpx.AsyncClient, prompt: list[int]) -> str:
        answer = await client.post("/v1/completions", json=body(prompt, 40))
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == reference.text(prompt, max_tokens=40)
        return answer.headers["x-hocket-decode-worker"]

    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=first_url, timeout=60, limits=limits, trust_env=False) as one_client,
        httpx.AsyncClient(base_url=pool.base_url, timeout=60, limits=limits, trust_env=False) as other_client,
    ):
        tasks = [
            asyncio.create_task(one((one_client, other_client)[index % 2], prompt)) for index, prompt in enumerate(prompts)
        ]
        while not all(task.done() for task in tasks):
            running += [row["running"] for row in candidates_of(await receipt_of(first_url, prompts[0])).values()]
            await asyncio.sleep(0.1)
        workers = [await task for task in tasks]
    assert max(running) <= 48
    assert len(set(workers)) == 4


async def test_processes_share_a_port_and_one_that_dies_is_replaced(pool: Pool, reference: Reference):
    routers = pool.router(processes=2, policy="least_loaded")
    pool.worker("decode", slots=64, kv_blocks=4000, sim_itl_ms=2)
    pool.worker("prefill", slots=16)
    rng = random.Random(5)

    async def routers_that_answer() -> set[object]:
        """Each request is a connection of its own, so it may come to either."""
        return {(await receipt_of(pool.base_url, reference.prompt(rng, 40)))["router_id"] for _ in range(30)}

    async with asyncio.timeout(20):
        while True:
            async with httpx.AsyncClient(base_url=pool.base_url, trust_env=False) as client:
                if (await client.get("/ready")).status_code == 200:
                    break
            await asyncio.sleep(0.1)
    before = await routers_that_answer()
    assert len(before) == 2
    children = [int(pid) for pid in Path(f"/proc/{routers.process.pid}/task/{routers.process.pid}/children").read_text().split()]
    victim = next(
        pid for pid in children if b"router\0--config" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    Path("/proc").joinpath(str(victim)).stat()
    import os
    import signal

    os.kill(victim, signal.SIGKILL)
    async with asyncio.timeout(30):
        while len(after := await routers_that_answer_through(routers_that_answer)) < 2:
            await asyncio.sleep(0.1)
    assert len(after & before) == 1


async def routers_that_answer_through(ask):  # type: ignore[no-untyped-def]
    try:
        return await ask()
    except httpx.TransportError:  # A connection that the dead one had taken.
        return set()
