"""`hocket top` on a real pool: what runs is there, and nothing is said where nobody is."""

from __future__ import annotations

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

PROMPT = list(range(1000, 1320))


@pytest.fixture
def pool(nats_url: str, demo_model: Path) -> Iterator[Pool]:
    built = Pool(nats_url, demo_model)
    try:
        yield built
    finally:
        built.stop()


def top(nats: str, pool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hocket.cluster.cli", "top", "--once", "--pool", pool, *arguments],
        env={**os.environ, "HOCKET_NATS": nats}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def body(tokens: int, **more: object) -> dict[str, object]:
    return {"model": "test-model", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}


def test_what_runs_is_shown(pool: Pool) -> None:
    urls = [(pool.router(policy="kv"), pool.base_url)[1] for _ in range(2)]
    pool.worker("prefill", kv_blocks=64)
    pool.worker("decode", kv_blocks=64, sim_itl_ms=40)
    for pool.base_url in urls:
        pool.wait_workers(prefill=1, decode=1)
    with httpx.Client(base_url=urls[0], timeout=60, trust_env=False) as client:
        for _ in range(2):  # The second finds the first one's prompt in the decode worker's cache.
            assert client.post("/v1/completions", json=body(1)).status_code == 200
        with client.stream("POST", "/v1/completions", json=body(1500, stream=True)) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            shown = top(pool.nats_url, pool.pool, "--json")
            table = top(pool.nats_url, pool.pool)
    assert shown.returncode == 0, shown.stderr
    view = json.loads(shown.stdout)
    assert sorted(router["in_flight"] for router in view["routers"]) == [0, 1]
    assert {(router["policy"], router["version"]) for router in view["routers"]} == {("kv", 0)}
    assert max(router["hit_rate"] or 0.0 for router in view["routers"]) > 0.3
    prefill, decode = view["workers"]
    assert (prefill["role"], prefill["state"], prefill["kv_blocks"]) == ("prefill", "ready", 64)
    assert (decode["role"], decode["state"], decode["slots"], decode["running"], decode["streams"]) == (
        "decode", "ready", 8, 1, 1,
    )  # fmt: skip
    assert decode["kv_blocks_used"] >= len(PROMPT) // 32
    assert list(decode["index_by_router"].values()) == ["exact", "exact"]
    assert decode["drift"] is not None
    assert prefill["kv_gb_per_s"] is not None
    assert table.returncode == 0
    assert pool.pool in table.stdout
    assert decode["worker_id"] in table.stdout


def test_nobody_there_is_said(nats_url: str) -> None:
    empty = top(nats_url, "nobody")
    assert empty.returncode == 1
    assert "no router answered and no worker was heard of pool 'nobody'" in empty.stderr
    away = top("nats://127.0.0.1:9", "nobody")
    assert away.returncode == 1
    assert "cannot reach NATS" in away.stderr
