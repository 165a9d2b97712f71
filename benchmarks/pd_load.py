"""The load of `gpu_pd.py`: prompts of token ids through /v1/completions, streamed, on connections of their own.

Three kinds: closed keeps so many requests in flight, Poisson sends at a rate and a trace at its times, whatever the answers do
(open loop). Only what falls into the window counts: its tokens by their arrival, first tokens and gaps between tokens within it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field

from measure import Row, percentile

from hocket.lab.traces import Trace

TIMEOUT_S = 180.0
_HEAD = (
    "POST /v1/completions HTTP/1.1\r\nHost: h\r\nConnection: close\r\n"
    "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n"
)


class RequestError(Exception):
    """The server refused, or the stream broke."""


@dataclass(slots=True)
class Answer:
    """One request as its client sees it; times of the monotonic clock."""

    sent_s: float
    token_s: list[float] = field(default_factory=list)  # an entry for each token
    text: str = ""
    plan: str = ""

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Between tokens."""
        return [b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go; several ports take turns."""

    ports: tuple[int, ...]
    model: str
    prompt: Callable[[int, int], list[int]]  # (seed, tokens) -> ids
    prefill_ports: tuple[int, ...] = ()  # servers whose KV vLLM's own connector fetches, asked first

    async def ask(self, seed: int, isl: int, osl: int, answer: Answer) -> Answer:
        """Prompt `seed` of `isl` tokens, greedy, always `osl` tokens of answer. Raises what `ask` raises."""
        return await self.ask_ids(self.ports[seed % len(self.ports)], self.prompt(seed, isl), osl, answer)

    async def ask_ids(self, port: int, ids: list[int], osl: int, answer: Answer) -> Answer:
        """The same for a prompt of these ids, by the server on `port`."""
        fields = {"model": self.model, "prompt": ids, "temperature": 0, "ignore_eos": True}
        decode = fields | {"max_tokens": osl, "stream": True}
        if self.prefill_ports:
            answer.sent_s = time.monotonic()
            prefill = fields | {"max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
            decode["kv_transfer_params"] = await _prefill(self.prefill_ports[port % len(self.prefill_ports)], prefill)
        return await ask(port, json.dumps(decode).encode(), answer)


async def ask(port: int, body: bytes, answer: Answer) -> Answer:
    """Fill `answer` while it streams. Raises RequestError, TimeoutError, OSError."""
    async with _posted(port, body) as reader:
        answer.sent_s = answer.sent_s or time.monotonic()
        await _read_head(reader, answer)
        async for event in _events(reader):
            _take(event, answer)
    return answer


async def _prefill(port: int, fields: Mapping[str, object]) -> object:
    """Where the KV of a prompt lies, as vLLM's server that computed it says."""
    async with _posted(port, json.dumps(fields).encode()) as reader:
        await _read_head(reader, Answer(0.0))
        return json.loads(await reader.read())["kv_transfer_params"]


@contextlib.asynccontextmanager
async def _posted(port: int, body: bytes) -> AsyncIterator[asyncio.StreamReader]:
    async with asyncio.timeout(TIMEOUT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        try:
            writer.write(_HEAD.format(len(body)).encode() + body)
            yield reader
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def _read_head(reader: asyncio.StreamReader, answer: Answer) -> None:
    status = await reader.readline()
    while (line := await reader.readline()) not in (b"\r\n", b""):
        name, _, value = line.decode().partition(":")
        if name.lower() == "x-hocket-plan":
            answer.plan = value.strip()
    if b" 200 " not in status:
        raise RequestError(f"{status!r} {await reader.read(500)!r}")


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while line := await reader.readline():
        if line.startswith(b"data: [DONE]"):
            return
        if line.startswith(b"data: "):
            yield line[6:]
    raise RequestError("the stream ended without [DONE]")


def _take(event: bytes, answer: Answer) -> None:
    """An event has one token, or some when the client is slow: as many as words where every id is a word."""
    now = time.monotonic()
    fields = json.loads(event)
    if "choices" not in fields:
        raise RequestError(f"the answer ended with {event[:300]!r}")
    text = fields["choices"][0]["text"] if fields["choices"] else ""
    if text:
        answer.text += text
        answer.token_s += [now] * max(1, text.count(" "))


@dataclass(slots=True)
class Window:
    """What one load showed."""

    window_s: float
    answers: list[Answer]  # every request that was sent, also before and beyond the window
    begin_s: float
    errors: list[str]

    def row(self, gpus: int) -> Row:
        """Tokens a second and GPU, TTFT and ITL in ms. ITL: gaps between two tokens, of all requests together."""
        end_s = self.begin_s + self.window_s
        tokens, ttft, gaps, means, ended = 0, [], [], [], 0
        for answer in self.answers:
            inside = [at for at in answer.token_s if self.begin_s <= at < end_s]
            tokens += len(inside)
            gaps += [b - a for a, b in zip(inside, inside[1:], strict=False)]
            if len(inside) > 1:
                means.append((inside[-1] - inside[0]) / (len(inside) - 1))
            if answer.token_s and self.begin_s <= answer.token_s[0] < end_s:
                ttft.append(answer.ttft_s)
                ended += 1
        return {
            "tokens_per_s_gpu": tokens / self.window_s / gpus,
            "requests_per_s": ended / self.window_s,
            "itl_mean_ms": _ms(statistics.fmean(gaps) if gaps else None),
            "itl_p50_ms": _ms(percentile(gaps, 0.5)),
            "itl_p99_ms": _ms(percentile(gaps, 0.99)),
            "tpot_p99_ms": _ms(percentile(means, 0.99)),
            "ttft_p50_ms": _ms(percentile(ttft, 0.5)),
            "ttft_p99_ms": _ms(percentile(ttft, 0.99)),
            "window_s": self.window_s,
            "errors": len(self.errors),
            "first_error": self.errors[0] if self.errors else None,
        }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


@dataclass(frozen=True, slots=True)
class Load:
    """One point: `concurrency` requests in flight, or `rate` a second when that is not 0, or the lengths and times of `trace`."""

    isl: int
    osl: int
    concurrency: int
    rate: float
    first_seed: int  # of its prompts: no two points share one
    warm_s: float
    window_s: float
    trace: Trace | None = None

    @property
    def lengths(self) -> str:
        """ISL/OSL, or the trace's name."""
        return self.trace.name if self.trace else f"{self.isl}/{self.osl}"

    @property
    def title(self) -> str:
        """How it arrives."""
        if self.trace:
            arrived = sum(turn.arrival_s < self.warm_s + self.window_s for turn in self.trace.turns)
            return f"{arrived / (self.warm_s + self.window_s):.2g}/s as recorded"
        return f"{self.rate:g}/s" if self.rate else f"{self.concurrency} at once"


class Generator:
    """Runs one load against one target."""

    def __init__(self, target: Target, load: Load) -> None:
        self._target = target
        self._load = load
        self._answers: list[Answer] = []
        self._errors: list[str] = []
        self._next = load.first_seed
        self._running: set[asyncio.Task[None]] = set()
        self._stopped = False

    async def run(self, on_window: Callable[[], None] = lambda: None) -> Window:
        """Warm up, call `on_window`, measure, cancel what still runs."""
        load = self._load
        async with asyncio.TaskGroup() as tasks:
            if load.trace:
                self._start(tasks, self._replay(tasks, load.trace))
            elif load.rate:
                self._start(tasks, self._arrivals(tasks))
            for place in range(load.concurrency):
                self._start(tasks, self._keep_one(place))
            await asyncio.sleep(load.warm_s)
            begin_s = time.monotonic()
            on_window()
            await asyncio.sleep(load.window_s)
            window_s = time.monotonic() - begin_s
            self._stopped = True
            for task in self._running:
                task.cancel()
        return Window(window_s, self._answers, begin_s, self._errors)

    def _start(self, tasks: asyncio.TaskGroup, work: Coroutine[object, object, None]) -> None:
        task = tasks.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _keep_one(self, place: int) -> None:
        # Not all at once, and first answers of all lengths, as if it had always run: answers would stay in step.
        load = self._load
        await asyncio.sleep(load.warm_s * 0.6 * place / load.concurrency)
        await self._one(load.isl, max(1, load.osl * (place + 1) // load.concurrency))
        while not self._stopped:
            await self._one(load.isl, load.osl)

    async def _arrivals(self, tasks: asyncio.TaskGroup) -> None:
        source, at = random.Random(self._load.first_seed), time.monotonic()
        while not self._stopped:
            self._start(tasks, self._one(self._load.isl, self._load.osl))
            at += source.expovariate(self._load.rate)  # By the clock: a slow turn of the loop delays none that follow.
            await asyncio.sleep(max(0.0, at - time.monotonic()))

    async def _replay(self, tasks: asyncio.TaskGroup, trace: Trace) -> None:
        begin_s = time.monotonic()
        for turn in trace.turns:
            await asyncio.sleep(max(0.0, begin_s + turn.arrival_s - time.monotonic()))
            self._start(tasks, self._one(turn.prompt_tokens, turn.output_tokens))

    async def _one(self, isl: int, osl: int) -> None:
        seed = self._next
        self._next += 1
        answer = Answer(0.0)
        self._answers.append(answer)
        try:
            await self._target.ask(seed, isl, osl, answer)
        except (RequestError, TimeoutError, OSError, ValueError) as error:
            if not self._stopped:
                self._errors.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.2)  # A server that refuses at once must not be asked without end.
