"""What the tests of the workers share: fast simulators in pairs, prompts, right answers, and what shows a leak."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from scripted_router import ScriptedRouter

from hocket.bus.base import Bus
from hocket.bus.messages import SamplingParams, WorkerCard
from hocket.transport.base import HandoffKey
from hocket.transport.links.inproc import InprocFaults, InprocTransport
from hocket.workers.config import WorkerConfig
from hocket.workers.engines.base import DecodeTask, EngineInfo, EngineLoad, PrefillTask, StepOutput
from hocket.workers.engines.sim.engine import SimEngine
from hocket.workers.engines.sim.kv import expected_tokens
from hocket.workers.worker import Identity, run_worker

VOCABULARY = range(1000)
LAYERS = 3


def sim_config(role: str, **changes: object) -> WorkerConfig:
    """A fast simulator; `changes` are fields of WorkerConfig."""
    settings: dict[str, object] = {
        "role": role,
        "engine": "sim",
        "model": "sim",
        "transports": "inproc",
        "slots": 8,
        "block_tokens": 8,
        "kv_blocks": 256,
        "chunk_tokens": 64,
        "sim_layers": LAYERS,
        "sim_vocab": len(VOCABULARY),
        "sim_itl_ms": 0.0,
        "sim_prefill_ms_per_token": 0.0,
        "handoff_timeout_s": 10.0,
        "grace_s": 2.0,
        "heartbeat_s": 0.1,
    }
    return WorkerConfig(**(settings | changes))  # type: ignore[arg-type]  # msgspec checks the values


def prompt_of(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(VOCABULARY, k=length)


def right_answer(token_ids: list[int], sampling: SamplingParams) -> list[int]:
    return expected_tokens(token_ids, sampling, planes=LAYERS, vocabulary=VOCABULARY)


@dataclass
class SimPair:
    """One prefill and one decode simulator. `epoch` is the decode side's."""

    prefill: SimEngine
    decode: SimEngine
    info: EngineInfo
    faults: InprocFaults
    epoch: int = 7
    outputs: dict[str, list[StepOutput]] = field(default_factory=dict)

    def prefill_task(
        self, token: bytes, token_ids: list[int], *, delivery: int = 1, addresses: tuple[str, ...] = ()
    ) -> PrefillTask:
        return PrefillTask(
            request_id=token.hex(),
            key=HandoffKey(token, 1, delivery),
            token_ids=token_ids,
            decode_addresses=addresses or self.info.handoff_addresses,
            decode_epoch=self.epoch,
            fingerprint=self.info.fingerprint,
            timeout_s=5.0,
        )

    async def answer(
        self,
        token_ids: list[int],
        sampling: SamplingParams,
        *,
        token: bytes | None = None,
        timeout_s: float = 5.0,
        on_step: Callable[[StepOutput], None] = lambda _: None,
    ) -> list[int]:
        """Decode alone, or with somebody's prefill for `token`."""
        made: list[StepOutput] = []
        task = DecodeTask(
            request_id=(token or b"local").hex(),
            attempt=1,
            token_ids=token_ids,
            sampling=sampling,
            handoff_token=token,
            handoff_timeout_s=timeout_s,
        )
        self.outputs[task.request_id] = made

        def step(output: StepOutput) -> None:
            made.append(output)
            on_step(output)

        await self.decode.decode(task, step)
        return [token_id for output in made for token_id in output.token_ids]

    async def hand_over(self, token_ids: list[int], sampling: SamplingParams, token: bytes) -> list[int]:
        async with asyncio.TaskGroup() as tasks:
            answer = tasks.create_task(self.answer(token_ids, sampling, token=token))
            tasks.create_task(self.prefill.prefill(self.prefill_task(token, token_ids)))
        return answer.result()

    async def settled(self) -> None:
        """Wait until every block is back and nothing is under way; the failure shows what is left."""
        try:
            async with asyncio.timeout(3):
                while self.leaks():
                    await asyncio.sleep(0.01)
        except TimeoutError:
            assert self.leaks() == {}

    def leaks(self) -> dict[str, object]:
        return {
            role: (load, engine.endpoint.stats)
            for role, engine in (("prefill", self.prefill), ("decode", self.decode))
            if (load := engine.load()) != EngineLoad(0, 0, engine.kv.blocks)
            or engine.endpoint.stats.receiving
            or engine.endpoint.stats.sending
        }


class PairMaker(Protocol):
    async def __call__(self, **changes: object) -> SimPair: ...


class Member:
    """One worker of a cluster, in this process."""

    def __init__(self, config: WorkerConfig, bus: Bus, faults: InprocFaults) -> None:
        self.identity = Identity.new(config)
        transports = [InprocTransport(faults)] if config.transports == "inproc" else None
        self.engine = SimEngine(
            config, worker_id=self.identity.worker_id, epoch=self.identity.epoch, transports=transports
        )
        self.stop = asyncio.Event()
        self._card: asyncio.Future[WorkerCard] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(
            run_worker(
                config,
                bus=bus,
                engine=self.engine,
                identity=self.identity,
                stop=self.stop,
                on_ready=self._card.set_result,
            )
        )

    async def card(self) -> WorkerCard:
        async with asyncio.timeout(10):
            await asyncio.wait([self._card, self.task], return_when=asyncio.FIRST_COMPLETED)
            if not self._card.done():
                raise AssertionError(f"the worker ended with {await self.task}")
            return self._card.result()

    async def settled(self) -> None:
        """Wait until all its blocks are back."""
        whole = EngineLoad(0, 0, self.engine.kv.blocks)
        try:
            async with asyncio.timeout(3):
                while self.engine.load() != whole:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            assert self.engine.load() == whole


class Cluster:
    """Workers that a test adds, and the router that it plays."""

    def __init__(self, pool: str, router: ScriptedRouter, make_bus: Callable[[str], Bus]) -> None:
        self.pool = pool
        self.router = router
        self.faults = InprocFaults()
        self.members: list[Member] = []
        self._make_bus = make_bus

    async def worker(self, role: str, **changes: object) -> tuple[Member, WorkerCard]:
        config = sim_config(role, pool=self.pool, **changes)
        member = Member(config, self._make_bus(role), self.faults)
        self.members.append(member)
        return member, await member.card()

    async def pair(self, **changes: object) -> WorkerCard:
        """One of each; the card of the decode worker."""
        await self.worker("prefill", **changes)
        _, card = await self.worker("decode", **changes)
        return card

    async def settled(self) -> None:
        """No worker that still runs holds a block or a slot."""
        for member in self.members:
            if not member.task.done():
                await member.settled()

    async def stop(self) -> None:
        """Every worker that still runs must hold nothing, stop when told to, and exit with 0."""
        await self.settled()
        for member in self.members:
            if not member.task.done():
                member.stop.set()
                async with asyncio.timeout(5):
                    assert await member.task == 0

    async def abandon(self) -> None:
        for member in self.members:
            member.task.cancel()
            await asyncio.wait([member.task])
