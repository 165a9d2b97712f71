"""The router's metrics, under vLLM's names and in seconds where vLLM has one."""

from __future__ import annotations

import contextlib
from collections import deque
from statistics import median

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ..bus.ids import WorkerId

_SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)

PREDICTIONS_KEPT = 200


class Predictions:
    """How far what policies predict is from what is seen then."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._gauge = Gauge(
            "hocket_prediction_error_ratio",
            "Median of |predicted - seen| / seen over the last 200 requests with a prediction, of their ttft or itl",
            ["of"],
            registry=registry,
        )
        self._errors: dict[str, deque[float]] = {}

    def add(self, of: str, predicted_s: float | None, seen_s: float | None) -> None:
        """What was predicted when it was placed (`of` is `ttft` or `itl`), and what became of it; None: not known."""
        if predicted_s is None or not seen_s:
            return
        if of not in self._errors:
            errors = self._errors[of] = deque(maxlen=PREDICTIONS_KEPT)
            self._gauge.labels(of).set_function(lambda: median(errors))  # Counted when it is asked for.
        self._errors[of].append(abs(predicted_s - seen_s) / seen_s)


class RouterMetrics:
    """Everything /metrics shows of one router."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        self.registry = registry
        self.requests = Counter(
            "hocket_requests", "Generations that ended, by outcome and plan", ["outcome", "plan"], registry=registry
        )
        self.prompt_tokens = Counter("hocket_prompt_tokens", "Prompt tokens of admitted generations", registry=registry)
        self.hit_tokens = Counter(
            "hocket_prefix_hit_tokens",
            "Prompt tokens the index expected in the chosen worker's cache",
            registry=registry,
        )
        self.generation_tokens = Counter("hocket_generation_tokens", "Tokens of answers", registry=registry)
        self.ttft = Histogram(
            "hocket_time_to_first_token_seconds", "From the request's start to its first token", ["plan"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.e2e = Histogram(
            "hocket_e2e_request_latency_seconds",
            "From the request's start to its end",
            buckets=_SECONDS,
            registry=registry,
        )
        self.running = Gauge("hocket_num_requests_running", "Generations in flight", registry=registry)
        self.workers = Gauge("hocket_workers", "Live workers", ["role"], registry=registry)
        self.worker_losses = Counter(
            "hocket_worker_losses", "Workers that died or fell silent", ["role"], registry=registry
        )
        self.retries = Counter(
            "hocket_attempts_again", "Attempts after the first one of a generation", registry=registry
        )
        self.refusals = Counter(
            "hocket_refusals", "Answers of workers that did not admit", ["reason"], registry=registry
        )
        self.replays = Counter(
            "hocket_token_replays", "Gaps in token streams that were asked for again", registry=registry
        )
        self.policy_failures = Counter(
            "hocket_policy_failures", "Picks where the policy failed and the fallback chose", registry=registry
        )
        self.policy_version = Gauge(
            "hocket_policy_version", "Version of the policy document that decides; 0: what the router was started with",
            registry=registry,
        )  # fmt: skip
        self.policies_replaced = Gauge(
            "hocket_policies_replaced", "Policies of this version that failed too often", ["place"], registry=registry
        )
        self.policy_refused = Gauge(
            "hocket_policy_refused", "1 while the stored policy document cannot be used here", registry=registry
        )
        self.admission_refusals = Counter(
            "hocket_admission_refusals", "Requests refused by limits, before any work", ["reason"], registry=registry
        )
        self.queue_fallbacks = Counter(
            "hocket_prefill_queue_fallbacks", "Prefill jobs that went past the work queue", ["to"], registry=registry
        )
        self.index_drift = Gauge(
            "hocket_index_drift",
            "Share of prompt tokens whose prefix hit was predicted wrongly, smoothed",
            ["worker"],
            registry=registry,
        )
        self.index_mode = Gauge(
            "hocket_index_mode",
            "1 for how far a worker's prefix index is trusted",
            ["worker", "mode"],
            registry=registry,
        )
        self.predictions = Predictions(registry)
        self._modes: dict[WorkerId, str] = {}

    def show_mode(self, worker: WorkerId, mode: str) -> None:
        """The worker's index is `exact`, `catching_up` or `approximate` now."""
        before = self._modes.get(worker)
        if before == mode:
            return
        if before is not None:
            self.index_mode.remove(worker, before)
        self.index_mode.labels(worker, mode).set(1)
        self._modes[worker] = mode

    def forget_worker(self, worker: WorkerId) -> None:
        """Show nothing of a worker that has gone."""
        if before := self._modes.pop(worker, None):
            self.index_mode.remove(worker, before)
            with contextlib.suppress(KeyError):  # Nothing was observed.
                self.index_drift.remove(worker)
