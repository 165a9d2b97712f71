"""What routers and the operator's commands tell each other; no worker hears it. Grown like `bus.messages`.

A command asks all routers of a pool at once (`subjects.routers`), each answers with one message to the reply subject.
"""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

from ..bus.ids import RequestId, RouterId, WorkerId
from ..bus.messages import LaneLoad

Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
PolicyName = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
SHADOWS_MAX = 4
HISTORY_MAX = 10


# ---- what is stored


class Canary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A policy that decides for some of the requests."""

    policy: PolicyName
    share: Share  # of the sessions, or of the requests that name none


class PolicyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which policies decide, and what they may cost."""

    primary: PolicyName  # with options: kv?temperature=0.5
    canary: Canary | None = None
    shadows: Annotated[tuple[PolicyName, ...], msgspec.Meta(max_length=SHADOWS_MAX)] = ()
    pick_budget_ms: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 5.0
    failures_max: Annotated[int, msgspec.Meta(ge=1)] = 5  # so many in a window, raised or over the budget: replaced
    window_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 60.0

    @property
    def seats(self) -> list[str]:
        """The policies of the primary, of the canary if there is one, and of the shadows."""
        return [self.primary, *([self.canary.policy] if self.canary else ()), *self.shadows]


class PolicyDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The stored document of a pool. Version 0 is what each router was started with, and is never stored."""

    version: Annotated[int, msgspec.Meta(ge=1)]
    config: PolicyConfig
    set_unix_s: float = 0.0
    history: Annotated[tuple[PolicyConfig, ...], msgspec.Meta(max_length=HISTORY_MAX)] = ()  # good ones, oldest first


# ---- figures that can be added up


class Distribution(msgspec.Struct, array_like=True):
    """Positive values in logarithmic buckets, so that those of several routers can be added up.

    A quantile is right to 2.5 %, as in DDSketch (Masson, Rim, Lee: https://arxiv.org/abs/1908.10693).
    """

    count: int = 0
    total: float = 0.0
    buckets: dict[int, int] = {}

    def add(self, value: float) -> None:
        """Count one value; the buckets end at 1e-9 and 1e9."""
        bucket = math.ceil(math.log(min(max(value, 1e-9), 1e9)) / _LOG_BASE)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1
        self.count += 1
        self.total += value

    def merge(self, other: Distribution) -> None:
        """Add another one to this."""
        self.count += other.count
        self.total += other.total
        for bucket, count in other.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + count

    @property
    def mean(self) -> float | None:
        """None while empty."""
        return self.total / self.count if self.count else None

    def quantile(self, share: float) -> float | None:
        """The value that `share` of the values do not exceed; None while empty."""
        left = share * self.count
        for bucket in sorted(self.buckets):
            left -= self.buckets[bucket]
            if left <= 0:
                return 2 * math.exp(bucket * _LOG_BASE) / (_BASE + 1)
        return None


_BASE = 1.05
_LOG_BASE = math.log(_BASE)


class ArmStatus(msgspec.Struct):
    """What one router saw of one policy that decides, since its version was switched on."""

    arm: str  # "primary" | "canary"
    policy: str
    replaced: str = ""  # why the fallback decides in its place; "": it does not
    picks: int = 0
    raised: int = 0  # it raised, or chose a worker that was not offered
    overruns: int = 0  # of the time budget
    last_error: str = ""
    requests: int = 0  # that ended
    errors: int = 0  # of those, with an error
    prompt_tokens: int = 0
    cached_tokens: int = 0  # reported by the engine, of those that it reported on
    cached_of_tokens: int = 0  # their prompt tokens
    pick_s: Distribution = msgspec.field(default_factory=Distribution)
    ttft_s: Distribution = msgspec.field(default_factory=Distribution)
    itl_s: Distribution = msgspec.field(default_factory=Distribution)
    prediction_error: Distribution = msgspec.field(default_factory=Distribution)  # of TTFT: |predicted - seen| / seen


class ShadowStatus(msgspec.Struct):
    """What one router saw of one policy that is only asked."""

    policy: str
    stopped: str = ""  # why it is not asked any more; "": it is
    seen: int = 0  # picks that it could have been asked about
    scored: int = 0  # of those, asked about
    same_worker: int = 0
    same_plan: int = 0  # and the same worker
    raised: int = 0
    overruns: int = 0
    last_error: str = ""
    ttft_pairs: int = 0  # picks for which both predicted a TTFT
    ttft_gain_s: float = 0.0  # their sum: how much earlier the shadow expects the first token
    cost_pairs: int = 0  # picks whose actual choice the shadow has a cost for
    cost_excess: float = 0.0  # their sum: that choice's cost over its own choice's, in its own units
    pick_s: Distribution = msgspec.field(default_factory=Distribution)
    prediction_error: Distribution = msgspec.field(default_factory=Distribution)  # where it chose what was done


# ---- receipts


class CandidateReceipt(msgspec.Struct, frozen=True, omit_defaults=True):
    """One worker that was offered to the policy, as it was known then."""

    worker: WorkerId
    hit_tokens: int
    load: int
    slots: int
    in_flight: int
    kv_blocks_free: int
    kv_blocks: int
    index: str  # "exact" | "catching_up" | "approximate"
    heartbeat_age_s: float
    costs: dict[str, float] = {}


class PrefillReceipt(msgspec.Struct, frozen=True, omit_defaults=True):
    """One prefill worker that could have computed the prompt, as it was known then."""

    worker: WorkerId
    hit_tokens: int
    running: int
    waiting: int
    slots: int
    costs: dict[str, float] = {}


class ShadowReceipt(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a shadow would have done."""

    policy: str
    worker: WorkerId
    plan: str
    why: str = ""
    predicted_ttft_s: float | None = None
    pick_us: float = 0.0


class AttemptReceipt(msgspec.Struct, frozen=True, omit_defaults=True):
    """One pick of one request."""

    after_s: float  # since the request's start
    worker: WorkerId | None = None  # None: nobody could be chosen
    plan: str = ""
    policy: str = ""
    arm: str = ""
    version: int = 0
    why: str = ""
    failure: str = ""  # of the policy, when the fallback chose in its place
    pick_us: float = 0.0
    predicted_ttft_s: float | None = None
    lane: WorkerId | None = None
    candidates: list[CandidateReceipt] = []
    prefill: list[PrefillReceipt] = []
    filtered: dict[WorkerId, str] = {}  # decode workers that were not offered, and why
    shadows: list[ShadowReceipt] = []


class OutcomeReceipt(msgspec.Struct, frozen=True, omit_defaults=True):
    """How it ended."""

    end: str  # "finished" | "error" | "failed" | "cancelled" | "refused"
    duration_s: float
    detail: str = ""
    output_tokens: int = 0
    ttft_s: float | None = None  # from the last attempt's pick
    itl_s: float | None = None
    predicted_hit_tokens: int | None = None
    cached_tokens: int | None = None  # that the decode engine reported
    prefill_worker: WorkerId | None = None


class Receipt(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a request went where it went. Never the prompt, nor anything that was said."""

    request_id: RequestId
    router_id: RouterId
    model: str
    prompt_tokens: int
    max_tokens: int
    started_unix_s: float
    attempts: list[AttemptReceipt]
    outcome: OutcomeReceipt | None = None  # None: it runs


# ---- load


class WorkerLoad(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one router knows of one worker; the counts are of the requests that it sent there, since the worker joined."""

    role: str  # "prefill" | "decode"
    index: str  # "exact" | "catching_up" | "approximate"
    heard_s: float  # since its last sign of life
    is_suspect: bool = False  # silent for so long that it gets no new work
    streams: int = 0  # in flight there
    drift: float | None = (
        None  # share of prompt tokens whose hit was predicted wrongly, smoothed; None: nothing reported yet
    )
    prompt_tokens: int = 0  # of the prompts that the engine has reported on
    cached_tokens: int = 0  # of those, in its prefix cache
    kv_bytes: int = 0  # that a prefill worker has sent


# ---- questions and answers


class AskPolicies(msgspec.Struct, frozen=True, tag="ask_policies"):
    """Command to routers, answered with PolicyStatus; with `reads` the stored document is read first."""

    reads: bool = False


class TryPolicies(msgspec.Struct, frozen=True, tag="try_policies"):
    """Command to routers, answered with PoliciesTried: could you run this?"""

    config: PolicyConfig


class AskReceipt(msgspec.Struct, frozen=True, tag="ask_receipt"):
    """Command to routers, answered with ReceiptAnswer."""

    request_id: RequestId


class AskLoad(msgspec.Struct, frozen=True, tag="ask_load"):
    """Command to routers, answered with RouterLoad."""


class PoliciesTried(msgspec.Struct, frozen=True, tag="policies_tried"):
    """Router to command."""

    router_id: RouterId
    problem: str = ""  # "": yes


class PolicyStatus(msgspec.Struct, frozen=True, tag="policy_status"):
    """Router to command."""

    router_id: RouterId
    version: int  # that decides here
    config: PolicyConfig
    arms: list[ArmStatus]
    shadows: list[ShadowStatus]
    since_s: float = 0.0  # how long that version has decided here
    problem: str = ""  # why a newer stored version is not used
    sources: dict[str, str] = {}  # by policy that is a file: a digest of what was loaded


class ReceiptAnswer(msgspec.Struct, frozen=True, tag="receipt"):
    """Router to command; None: not known here, or not any more."""

    router_id: RouterId
    receipt: Receipt | None = None
    held: int = 0  # receipts that this router holds
    oldest_s: float = 0.0  # age of the oldest of them


class RouterLoad(msgspec.Struct, frozen=True, tag="router_load"):
    """Router to command: what is in flight here, what waits for prefill, and what is known of the workers."""

    router_id: RouterId
    in_flight: int
    lanes: dict[WorkerId, LaneLoad]  # by prefill worker; "": the shared lane
    workers: dict[WorkerId, WorkerLoad]


Question = AskPolicies | TryPolicies | AskReceipt | AskLoad
Answer = PoliciesTried | PolicyStatus | ReceiptAnswer | RouterLoad

_encoder = msgspec.msgpack.Encoder()
_questions: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def encode(message: Question | Answer) -> bytes:
    """The message as msgpack."""
    return _encoder.encode(message)


def decode_question(payload: bytes) -> Question:
    """Raises msgspec.MsgspecError when it is none."""
    return _questions.decode(payload)


def decode_answer(payload: bytes) -> Answer:
    """Raises msgspec.MsgspecError when it is none."""
    return _answers.decode(payload)
