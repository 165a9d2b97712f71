"""A trace of the lab as real requests: prompts of token ids that share what the trace's hashes share, and a client that asks
at the trace's times whatever the answers take (open loop) and reads the streams.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hocket.bus.messages import SamplingParams
from hocket.lab.traces import Span, Trace
from hocket.workers.engines.sim.kv import expected_tokens

_EVENT = b"data: {"
_TIMEOUT_S = 120.0


def conversations(trace: Trace, one_in: int) -> Trace:
    """Every so many-th conversation of the trace, whole: a prompt that begins with an earlier one belongs to its conversation."""
    roots: list[int] = []
    for index, turn in enumerate(trace.closed().turns):
        roots.append(index if turn.after is None else roots[turn.after])
    kept = set(sorted(set(roots))[::one_in])
    return replace(
        trace, turns=tuple(turn for turn, root in zip(trace.turns, roots, strict=True) if root in kept)
    ).shifted()


def prompts_of(trace: Trace, salt: str, vocabulary: range, *, planes: int) -> list[list[int]]:
    """The token ids of each turn's prompt: two have equal tokens as far as their hashes are equal. Another salt, other tokens.

    An answer that a later prompt repeats is what a simulator with so many planes of KV says.
    """
    said = {span.ids[0] for turn in trace.turns for span in turn.spans}
    answers: dict[int, list[int]] = {}
    prompts = []
    for turn in trace.turns:
        ends = [*(span.start_token for span in turn.spans[1:]), turn.prompt_tokens]
        prompt: list[int] = []
        for span, end in zip(turn.spans, ends, strict=True):
            prompt += answers.get(span.ids[0]) or _tokens(span, end - span.start_token, salt, vocabulary)
        prompts.append(prompt)
        if turn.answer_id in said:
            sampling = SamplingParams(max_tokens=turn.output_tokens, temperature=0.0)
            answers[turn.answer_id] = expected_tokens(prompt, sampling, planes=planes, vocabulary=vocabulary)
    return prompts


def _tokens(span: Span, count: int, salt: str, vocabulary: range) -> list[int]:
    tokens: list[int] = []
    for block_id in span.ids:
        size = min(span.block_tokens, count - len(tokens))
        tokens += random.Random(f"{salt}/{block_id}").choices(vocabulary, k=size)
    return tokens


@dataclass(frozen=True, slots=True)
class Served:
    """What one client saw, in seconds."""

    ttft_s: float
    tpot_s: float | None  # mean gap between the tokens; None when there was one token
    late_s: float  # that the request was sent after its time


class _Exchange(asyncio.Protocol):
    """One request on a connection of its own, which the server closes after the answer."""

    def __init__(self, request: bytes, done: asyncio.Future[None]) -> None:
        self._request = request
        self._done = done
        self.body = bytearray()
        self.sent_s = self.first_s = self.last_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self.sent_s = time.monotonic()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.body += data
        if _EVENT in data:
            self.last_s = time.monotonic()
            self.first_s = self.first_s or self.last_s

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_result(None)


class Client:
    """Replays traces against one router's API. Raises RuntimeError for an answer that is not whole."""

    def __init__(self, port: int, model: str) -> None:
        self._port = port
        self._model = model

    async def replay(self, trace: Trace, prompts: Sequence[list[int]]) -> list[Served]:
        """Ask every turn at its time, or so long after the answer that it follows; what was seen, in the order of the turns."""
        begin_s = time.monotonic() + 0.2
        tasks: list[asyncio.Task[Served]] = []
        async with asyncio.TaskGroup() as group:
            for turn, prompt in zip(trace.turns, prompts, strict=True):
                body = self._request(prompt, turn.output_tokens, turn.session)
                before = None if turn.after is None else tasks[turn.after]
                at_s = begin_s + turn.arrival_s
                asked = self._ask(body, at_s, before, think_s=turn.think_s, tokens=turn.output_tokens)
                tasks.append(group.create_task(asked))
        return [task.result() for task in tasks]

    def _request(self, prompt: list[int], tokens: int, session: str) -> bytes:
        asked = {"model": self._model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body = json.dumps({**asked, "stream": True}).encode()
        lines = ["POST /v1/completions HTTP/1.1", "Host: h", "Connection: close", "Content-Type: application/json"]
        lines += [f"Content-Length: {len(body)}", *([f"x-hocket-session: {session}"] if session else ())]
        return "\r\n".join([*lines, "", ""]).encode() + body

    async def _ask(
        self, request: bytes, at_s: float, before: asyncio.Task[Served] | None, *, think_s: float, tokens: int
    ) -> Served:
        if before is not None:
            await asyncio.wait([before])
            at_s = max(at_s, time.monotonic() + think_s)
        await asyncio.sleep(max(0.0, at_s - time.monotonic()))
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        transport, exchange = await loop.create_connection(
            lambda: _Exchange(request, done), "127.0.0.1", self._port
        )  # fmt: skip
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await done
        finally:
            transport.abort()
        if not exchange.body.startswith(b"HTTP/1.1 200") or b"data: [DONE]" not in exchange.body:
            raise RuntimeError(f"an answer is not whole: {bytes(exchange.body[:200] + exchange.body[-200:])!r}")
        gap_s = (exchange.last_s - exchange.first_s) / (tokens - 1) if tokens > 1 else None
        return Served(exchange.first_s - exchange.sent_s, gap_s, exchange.sent_s - at_s)
