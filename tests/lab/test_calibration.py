"""The lab against the world: the same scenarios in real processes, on a real nats-server and real links, end in the same way."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import tomllib
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from hocket.bus.messages import SamplingParams
from hocket.bus.server import EmbeddedServer
from hocket.lab.clients import VOCABULARY, Request
from hocket.lab.house import House
from hocket.lab.log import EventLog
from hocket.lab.loop import VirtualLoop, run
from hocket.lab.members import Member, Shape, WorkerMember

HERE = Path(__file__).parent
WORKER = HERE.parent / "workers" / "worker_child.py"
ROUTER = HERE / "router_child.py"
WAIT_S = 40.0
GROUP = 5  # scenarios at once


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One story of calibration.toml."""

    name: str
    pool: dict[str, int | float]
    requests: list[tuple[float, int, int]]
    ends: list[str]
    faults: list[tuple[float, str, str]] = []

    @property
    def shape(self) -> Shape:
        return msgspec.convert({"local_prefill_tokens_max": 0, "kv_blocks": 256, **self.pool}, Shape)

    def clients(self) -> list[tuple[float, Request]]:
        return [
            (
                at_s,
                Request(
                    number, random.Random(number).choices(VOCABULARY, k=prompt), SamplingParams(max_tokens=most), at_s
                ),
            )
            for number, (at_s, prompt, most) in enumerate(self.requests)
        ]


SCENARIOS = msgspec.convert(tomllib.loads((HERE / "calibration.toml").read_text())["scenario"], list[Scenario])


# ---- the lab


def play_in_the_lab(scenario: Scenario) -> list[str]:
    async def main(loop: VirtualLoop) -> list[str]:
        house = House(loop, random.Random(1), scenario.shape, EventLog(loop.time))
        house.is_stopping = True  # Nobody restarts what is killed here.
        clients = scenario.clients()
        with house.logging():
            await house.start()
            ready_s = loop.time()
            for at_s, request in clients:
                loop.call_at(ready_s + at_s, house.send, request)
            for at_s, kind, who in scenario.faults:
                loop.call_at(ready_s + at_s, strike, house, kind, who)
            await asyncio.sleep(WAIT_S)
        assert house.violations == []
        return [how for _, request in clients for how in request.ends]

    return run(main)


def strike(house: House, kind: str, who: str) -> None:
    role, _, number = who.partition("-")
    if role == "nats":
        house.broker.stop() if kind == "kill" else house.broker.start()
        return
    members: Sequence[Member] = house.routers
    if role != "router":
        members = [worker for worker in house.workers if worker.role == role]
    victim = members[int(number)]
    match kind:
        case "kill":
            victim.kill()
        case "pause":
            victim.process.pause()
        case "resume":
            victim.process.resume()
        case "stop":
            assert isinstance(victim, WorkerMember)
            victim.ask_to_stop()


# ---- the world


async def play_for_real(scenario: Scenario) -> list[str]:
    shape = scenario.shape
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(EmbeddedServer())
        children: dict[str, asyncio.subprocess.Process] = {}
        for role, count in (("prefill", shape.prefill), ("decode", shape.decode)):
            for number in range(count):
                config = shape.worker_config(role, nats=server.url, transports="tcp")
                arguments = [str(WORKER), msgspec.json.encode(config).decode()]
                children[f"{role}-{number}"] = await child(stack, arguments)
        router = children["router-0"] = await child(
            stack, [str(ROUTER), msgspec.json.encode(shape).decode(), server.url]
        )
        await heard(router)
        steps: list[tuple[float, Request | tuple[str, str]]] = [*scenario.clients()]
        steps += [(at_s, (kind, who)) for at_s, kind, who in scenario.faults]
        loop = asyncio.get_running_loop()
        ready_s = loop.time()
        for at_s, step in sorted(steps, key=lambda step: step[0]):
            await asyncio.sleep(ready_s + at_s - loop.time())
            if isinstance(step, Request):
                asked = {"number": step.number, "prompt": step.prompt, "max_tokens": step.sampling.max_tokens}
                assert router.stdin is not None
                router.stdin.write(json.dumps(asked).encode() + b"\n")
            else:
                await strike_for_real(server, children, *step)
        async with asyncio.timeout(WAIT_S):
            return [await heard(router) for _ in scenario.requests]


async def child(stack: AsyncExitStack, arguments: list[str]) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL
    )

    async def end() -> None:
        if process.returncode is None:
            process.kill()
        await process.wait()

    stack.push_async_callback(end)
    return process


async def heard(router: asyncio.subprocess.Process) -> str:
    assert router.stdout is not None
    async with asyncio.timeout(WAIT_S):
        line = await router.stdout.readline()
    said = json.loads(line)
    assert said["number"] != -1, said["how"]
    return str(said["how"])


async def strike_for_real(
    server: EmbeddedServer, children: dict[str, asyncio.subprocess.Process], kind: str, who: str
) -> None:
    if who == "nats":
        await (server.stop() if kind == "kill" else server.start())
        return
    signals = {"kill": signal.SIGKILL, "pause": signal.SIGSTOP, "resume": signal.SIGCONT, "stop": signal.SIGTERM}
    os.kill(children[who].pid, signals[kind])


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_scenario_ends_in_the_lab_as_it_should(scenario: Scenario):
    assert set(play_in_the_lab(scenario)) == set(scenario.ends)


async def play_all_for_real() -> dict[str, list[str]]:
    gate = asyncio.Semaphore(GROUP)

    async def one(scenario: Scenario) -> list[str]:
        async with gate:
            return await play_for_real(scenario)

    async with asyncio.TaskGroup() as tasks:
        playing = {scenario.name: tasks.create_task(one(scenario)) for scenario in SCENARIOS}
    return {name: sorted(task.result()) for name, task in playing.items()}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_world_ends_every_scenario_as_the_lab_does():
    ends = {scenario.name: sorted(play_in_the_lab(scenario)) for scenario in SCENARIOS}
    assert asyncio.run(play_all_for_real()) == ends
