"""What a run amounts to: percentiles, goodput, hits, use, bytes and messages, as one flat record."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import msgspec
import numpy as np
import numpy.typing as npt

from .engine_model import GAP_BUCKETS_PER_E
from .replay import Replayed, Request
from .scenario import Scenario, Slo
from .traces import Trace

PERCENTILES = (50, 90, 99)
CURVE_POINTS = 200

Curve = tuple[list[float], list[float]]
"""x and y; of a distribution: a value, and the share that is not above it."""


class Spread(msgspec.Struct, frozen=True):
    """A distribution, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One run in figures. Rates are over the time from the first arrival to the last end."""

    label: str
    trace: str
    scenario: Scenario
    requests: int
    failed: int  # too long for a worker, or refused until their time was over
    refusals: int  # answers "busy"; the client came back
    ttft_s: Spread
    itl_s: Spread  # gaps between tokens, every token counted
    tpot_s: Spread  # mean gap of each request
    e2e_s: Spread
    goodput: float  # share of all requests that kept the SLO
    good_per_s: float
    requests_per_s: float
    output_tokens_per_s: float
    output_tokens_per_s_gpu: float
    hit_rate: float  # prompt tokens that nobody had to compute
    ideal_hit_rate: float  # with one endless cache
    busy: float  # share of the time in which an engine computes, mean over the workers
    busy_prefill: float
    busy_decode: float
    busy_max: float
    kv_used: float  # share of the KV blocks held, mean over time and workers
    preemptions: int
    remote: float  # share of requests whose prompt a prefill worker computed
    transfer_gb: float
    messages_per_request: float
    messages: dict[str, int]
    index_blocks_max: int
    policy_failures: int
    ttft_error: float | None  # median of |predicted - seen| / seen; None: the policy does not predict
    itl_error: float | None
    duration_s: float
    events: int
    gpus: int
    busy_workers: list[float]  # each one's share of the time in which it computes, prefill workers last
    ttft_curve: Curve
    tpot_curve: Curve
    in_flight_curve: Curve  # seconds; requests that have arrived and not ended
    wall_s: float = 0.0
    rss_mib: int = 0


def summarize(replayed: Replayed, trace: Trace, ideal_hit_tokens: int) -> Summary:
    """Everything that is reported of a run."""
    scenario = replayed.scenario
    done = [request for request in replayed.requests if request.outcome == "ok"]
    prompt_tokens = sum(request.turn.prompt_tokens for request in done)
    output_tokens = sum(request.turn.output_tokens for request in done)
    good = sum(is_good(request, scenario.slo) for request in done)
    duration_s = max(replayed.duration_s, 1e-9)
    gpus = gpus_of(scenario)
    waits = [ttft_s(request) for request in done]
    gaps = [gap for request in done if (gap := tpot_s(request)) is not None]
    messages = replayed.messages
    return Summary(
        label=scenario.label,
        trace=trace.name,
        scenario=scenario,
        requests=len(replayed.requests),
        failed=len(replayed.requests) - len(done),
        refusals=sum(request.refusals for request in replayed.requests),
        ttft_s=spread_of(waits),
        itl_s=_spread_of_gaps(replayed),
        tpot_s=spread_of(gaps),
        e2e_s=spread_of([e2e_s(request) for request in done]),
        goodput=good / max(len(replayed.requests), 1),
        good_per_s=good / duration_s,
        requests_per_s=len(done) / duration_s,
        output_tokens_per_s=output_tokens / duration_s,
        output_tokens_per_s_gpu=output_tokens / duration_s / gpus,
        hit_rate=sum(cached_tokens(request) for request in done) / max(prompt_tokens, 1),
        ideal_hit_rate=ideal_hit_tokens / max(sum(turn.prompt_tokens for turn in trace.turns), 1),
        busy=_busy(replayed, None),
        busy_prefill=_busy(replayed, "prefill"),
        busy_decode=_busy(replayed, "decode"),
        busy_max=max(worker.engine.busy_s for worker in replayed.workers) / duration_s,
        kv_used=sum(worker.usage_s for worker in replayed.workers) / duration_s / len(replayed.workers),
        preemptions=sum(worker.engine.preemptions for worker in replayed.workers),
        remote=sum(request.prefiller is not None for request in done) / max(len(done), 1),
        transfer_gb=sum(worker.link_bytes for worker in replayed.workers if worker.is_prefill) / 1e9,
        messages_per_request=sum(messages.values()) / max(len(replayed.requests), 1),
        messages=dict(sorted(messages.items())),
        index_blocks_max=replayed.index_blocks_max,
        policy_failures=replayed.policy_failures,
        ttft_error=median(replayed.ttft_errors) if replayed.ttft_errors else None,
        itl_error=median(replayed.itl_errors) if replayed.itl_errors else None,
        duration_s=replayed.duration_s,
        events=replayed.events,
        gpus=gpus,
        busy_workers=[worker.engine.busy_s / duration_s for worker in replayed.workers],
        ttft_curve=_distribution(waits),
        tpot_curve=_distribution(gaps),
        in_flight_curve=_in_flight(replayed.requests),
    )


def ttft_s(request: Request) -> float:
    """From the request's arrival at the router to the first token's."""
    assert request.first_s is not None
    return request.first_s - request.arrived_s


def e2e_s(request: Request) -> float:
    """From the request's arrival to its last token's."""
    assert request.end_s is not None
    return request.end_s - request.arrived_s


def tpot_s(request: Request) -> float | None:
    """Mean gap between its tokens; None when there was one token."""
    assert request.first_s is not None
    assert request.end_s is not None
    gaps = request.turn.output_tokens - 1
    return (request.end_s - request.first_s) / gaps if gaps else None


def is_good(request: Request, slo: Slo) -> bool:
    """It ended well and kept both limits."""
    return request.outcome == "ok" and ttft_s(request) <= slo.ttft_s and (tpot_s(request) or 0.0) <= slo.itl_s


def cached_tokens(request: Request) -> int:
    """Prompt tokens that were in the prefix cache of whoever computed the prompt."""
    work = request.prefill_work or request.work
    return work.cached_tokens if work else 0


def gpus_of(scenario: Scenario) -> int:
    """GPUs of the whole pool."""
    per_prefill, per_decode = scenario.gpus()
    return scenario.prefill * per_prefill + scenario.decode * per_decode


def spread_of(values: Sequence[float]) -> Spread:
    """All nan when there is nothing."""
    if not len(values):
        return Spread(*[float("nan")] * 4)
    array = np.asarray(values)
    return Spread(float(array.mean()), *(float(v) for v in np.percentile(array, PERCENTILES)))


def gap_histogram(replayed: Replayed) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Gaps between tokens, ascending seconds, and how many tokens came after each."""
    counts: dict[int, int] = {}
    for worker in replayed.workers:
        for bucket, tokens in worker.engine.gaps.items():
            counts[bucket] = counts.get(bucket, 0) + tokens
    buckets = sorted(counts)
    return np.exp(np.array(buckets) / GAP_BUCKETS_PER_E), np.array([counts[b] for b in buckets], np.int64)


def _spread_of_gaps(replayed: Replayed) -> Spread:
    gaps, counts = gap_histogram(replayed)
    if not len(gaps):
        return spread_of(())
    total = np.cumsum(counts)
    at = [float(gaps[np.searchsorted(total, total[-1] * p / 100)]) for p in PERCENTILES]
    return Spread(float((gaps * counts).sum() / total[-1]), *at)


def _busy(replayed: Replayed, role: str | None) -> float:
    busy_s = [worker.engine.busy_s for worker in replayed.workers if role in (None, worker.card.role)]
    return sum(busy_s) / len(busy_s) / max(replayed.duration_s, 1e-9) if busy_s else 0.0


def _distribution(values: Sequence[float]) -> Curve:
    if not values:
        return [], []
    shares = np.linspace(0, 1, min(CURVE_POINTS, len(values)))
    return np.quantile(values, shares).tolist(), shares.tolist()


def _in_flight(requests: Sequence[Request]) -> Curve:
    begins = np.sort([request.arrived_s for request in requests])
    ends = np.sort([request.end_s or 0.0 for request in requests])
    times = np.linspace(0, ends[-1] if len(ends) else 0.0, CURVE_POINTS)
    held = np.searchsorted(begins, times, side="right") - np.searchsorted(ends, times, side="right")
    return times.tolist(), held.astype(float).tolist()
