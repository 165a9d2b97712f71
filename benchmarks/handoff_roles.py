"""The two processes of `kv_handoff.py`: each does what stdin says, a JSON line a step, and answers with one."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import IO, Literal

import msgspec
from handoff_cases import Arena, Case, HostArena, HostMemory, Memory
from handoff_methods import (
    CopySink,
    Endpoints,
    Facts,
    HandoffSink,
    HandoffSource,
    LayerSource,
    Sink,
    SocketSink,
    SocketSource,
    Source,
)
from handoff_nixl import Agent, NixlSink, NixlSource

Step = Literal["case", "open", "accept", "prepare", "go", "spoil", "check", "idle"]


class Setup(msgspec.Struct, frozen=True):
    """A process's command line."""

    side: Literal["prefill", "decode"]
    device: str  # "host", "cuda" (one GPU), "peers" (two); "interpreted": the GPU's way on the CPU
    arena_bytes: int
    nixl_site: str | None = None


class Command(msgspec.Struct, frozen=True):
    """To one of the two."""

    step: Step
    method: str = ""
    case: Case | None = None
    theirs: Facts = Facts()
    ahead: bool = True
    seconds: float = 0.0


class Answer(msgspec.Struct, frozen=True):
    """From one of the two."""

    error: str = ""
    mine: Facts = Facts()
    at: float = 0.0  # `time.perf_counter`; of a copy inside one process: how long it took
    cpu_s: float = 0.0
    link: str = ""  # of ours: what moved the bytes
    wrong_blocks: int = 0


class Role:
    """One of the two processes."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        if setup.nixl_site:
            sys.path.append(setup.nixl_site)
        self._arena = _arena(setup)
        self._agent: Agent | None = None
        self._case: Case | None = None
        self._endpoints: Endpoints | None = None
        self._sources: dict[str, Source] = {}
        self._sinks: dict[str, Sink] = {}

    async def run(self, answers: IO[str]) -> None:
        """Until stdin ends."""
        loop = asyncio.get_running_loop()
        print(msgspec.json.encode(Answer()).decode(), file=answers, flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            command = msgspec.json.decode(line, type=Command)
            try:
                answer = await self._do(command)
            except Exception as error:  # The other process's next step, and other methods, must not hang on this one.
                answer = Answer(error=f"{type(error).__name__}: {error}"[:300])
            print(msgspec.json.encode(answer).decode(), file=answers, flush=True)
        await self._close_case()

    async def _do(self, command: Command) -> Answer:
        name = command.method
        match command.step:
            case "case":
                assert command.case
                await self._close_case()
                self._begin(command.case)
                return Answer()
            case "open":
                if self._setup.side == "prefill":
                    self._sources[name] = source = self._source(name)
                    return Answer(mine=await source.open(command.theirs))
                self._sinks[name] = sink = self._sink(name)
                return Answer(mine=await sink.open())
            case "accept":
                await self._sinks[name].accept(command.theirs)
                return Answer()
            case "prepare":
                if self._setup.side == "prefill":
                    await self._sources[name].prepare(command.theirs, ahead=command.ahead)
                    return Answer()
                return Answer(mine=await self._sinks[name].prepare())
            case "go" | "idle":
                return await self._measured(command)
            case "spoil":
                self._memory.spoil()
                return Answer()
            case "check":
                return Answer(wrong_blocks=self._memory.wrong_blocks())

    async def _measured(self, command: Command) -> Answer:
        before, at = time.process_time(), 0.0
        one = self._sources.get(command.method) or self._sinks[command.method]
        if command.step == "idle":
            await one.idle(command.seconds)
        elif self._setup.side == "prefill":
            at = await self._sources[command.method].send()
        else:
            at = await self._sinks[command.method].receive()
        cpu_s = time.process_time() - before
        link = self._endpoints.link_of(command.method) if self._endpoints else ""
        return Answer(at=at, cpu_s=cpu_s, link=link)

    def _begin(self, case: Case) -> None:
        self._case = case
        self._memory = _memory(case, self._arena)
        if self._setup.side == "prefill":
            self._memory.fill()
        self._endpoints = Endpoints(self._memory, is_decode=self._setup.side == "decode")

    async def _close_case(self) -> None:
        for source in self._sources.values():
            await source.aclose()
        for sink in self._sinks.values():
            await sink.aclose()
        self._sources.clear()
        self._sinks.clear()
        if self._endpoints:
            await self._endpoints.aclose()
            self._endpoints = None

    def _nixl(self) -> Agent:
        if self._agent is None:
            self._agent = Agent(self._arena, self._setup.side)
        return self._agent

    def _source(self, name: str) -> Source:
        assert self._case
        assert self._endpoints
        if name == "nixl":
            return NixlSource(self._case, self._nixl())
        if name == "sockets":
            assert isinstance(self._memory, HostMemory)
            return SocketSource(self._case, self._memory)
        if self._case.layer_ms and isinstance(self._memory, HostMemory):
            return LayerSource(self._case, self._endpoints, name)
        if self._case.layer_ms:
            from handoff_gpu import GpuLayerSource  # It needs torch.

            return GpuLayerSource(self._case, self._endpoints, name)
        return HandoffSource(self._case, self._endpoints, name)

    def _sink(self, name: str) -> Sink:
        assert self._case
        assert self._endpoints
        if name == "nixl":
            return NixlSink(self._nixl())
        if isinstance(self._memory, HostMemory):
            if name == "sockets":
                return SocketSink(self._case, self._memory)
            if name == "memcpy":
                return CopySink(self._case, self._memory)
        elif name == "one process":
            from handoff_gpu import GpuCopySink, GpuMemory

            assert isinstance(self._memory, GpuMemory)
            return GpuCopySink(self._case, self._memory)
        elif name == "peer copy":
            from handoff_gpu import GpuMemory, PeerCopySink

            assert isinstance(self._memory, GpuMemory)
            return PeerCopySink(self._case, self._memory)
        return HandoffSink(self._case, self._endpoints, name)


def _arena(setup: Setup) -> Arena:
    if setup.device == "host":
        return HostArena(setup.arena_bytes)
    from handoff_gpu import GpuArena

    return GpuArena(setup.arena_bytes, setup.device, int(setup.device == "peers" and setup.side == "decode"))


def _memory(case: Case, arena: Arena) -> Memory:
    if isinstance(arena, HostArena):
        return HostMemory(case, arena)
    from handoff_gpu import GpuArena, GpuMemory

    assert isinstance(arena, GpuArena)
    return GpuMemory(case, arena)


def run_role(setup: Setup) -> None:
    """Until stdin ends. Whatever libraries print to stdout goes to stderr: stdout is for answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asyncio.run(Role(setup).run(answers))
