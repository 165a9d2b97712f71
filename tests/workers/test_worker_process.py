"""A worker as a process of its own: its ready line, its signals, its exit codes, and a bus that comes and goes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
from scripted_router import ScriptedRouter, heartbeats
from workers_rig import Cluster, prompt_of, right_answer, sim_config

from hocket.bus.ids import WorkerId
from hocket.bus.messages import Admitted, Goodbye, Heartbeat, SamplingParams, WorkerCard
from hocket.bus.nats_bus import NatsBus
from hocket.bus.server import EmbeddedServer

CHILD = Path(__file__).with_name("worker_child.py")
GREEDY = SamplingParams(max_tokens=20, temperature=0.0)
ENDLESS = SamplingParams(max_tokens=2000, temperature=0.0)


class Child:
    def __init__(self, process: asyncio.subprocess.Process, router: ScriptedRouter) -> None:
        self.process = process
        self._router = router

    async def card(self) -> WorkerCard:
        assert self.process.stdout is not None
        async with asyncio.timeout(25):
            ready = json.loads(await self.process.stdout.readline())
        card = await self._router.bus.registry.get(WorkerId(ready["ready"]))
        assert card is not None
        return card

    async def exit_code(self) -> int:
        async with asyncio.timeout(25):
            return await self.process.wait()


Spawn = Callable[..., "asyncio.Future[Child]"]


@pytest.fixture
async def router(nats_server: EmbeddedServer) -> AsyncIterator[ScriptedRouter]:
    bus = NatsBus(nats_server.url, name="router")
    await bus.connect()
    scripted = ScriptedRouter(bus)
    await scripted.start()
    yield scripted
    await bus.aclose()


@pytest.fixture
async def spawn(nats_server: EmbeddedServer, router: ScriptedRouter) -> AsyncIterator[Callable[..., object]]:
    children: list[Child] = []

    async def start(role: str, **changes: object) -> Child:
        config = sim_config(role, **({"nats": nats_server.url, "transports": "tcp"} | changes))
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(CHILD), msgspec.json.encode(config).decode(), stdout=asyncio.subprocess.PIPE
        )
        children.append(Child(process, router))
        return children[-1]

    yield start
    for child in children:
        if child.process.returncode is None:
            child.process.kill()
        await child.process.communicate()


async def test_a_pair_of_processes_answers_exactly_and_stops_with_0(spawn: Spawn, router: ScriptedRouter):
    decode, prefill = await spawn("decode", worker_id="d"), await spawn("prefill")
    card = await decode.card()
    assert card.worker_id.startswith("decode-d-")
    assert (await prefill.card()).worker_id.startswith("prefill-")
    assert await router.answer(card, prompt_of(100, 1), GREEDY) == right_answer(prompt_of(100, 1), GREEDY)
    for child in (decode, prefill):
        child.process.send_signal(signal.SIGTERM)
        assert await child.exit_code() == 0
    assert await router.bus.registry.list() == []


async def test_a_second_sigterm_does_not_wait_for_what_runs(spawn: Spawn, router: ScriptedRouter):
    child = await spawn("decode", sim_itl_ms=50.0, grace_s=60.0)
    card = await child.card()
    job = router.job(card, prompt_of(10, 1), ENDLESS)
    assert isinstance(await router.ask(card, job), Admitted)
    child.process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(3):
        while not any(beat.is_draining for beat in heartbeats(router, card)):
            await asyncio.sleep(0.01)
    assert child.process.returncode is None
    child.process.send_signal(signal.SIGTERM)
    assert await child.exit_code() == 0
    await router.wait_for(Goodbye, messages="load")


async def test_a_worker_without_a_bus_or_with_impossible_settings_exits_with_1(spawn: Spawn):
    unreachable = await spawn("decode", nats="nats://127.0.0.1:9")
    too_long = await spawn("decode", max_model_len=100_000)
    assert await unreachable.exit_code() == 1
    assert await too_long.exit_code() == 1


async def test_tokens_made_while_the_bus_was_away_are_delivered_afterwards(
    nats_server: EmbeddedServer, nats_cluster: Cluster
):
    cluster, router = nats_cluster, nats_cluster.router
    card = await cluster.pair(sim_itl_ms=5.0)
    sampling = SamplingParams(max_tokens=200, temperature=0.0)
    prompt = prompt_of(30, 1)
    _, stream = await router.begin(card, prompt, sampling)
    await asyncio.wait_for(stream.first.wait(), 5)
    os.kill(nats_server.pid, signal.SIGKILL)
    await nats_server.wait_exit()
    await nats_server.start()
    await asyncio.wait_for(stream.ended.wait(), 10)
    assert stream.token_ids == right_answer(prompt, sampling)
    router.load.clear()
    await router.wait_for(Heartbeat, messages="load")
    assert await router.answer(card, prompt_of(40, 2), GREEDY) == right_answer(prompt_of(40, 2), GREEDY)


async def test_the_metrics_page_counts_hand_offs_and_blocks(nats_cluster: Cluster):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    await nats_cluster.worker("prefill")
    _, card = await nats_cluster.worker("decode", metrics_port=port)
    await nats_cluster.router.answer(card, prompt_of(100, 1), GREEDY)

    def fetch() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
            return str(response.read(), "utf-8")

    page = await asyncio.to_thread(fetch)
    assert 'hocket_handoffs_total{direction="received",outcome="landed",transport="inproc"} 1.0' in page
    assert f'hocket_kv_bytes_total{{direction="received",transport="inproc"}} {13 * 3 * 64}.0' in page
    assert "kv_cache_usage_perc 0.0" in page
    assert "num_requests_running 0.0" in page
