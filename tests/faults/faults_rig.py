"""Pairs of engine processes, hand-offs that a fault meets at a known byte, and what must hold afterwards."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec
from fault_proxy import FaultProxy
from faults_messages import Cancel, Command, Decode, Ended, Event, Look, Prefill, Progress, Ready, State

from hocket.bus.messages import SamplingParams
from hocket.workers.config import WorkerConfig
from hocket.workers.engines.sim.kv import CELL_BYTES, expected_tokens

CHILD = Path(__file__).parent / "engine_child.py"
Role = Literal["prefill", "decode"]
LAYERS, HEADS, BLOCK_TOKENS, KV_BLOCKS = 4, 64, 8, 64
VOCABULARY = range(1000)
CHUNK_TOKENS = 64
PROMPT_TOKENS = 5 * CHUNK_TOKENS + 4  # the last chunk is its last hundredth
BLOCKS = -(-PROMPT_TOKENS // BLOCK_TOKENS)
HANDOFF_BYTES = BLOCKS * BLOCK_TOKENS * LAYERS * HEADS * CELL_BYTES
MOST_BYTES = 5 * CHUNK_TOKENS * LAYERS * HEADS * CELL_BYTES
ANSWER_TOKENS = 16
START_S = 30.0
FAULT_S = 3.0  # an answer is never later than this, and the time it takes to compute
COMPUTE_S = 2.0  # an answer from nothing, on a busy machine
LEASES_S = 10.0  # two
POSITIONS = (0, 50, 99, 100)

_numbers = itertools.count(1)


def prompt_of(number: int, tokens: int = PROMPT_TOKENS) -> list[int]:
    return random.Random(number).choices(VOCABULARY, k=tokens)


def right_answer(token_ids: list[int], max_tokens: int) -> list[int]:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return expected_tokens(token_ids, sampling, planes=LAYERS * HEADS, vocabulary=VOCABULARY)


class Died(Exception):
    """The process ended, and this task with it."""


class Engine:
    """One engine process, as its test sees it."""

    def __init__(
        self,
        role: Role,
        scheme: str,
        *,
        bind: str = "127.0.0.1",
        wrap: Sequence[str] = (),
        changes: Mapping[str, object] | None = None,
    ) -> None:
        self.role = role
        self._wrap = wrap
        config = WorkerConfig(
            role=role,
            engine="sim",
            model="sim",
            transports=scheme,
            bind=bind,
            slots=8,
            block_tokens=BLOCK_TOKENS,
            kv_blocks=KV_BLOCKS,
            chunk_tokens=CHUNK_TOKENS,
            sim_layers=LAYERS,
            sim_heads=HEADS,
            sim_vocab=len(VOCABULARY),
            sim_itl_ms=5.0,
            sim_prefill_ms_per_token=2.0 if role == "prefill" else 0.0,
        )
        self._config = msgspec.structs.replace(config, **(changes or {}))
        self.epoch = 0
        self.is_paused = False

    async def start(self, environment: dict[str, str] | None = None) -> None:
        self.epoch += 1
        self._environment = environment or {}
        mine, theirs = socket.socketpair()
        arguments = [str(theirs.fileno()), msgspec.json.encode(self._config).decode(), str(self.epoch)]
        self._process = await asyncio.create_subprocess_exec(
            *self._wrap,
            sys.executable,
            str(CHILD),
            *arguments,
            pass_fds=[theirs.fileno()],
            env=os.environ | self._environment,
            stderr=asyncio.subprocess.DEVNULL if not os.environ.get("FAULTS_LOG") else None,
        )
        theirs.close()
        reader, self._writer = await asyncio.open_unix_connection(sock=mine, limit=1 << 24)
        self._ended: dict[int, asyncio.Future[Ended]] = {}
        self._progress: dict[bytes, Progress] = {}
        self._heard = asyncio.Event()
        self._states: asyncio.Queue[State] = asyncio.Queue()
        self._ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._listening = asyncio.create_task(self._listen(reader))
        async with asyncio.timeout(START_S):
            self.ready = await self._ready

    async def restart(self) -> None:
        """After a kill; a new incarnation."""
        await self._gone()
        await self.start(self._environment)

    async def aclose(self) -> None:
        if self._process.returncode is None:
            self.resume()
            self._writer.close()
            try:
                async with asyncio.timeout(10.0):
                    await self._process.wait()
            except TimeoutError:
                self.kill()
                raise
            finally:
                await self._gone()
        else:
            await self._gone()

    async def _gone(self) -> None:
        await self._process.wait()
        await self._listening
        self._writer.close()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                self._hear(msgspec.json.decode(line, type=Event))
        except ConnectionError:
            pass
        for waiting in [*self._ended.values(), self._ready]:
            if not waiting.done():
                waiting.set_exception(Died(self.role))

    def _hear(self, event: Event) -> None:
        match event:
            case Ready():
                self._ready.set_result(event)
            case Ended():
                if not (ended := self._ended[event.number]).done():  # A test that has failed waits no longer.
                    ended.set_result(event)
            case Progress():
                self._progress[event.token] = event
                self._heard.set()
            case State():
                self._states.put_nowait(event)

    # Faults.

    def kill(self) -> None:
        self._process.kill()

    def pause(self) -> None:
        self.is_paused = True
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        self.is_paused = False
        os.kill(self._process.pid, signal.SIGCONT)

    @property
    def pid(self) -> int:
        return self._process.pid

    # Work.

    def say(self, command: Command) -> None:
        self._writer.write(msgspec.json.encode(command) + b"\n")

    def begin(self, command: Decode | Prefill) -> asyncio.Future[Ended]:
        """The future ends with the task, or with Died."""
        future: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # Nobody may be left to ask.
        self._ended[command.number] = future
        self.say(command)
        return future

    async def came_to(self, token: bytes, position: int) -> None:
        """Wait until so many of a hand-off's bytes have come; 0: it was granted, 100: it is over."""
        least = {0: 0, 50: HANDOFF_BYTES // 2, 99: MOST_BYTES}.get(position, HANDOFF_BYTES)
        while True:
            progress = self._progress.get(token)
            if progress and (progress.is_over or (position < 100 and progress.kv_bytes >= least)):
                return
            self._heard.clear()
            await self._heard.wait()

    async def state(self) -> State:
        self.say(Look())
        return await self._states.get()


@dataclass
class Case:
    """One hand-off and the fault that it meets."""

    pair: Pair
    position: int
    number: int
    token: bytes
    prompt: list[int]
    answer: asyncio.Future[Ended]
    handed: asyncio.Future[Ended]


Fault = Callable[[Case], Awaitable[None]]


@dataclass
class Pair:
    """A prefill and a decode process, and what lies between."""

    prefill: Engine
    decode: Engine
    proxy: FaultProxy | None = None
    address: str = ""
    fds: dict[Role, int] = field(default_factory=dict)

    @property
    def engines(self) -> list[Engine]:
        return [self.prefill, self.decode]

    @property
    def addresses(self) -> tuple[str, ...]:
        return (self.address,) if self.address else self.decode.ready.addresses

    def resume(self) -> None:
        """Whoever is stopped goes on, also when a test has failed."""
        for engine in self.engines:
            if engine.is_paused:
                engine.resume()

    def begin(self, position: int) -> Case:
        """A decode worker expects a prompt's KV, a prefill worker computes it and sends it."""
        number = next(_numbers)
        token, prompt = number.to_bytes(16, "big"), prompt_of(number)
        answer = self.decode.begin(Decode(number, prompt, ANSWER_TOKENS, token))
        return Case(self, position, number, token, prompt, answer, self.hand_over(token, prompt))

    def hand_over(self, token: bytes, prompt: list[int], delivery: int = 1) -> asyncio.Future[Ended]:
        ready = self.decode.ready
        task = Prefill(next(_numbers), token, delivery, prompt, self.addresses, self.decode.epoch, ready.fingerprint)
        return self.prefill.begin(task)

    async def answer_others(self, prompts: Sequence[list[int]]) -> None:
        """More requests than there are blocks: each block that comes free is used again at once."""
        asked = [(prompt, self.decode.begin(Decode(next(_numbers), prompt, 8))) for prompt in prompts]
        for prompt, answer in asked:
            ended = await answer
            assert (ended.error, ended.token_ids) == ("", right_answer(prompt, 8)), "another request's answer is wrong"

    async def check_serves(self) -> None:
        """A hand-off without a fault lands, over whatever link there is now."""
        case = self.begin(0)
        async with asyncio.timeout(LEASES_S):
            ended, handed = await case.answer, await case.handed
        assert (ended.error, handed.error) == ("", "")
        assert ended.token_ids == right_answer(case.prompt, ANSWER_TOKENS)
        assert ended.computed_tokens == 1, "its KV did not come over the link"

    async def check_settled(self, links: int = 1) -> None:
        """Within two leases every block, slot and hand-off is back; links and files are what they were."""
        for engine in self.engines:
            state = await engine.state()
            try:
                async with asyncio.timeout(LEASES_S):
                    while _held(state, links):
                        await asyncio.sleep(0.05)
                        state = await engine.state()
            except TimeoutError:
                raise AssertionError(f"{engine.role} still holds {_held(state, links)}: {state}") from None
            self.fds.setdefault(engine.role, state.fds)
            most = self.fds[engine.role] + links - 1
            assert state.fds <= most, f"{engine.role} has opened files and not closed them: {state}"


def _held(state: State, links: int) -> dict[str, int]:
    held = {
        "running": state.running,
        "waiting": state.waiting,
        "blocks": KV_BLOCKS - state.kv_blocks_free,
        "receiving": state.receiving,
        "sending": state.sending,
        "links": max(0, state.links - links),
    }
    return {name: count for name, count in held.items() if count}


async def others_of(case: Case) -> None:
    """Requests that use every block that is free and every one that comes free; one has the prompt of the fault."""
    prompts = [prompt_of(case.number * 1000 + index, 160) for index in range(4)]
    await case.pair.answer_others([*prompts[:2], case.prompt, *prompts[2:]])


async def check_answer(case: Case, within_s: float) -> Ended:
    """It is exact, and comes within this time."""
    try:
        async with asyncio.timeout(within_s):
            ended = await asyncio.shield(case.answer)
    except TimeoutError:
        raise AssertionError(f"no answer within {within_s} s of a fault at {case.position} %") from None
    assert (ended.error, ended.token_ids) == ("", right_answer(case.prompt, ANSWER_TOKENS)), case.position
    return ended


def cancel(case: Case) -> None:
    case.pair.decode.say(Cancel(case.number))


async def over(case: Case) -> None:
    """Its blocks may be others' from now on."""
    async with asyncio.timeout(FAULT_S + COMPUTE_S):
        await case.pair.decode.came_to(case.token, 100)


async def check_handed(case: Case) -> None:
    """The prefill side ends too, and says how."""
    async with asyncio.timeout(LEASES_S):
        ended = await asyncio.shield(case.handed)
    assert not ended.error or ended.error.startswith("hand-off failed"), ended.error


async def check_broken(case: Case, heal: Callable[[], None], *, is_cancelled: bool = False) -> None:
    """Exact and soon, others too, on the same blocks, and both sides end; then everything is back and a hand-off lands."""
    try:
        if is_cancelled:
            cancel(case)
        async with asyncio.TaskGroup() as tasks:
            if not is_cancelled:
                tasks.create_task(check_answer(case, FAULT_S + COMPUTE_S))
            await over(case)
            await others_of(case)
    finally:
        heal()
    await others_of(case)
    await check_handed(case)
    await case.pair.check_settled()
    await case.pair.check_serves()
    await case.pair.check_settled()
