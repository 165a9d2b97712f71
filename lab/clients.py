"""What clients ask on virtual time, and how they see their answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Protocol

from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from ..bus.ids import RequestId
from ..bus.messages import SamplingParams, pack_tokens
from ..router.api.stream import Stream, TokenPath
from ..router.generation import Failure, Generation, RouterError
from ..router.router import Router
from ..router.text.detokenize import TableDetokenizer, TokenTable
from ..workers.engines.sim.kv import expected_tokens

VOCABULARY = range(1000)
POISON = len(VOCABULARY)
"""A token that kills every engine that takes a prompt with it; nobody makes it."""
LAYERS = 2
MODEL = "sim"


@dataclass
class Request:
    """What a client asks, and what it got."""

    number: int
    prompt: list[int]
    sampling: SamplingParams
    arrival_s: float
    leaves_s: float | None = None  # after its arrival
    timeout_s: float | None = None  # None: the router's own
    tokens: list[int] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)  # exactly one, at last
    ended_s: float = 0.0

    @property
    def is_poison(self) -> bool:
        return POISON in self.prompt

    @cached_property
    def right_answer(self) -> list[int]:
        """From the prompt alone."""
        return expected_tokens(self.prompt, self.sampling, planes=LAYERS, vocabulary=VOCABULARY)


@cache
def token_table() -> TokenTable:
    """A vocabulary whose text can be read back: token 17 is "17,"."""
    return TokenTable(Tokenizer(WordLevel({f"{token},": token for token in VOCABULARY}, unk_token="0,")))


class Watcher(Protocol):
    """Who is told."""

    def ended(self, request: Request, how: str) -> None:
        """A client has its end."""

    def violate(self, what: str) -> None:
        """An invariant does not hold."""


class Recorder:
    """A client's end of the stream; implements `TextWriter`."""

    def __init__(self, house: Watcher, request: Request) -> None:
        self._house = house
        self._request = request
        self.ended = asyncio.Event()

    def write(self, parts: list[bytes], logprobs: Sequence[object]) -> None:
        """Tokens have come."""
        request = self._request
        first = len(request.tokens)
        request.tokens += [int(text) for text in b"".join(parts).split(b",")[:-1]]
        if request.ends:
            self._house.violate(f"request {request.number} got tokens after its end")
        if request.tokens[first:] != request.right_answer[first : len(request.tokens)]:
            self._house.violate(f"request {request.number} got wrong tokens from {first} on: {request.tokens}")

    def end(self, parts: list[bytes], logprobs: Sequence[object], finish_reason: str, output_tokens: int) -> None:
        """The answer is whole."""
        self.write(parts, logprobs)
        if len(self._request.tokens) != len(self._request.right_answer):
            self._house.violate(f"request {self._request.number} ended after {output_tokens} tokens")
        self.finish("answered")

    def fail(self, failure: Failure) -> None:
        """It ends with an error."""
        self.finish(failure.code)

    def finish(self, how: str) -> None:
        """The one end."""
        self._house.ended(self._request, how)
        self.ended.set()


async def ask(
    router: Router, path: TokenPath, request: Request, watcher: Watcher, *, request_id: RequestId, deadline_s: float
) -> None:
    """What `router.api` does with a request, without HTTP; returns when the client has its end."""
    recorder = Recorder(watcher, request)
    stream_id = path.open(Stream(TableDetokenizer(token_table()), recorder))

    def release(how: str) -> None:
        if path.close(stream_id):
            router.cancel(stream_id)
            recorder.finish(how)

    if request.leaves_s is not None:
        asyncio.get_running_loop().call_later(request.leaves_s, release, "left")
    tokens = pack_tokens(request.prompt)
    generation = Generation(request_id, MODEL, tokens, len(request.prompt), request.sampling, deadline_s)
    try:
        await router.start(generation, stream_id)
    except RouterError as error:
        release(error.code)
    await recorder.ended.wait()
