"""The prefill queue and several routers, with real processes."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest
from pool import Pool
from test_sim_pool import Reference, body, client_of, complete

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

LANES = f"{Path(__file__).with_name('lanes.py')}:ToTarget"
PILE = f"{Path(__file__).with_name('lanes.py')}:AllToTheFirst"


@pytest.fixture(scope="module")
def reference(demo_model: Path) -> Reference:
    return Reference(demo_model)


@pytest.fixture
def pool(nats_url: str, demo_model: Path) -> Iterator[Pool]:
    built = Pool(nats_url, demo_model)
    yield built
    built.stop()


async def all_right(
    pool: Pool, reference: Reference, prompts: list[list[int]], within_s: float
) -> list[asyncio.Task[None]]:
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
        receipt = answer.json()["hocket"]["receipts"][0]
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
        assert {worker: row["hit_tokens"] for worker, row in new.items()} == {
            worker: row["hit_tokens"] for worker, row in old.items()
        }
        assert new[holder]["hit_tokens"] >= 288
        assert sum(row["load"] for row in new.values()) >= 8
        assert sum(row["in_flight"] for row in new.values()) >= 8  # The other router's, as it said.
        for answer in await asyncio.gather(*streams):
            assert answer.status_code == 200


def candidates_of(receipt: dict[str, object]) -> dict[str, dict[str, int]]:
    attempts = receipt["attempts"]
    assert isinstance(attempts, list)
    return {row["worker"]: row for row in attempts[0]["candidates"]}


async def test_two_routers_never_give_a_worker_more_than_it_takes(pool: Pool, reference: Reference):
    """100 requests to each of two routers at once; a worker takes its 40 slots and a quarter more that wait."""
    pool.router(policy=PILE)
    urls = [pool.base_url]
    ports = [free_port() for _ in range(5)]
    for port in ports:
        pool.worker("decode", slots=40, kv_blocks=4000, sim_itl_ms=20, metrics_port=port)
    pool.worker("prefill", slots=16)
    pool.router(policy=PILE)
    urls.append(pool.base_url)
    pool.wait_workers(prefill=1, decode=5)
    rng = random.Random(4)
    prompts = [reference.prompt(rng, 40) for _ in range(200)]
    limits = httpx.Limits(max_connections=None)
    running: list[float] = []
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=60, limits=limits, trust_env=False))
            for url in urls
        ]

        async def one(index: int) -> str:
            answer = await clients[index % 2].post("/v1/completions", json=body(prompts[index], 60))
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == reference.text(prompts[index], max_tokens=60)
            return answer.headers["x-hocket-decode-worker"]

        tasks = [asyncio.create_task(one(index)) for index in range(len(prompts))]
        while not all(task.done() for task in tasks):
            for port in ports:
                text = (await clients[0].get(f"http://127.0.0.1:{port}/metrics")).text
                running += [
                    float(line.split()[-1])
                    for line in text.splitlines()
                    if re.match("[a-z_]*num_requests_running\\b", line)
                ]
            await asyncio.sleep(0.05)
        workers = [await task for task in tasks]
    assert 0 < max(running) <= 40
    assert max(workers.count(worker) for worker in workers) >= 50  # The first of them was full, and refused.
    refusals = 0.0
    for pool.base_url in urls:
        refusals += pool.metric("hocket_refusals_total", reason="busy")
    assert refusals > 0


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


async def test_processes_share_a_port_and_one_that_dies_is_replaced(pool: Pool, reference: Reference):
    routers = pool.router(processes=2, policy="least_loaded")
    pool.worker("decode", slots=64, kv_blocks=4000, sim_itl_ms=2)
    pool.worker("prefill", slots=16)
    prompt = reference.prompt(random.Random(5), 40)

    async def who_answers() -> set[str]:
        """Each request is a connection of its own, so it may come to either."""
        found: set[str] = set()
        for _ in range(30):
            try:
                found.add(str((await receipt_of(pool.base_url, prompt))["router_id"]))
            except (httpx.TransportError, AssertionError):  # Just killed, or no worker is known yet.
                await asyncio.sleep(0.1)
        return found

    async with asyncio.timeout(60):
        while len(before := await who_answers()) < 2:
            pass
        os.kill(child_of(routers.process.pid), signal.SIGKILL)
        while len(after := await who_answers()) < 2 or after == before:
            pass
    assert len(after & before) == 1


def child_of(pid: int) -> int:
    """One of the routers that a supervisor has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return next(int(one) for one in children if b"--config" in Path(f"/proc/{one}/cmdline").read_bytes())


async def test_what_is_over_a_limit_is_refused_at_once_and_fits_later(pool: Pool, reference: Reference):
    pool.router(kv_blocks_max=40, tenant_from="header", tenant_kv_blocks_max=30)
    pool.worker("decode", slots=64, kv_blocks=4000, sim_itl_ms=30)
    pool.worker("prefill", slots=8)
    pool.wait_workers(prefill=1, decode=1)
    prompt = reference.prompt(random.Random(6), 300)  # With 20 more 10 blocks of 32 tokens.

    async with client_of(pool) as client:

        async def ask(tenant: str) -> httpx.Response:
            headers = {"x-hocket-tenant": tenant}
            return await client.post("/v1/completions", json=body(prompt, 20), headers=headers)

        running = [asyncio.create_task(ask("a")) for _ in range(3)]
        while pool.metric("hocket_num_requests_running") < 3:
            await asyncio.sleep(0.01)
        over_its_own = await ask("a")
        running.append(asyncio.create_task(ask("b")))
        while pool.metric("hocket_num_requests_running") < 4:
            await asyncio.sleep(0.01)
        over_the_pools = await ask("c")
        assert (over_its_own.status_code, over_its_own.json()["error"]["code"]) == (429, "tenant_limit")
        assert (over_the_pools.status_code, over_the_pools.json()["error"]["code"]) == (503, "overloaded")
        assert int(over_the_pools.headers["retry-after"]) >= 1
        for answer in await asyncio.gather(*running):
            assert answer.status_code == 200, answer.text
        assert (await ask("c")).status_code == 200
    assert pool.metric("hocket_admission_refusals_total", reason="overloaded") == 1
