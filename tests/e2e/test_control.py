"""Two routers, real workers, the real command line: policies switch under load and no request is lost."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pool import Pool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

RAISES = """
from hocket.router.policies import Choice

class Raises:
    asked = 0

    def pick(self, request, workers, now, rng):
        Raises.asked += 1
        if Raises.asked > 3:  # It passes its trial.
            raise ValueError("no more")
        return Choice(workers[0].worker_id)
"""
SLOW = """
import time
from hocket.router.policies import Choice

class Slow:
    def pick(self, request, workers, now, rng):
        time.sleep(0.02)  # Waits, so that the trial, which counts its own time alone, does not see it.
        return Choice(workers[-1].worker_id, why="slow")
"""


@pytest.fixture
def pool(nats_url: str, demo_model: Path) -> Iterator[Pool]:
    built = Pool(nats_url, demo_model)
    try:
        yield built
    finally:
        built.stop()


def hocket(pool: Pool, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hocket.cluster.cli", *arguments, "--pool", pool.pool],
        env={**os.environ, "HOCKET_NATS": pool.nats_url}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


async def operate(pool: Pool, *arguments: str) -> str:
    done = await asyncio.to_thread(hocket, pool, *arguments)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


class Load:
    """Asks every router again and again; keeps what was not answered in full."""

    def __init__(self, urls: list[str]) -> None:
        self._urls = urls
        self.answered: list[str] = []  # request ids
        self.failures: list[str] = []

    async def run(self, number: int) -> None:
        async with httpx.AsyncClient(base_url=self._urls[number % len(self._urls)], timeout=30) as client:
            while True:
                body = {"model": "test-model", "prompt": f"hello {number} " * 8, "max_tokens": 4, "temperature": 0}
                answer = await client.post("/v1/completions", json=body)
                if answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4:
                    self.answered.append(answer.headers["x-request-id"])
                else:
                    self.failures.append(answer.text)

    async def more(self, count: int) -> None:
        """Until so many more are answered."""
        wanted = len(self.answered) + count
        async with asyncio.timeout(60):
            while len(self.answered) < wanted:
                await asyncio.sleep(0.02)


def start(pool: Pool, *, routers: int = 2) -> list[str]:
    urls = [(pool.router(policy="round_robin"), pool.base_url)[1] for _ in range(routers)]
    pool.worker("prefill")
    for _ in range(2):
        pool.worker("decode", sim_itl_ms=1)
    for url in urls:
        pool.base_url = url
        pool.wait_workers(prefill=1, decode=2)
    return urls


async def test_policies_switch_under_load_and_no_request_is_lost(pool: Pool, tmp_path: Path) -> None:
    for name, text in (("raises", RAISES), ("slow", SLOW)):
        (tmp_path / f"{name}.py").write_text(text)
    load = Load(start(pool))
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(load.run(number)) for number in range(4)]
        await load.more(10)
        assert "on 2 of 2 routers" in await operate(pool, "policy", "set", "kv")
        await operate(pool, "policy", "canary", "least_loaded", "--share", "0.5")
        await operate(pool, "policy", "shadow", "kv", "round_robin")
        await load.more(60)
        compared = json.loads(await operate(pool, "policy", "show", "--json"))
        table = await operate(pool, "policy", "show")
        await operate(pool, "policy", "shadow", f"{tmp_path}/slow.py:Slow")
        await operate(pool, "policy", "set", f"{tmp_path}/raises.py:Raises")
        async with asyncio.timeout(60):
            while True:  # A slow shadow is asked a few times a second at most.
                await load.more(20)
                failed = json.loads(await operate(pool, "policy", "show", "--json"))
                if all(router["replaced"] for router in failed["routers"]) and failed["shadows"][0]["stopped"]:
                    break
        replaced = pool.metric("hocket_policies_replaced", place="primary")
        back = await operate(pool, "policy", "rollback")
        await load.more(10)
        recovered = json.loads(await operate(pool, "policy", "show", "--json"))
        for task in running:
            task.cancel()

    assert not load.failures
    primary, canary = compared["arms"]
    assert (primary["policy"], canary["policy"]) == ("kv", "least_loaded")
    assert all(arm["requests"] > 10 and not arm["errors"] and arm["ttft_s"]["p50"] > 0 for arm in compared["arms"])
    same, other = compared["shadows"]
    assert same["scored"] > 20
    assert same["same_worker"] >= primary["picks"] - (same["seen"] - same["scored"])  # kv agrees with kv
    assert other["same_worker"] < other["scored"]
    assert {router["version"] for router in compared["routers"]} == {3}
    assert table.count("\n") >= 6
    [arm] = failed["arms"]
    assert "no more" in arm["replaced"]
    assert "took" in failed["shadows"][0]["stopped"]
    assert replaced == 1
    assert "version 6: kv decides" in back
    assert "least_loaded instead" in back  # as before the policy that failed
    assert [arm["arm"] for arm in recovered["arms"]] == ["primary", "canary"]
    assert not any(arm["replaced"] for arm in recovered["arms"])


async def test_a_request_is_explained_by_whichever_router_had_it(pool: Pool) -> None:
    load = Load(start(pool))
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(load.run(number)) for number in range(2)]
        await load.more(6)
        for task in running:
            task.cancel()
    routers = set()
    for request_id in load.answered:
        receipt = json.loads(await operate(pool, "explain", request_id, "--json"))
        routers.add(receipt["router_id"])
        [attempt] = receipt["attempts"]
        assert attempt["worker"] in {candidate["worker"] for candidate in attempt["candidates"]}
        assert len(attempt["candidates"]) == 2
        assert (attempt["policy"], attempt["arm"]) == ("round_robin", "primary")
        assert receipt["outcome"]["end"] == "finished"
        assert receipt["outcome"]["output_tokens"] == 4
    assert len(routers) == 2
    text = await operate(pool, "explain", load.answered[0])
    assert "by round_robin (primary, version 0)" in text
    assert "hello" not in text
    lost = hocket(pool, "explain", "0" * 32)
    assert lost.returncode == 1
    assert "no router remembers" in lost.stderr


async def test_an_explained_answer_comes_with_its_receipt(pool: Pool) -> None:
    [url] = start(pool, routers=1)
    body = {"model": "test-model", "prompt": "hello", "max_tokens": 4, "stream": True}
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        answer = await client.post("/v1/completions", json=body, headers={"x-hocket-explain": "1"})
    [comment] = [line for line in answer.text.splitlines() if line.startswith(": hocket ")]
    [receipt] = json.loads(comment.removeprefix(": hocket "))["receipts"]
    assert receipt["request_id"] == answer.headers["x-request-id"]
    assert receipt["outcome"]["end"] == "finished"
    assert receipt["attempts"][0]["plan"] == answer.headers["x-hocket-plan"]
