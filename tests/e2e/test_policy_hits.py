"""Policies on real processes: who follows prefixes finds them, as the engines report it. Counted in tokens, not in time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pool import Pool

from hocket.bus import NatsBus
from hocket.cluster.ask_routers import ask_all
from hocket.cluster.policy import change, set_primary
from hocket.router.control_messages import AskPolicies, PolicyStatus
from hocket.workers.engines.sim.vocabulary import sim_vocabulary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

WORKERS, BLOCK = 4, 16
TALKS, TURNS, TURN_TOKENS = 6, 4, 8 * BLOCK
REUSABLE = sum(turn * TURN_TOKENS for turn in range(TURNS)) / sum((turn + 1) * TURN_TOKENS for turn in range(TURNS))
"""What one endless cache would have of it: everything but what each turn adds."""


@pytest.fixture
def pool(nats_url: str, demo_model: Path) -> Iterator[Pool]:
    built = Pool(nats_url, demo_model)
    try:
        yield built
    finally:
        built.stop()


async def talk(pool: Pool, salt: str) -> dict[str, set[str]]:
    """Conversations take turns, one request after the other; which workers each of them saw."""
    rng, vocabulary = random.Random(salt), sim_vocabulary(str(pool.model), 0)
    prompts: dict[str, list[int]] = {f"{salt}-{number}": [] for number in range(TALKS)}
    seen: dict[str, set[str]] = {name: set() for name in prompts}
    async with httpx.AsyncClient(base_url=pool.base_url, timeout=60, trust_env=False) as client:
        for _ in range(TURNS):
            for name in rng.sample(list(prompts), TALKS):
                prompts[name] += rng.choices(vocabulary, k=TURN_TOKENS)
                body = {"model": "test-model", "prompt": prompts[name], "max_tokens": 1, "temperature": 0}
                answer = await client.post("/v1/completions", json=body, headers={"x-hocket-session": name})
                assert answer.status_code == 200, answer.text
                seen[name].add(answer.headers["x-hocket-decode-worker"])
    return seen


async def test_policies_that_follow_prefixes_find_them(pool: Pool) -> None:
    sizes = {"block_tokens": BLOCK, "kv_blocks": 1024, "sim_prefill_ms_per_token": 0, "sim_itl_ms": 0}
    starting = [pool.start_worker("decode", **sizes) for _ in range(WORKERS)]
    for worker in starting:
        worker.wait_ready()
    pool.router(policy="random")
    await asyncio.to_thread(pool.wait_workers, prefill=0, decode=WORKERS)
    bus = NatsBus(pool.nats_url, name="operator")
    await bus.connect()
    rates, workers = {}, {}
    try:
        for policy in ("random", "round_robin", "session_affinity", "kv", "cost"):
            await change(bus, pool.pool, set_primary(policy, {}))
            workers[policy] = await talk(pool, policy)
            [status] = await ask_all(bus, pool.pool, AskPolicies(), PolicyStatus, count=1)
            [arm] = status.arms
            assert (arm.policy, arm.requests, arm.raised, arm.replaced) == (policy, TALKS * TURNS, 0, "")
            rates[policy] = arm.cached_tokens / arm.cached_of_tokens
    finally:
        await bus.aclose()
    blind = max(rates["random"], rates["round_robin"])
    assert min(rates["kv"], rates["cost"]) > blind, rates
    assert rates["kv"] == pytest.approx(REUSABLE), rates
    assert rates["session_affinity"] == pytest.approx(REUSABLE), rates
    assert all(len(homes) == 1 for homes in workers["session_affinity"].values())
