"""Seconds: what a request would wait at each worker, by each plan, and what the others there would wait for it.

Three linear models are fitted live from how requests ended: the time to the first token when the decode worker computes the
prompt, the same over a prefill worker, and the gap between tokens. The choice is the least of

    TTFT + TTFT x TTFT / the usual TTFT x `tail_weight` + output tokens x ITL x `itl_weight`
        + seconds of prefill x `work_weight` x (1 + 4 x requests that wait for blocks), twice for "local"

A long wait is worse than two short ones. What is computed twice keeps others waiting, so a prefix hit is worth more than its own
wait: more where others decode, most where memory is full. With a plan to choose, "local" also costs seconds of prefill x requests
running there x `stall_weight`. Last comes what keeps KV within the worker's memory and breaks no limit. Costs that differ by less
than one step and the predictions' own error are equal: then most hits win. Mooncake's Conductor and llm-d's latency scorer
choose by predicted TTFT alike.

What TTFT depends on: prompt tokens yet to be computed before the first token, as far as those placed earlier are not done by
now; pairs of attention; requests running and their KV (each step makes their tokens, too); with a prefill worker the
tokens whose KV must cross the link; and, where a prompt finds no room, those that wait in front of it, during which its own
hits may be evicted (`kept` learns how often).
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from ...bus.ids import RequestId, WorkerId
from .base import Choice, Outcome, Plan, PolicyError, PrefillView, RequestView, WorkerView
from .fit import LiveFit
from .spread import cheapest, unherded

PENDING_MAX = 65536
"""Requests whose features are kept until they end; past it the oldest are not learnt from."""
WAITING = 5
"""Place of the requests that wait for blocks, among the features of TTFT."""
LOCAL_WORK = 2.0
"""How many times `work_weight` counts where a prompt is computed among those who decode: they wait, too."""
CROWD_WORK = 4.0
"""How many times `work_weight` a prefill costs more for each request that waits for blocks, in the mean of the workers: all of
them, and those that come before the crowd is gone, wait for it."""
TAIL_MAX = 4.0
"""A wait of more than so many usual ones is not counted more often."""
DOUBT_MAX = 0.25
DOUBT_EVERY = 16
"""Observations from one look at how well the models fit to the next."""
NO_ROOM_S = 5.0
"""For a worker whose KV blocks are promised twice over; it waits until others end."""


class _Way(NamedTuple):
    worker: WorkerView
    plan: Plan
    prefill: PrefillView | None
    computed: float  # prompt tokens
    before: float  # prompt tokens that are computed before them, as far as they are left
    is_blocked: bool  # it would wait for blocks, behind others
    ttft_features: tuple[float, ...]
    itl_features: tuple[float, ...]


class _Backlog(NamedTuple):
    """What a worker had to compute when it was given something last, as this policy reckons."""

    tokens: float
    placed_tokens: int  # as the router counts: all of a prompt until its first token
    at_s: float


class CostPolicy:
    """The least predicted cost; see the module's text."""

    def __init__(
        self,
        work_weight: float = 2.0,
        stall_weight: float = 0.5,
        tail_weight: float = 0.5,
        itl_weight: float = 0.0,
        ttft_slo_s: float | None = None,
        itl_slo_s: float | None = None,
    ) -> None:
        """A way that is predicted to break a limit costs ten times what it breaks it by."""
        if min(work_weight, stall_weight, tail_weight, itl_weight, ttft_slo_s or 0.0, itl_slo_s or 0.0) < 0:
            raise PolicyError("weights and limits must not be negative")
        self._work_weight = work_weight
        self._stall_weight = stall_weight
        self._tail_weight = tail_weight
        self._itl_weight = itl_weight
        self._ttft_slo_s = ttft_slo_s
        self._itl_slo_s = itl_slo_s
        # Seconds for a request, for 1,000 tokens before its first one, for a million pairs of attention, for 10 running, for
        # 100,000 tokens of their KV, for each that waits for blocks in front of it.
        self.local = LiveFit((0.02, 0.03, 0.0005, 0.005, 0.005, 1.0), least=0.05)
        # The same, and for 1,000 tokens whose KV crosses the link.
        self.remote = LiveFit((0.03, 0.03, 0.0005, 0.002, 0.002, 1.0, 0.005), least=0.05)
        self.itl = LiveFit((0.008, 0.002, 0.002), least=0.002)  # For a step, for 10 running, for 100,000 tokens of KV.
        self._output_tokens = 128.0
        self._usual_ttft_s = 0.1
        self._seen = 0
        self._doubt = {"local": 0.0, "remote": 0.0}  # how far their predictions of TTFT are off, as a share
        self._kept = [1.0, 1.0]  # share of a predicted hit that is still there; the second: of those that are blocked
        self._backlog: dict[WorkerId, _Backlog] = {}
        self._pending: OrderedDict[RequestId, _Way] = OrderedDict()

    def pick(self, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random) -> Choice:
        ways = [way for worker in unherded(workers) for way in self._ways(request, worker, now)]
        crowd = sum(way.ttft_features[WAITING] for way in ways) / len(ways)  # that waits for blocks at a worker
        terms = [self._terms(request, way, crowd) for way in ways]
        costs = [sum(term.values()) for term in terms]
        place = self._best(ways, costs, [term["ttft_s"] for term in terms], rng)
        way, cost = ways[place], costs[place]
        worker = way.worker
        if way.plan == "local":
            placed_tokens = worker.local_prefill_tokens + round(way.computed)
            self._backlog[worker.worker_id] = _Backlog(way.before + way.computed, placed_tokens, now)
        self._pending[request.request_id] = way
        self._pending.move_to_end(request.request_id)
        if len(self._pending) > PENDING_MAX:
            self._pending.popitem(last=False)
        ttft_s = terms[place]["ttft_s"]
        lane = way.prefill.worker_id if way.prefill is not None and way.prefill.hit_blocks else None
        best: dict[WorkerView, int] = {}
        for number, other in enumerate(ways):
            if other.worker not in best or costs[number] < costs[best[other.worker]]:
                best[other.worker] = number
        return Choice(
            worker.worker_id,
            way.plan,
            why=f"{way.plan}: first token in {ttft_s:.3f} s, cost {cost:.3f} s",
            lane=lane,
            costs={other.worker_id: terms[number] for other, number in best.items()},
            ttft_s=ttft_s,
            itl_s=self.itl.predict(way.itl_features),
        )

    def _best(self, ways: Sequence[_Way], costs: Sequence[float], ttfts_s: Sequence[float], rng: random.Random) -> int:
        """Place of the least cost. What differs by less than a step and the predictions' error is equal: there a hit decides."""
        least = min(range(len(costs)), key=costs.__getitem__)
        plan = ways[least].plan
        step_s = (self.local if plan == "local" else self.remote).weights[
            0
        ]  # Nobody knows how far the step under way is.
        most = costs[least] + step_s + self._doubt[plan] * ttfts_s[least]
        near = [place for place, cost in enumerate(costs) if cost <= most and ways[place].plan == plan]
        computed = min(ways[place].computed for place in near)
        near = [place for place in near if ways[place].computed == computed]
        worker = cheapest([costs[place] for place in near], [ways[place].worker for place in near], rng)
        return next(place for place in near if ways[place].worker is worker)

    def observe(self, outcome: Outcome, now: float) -> None:
        """Learn from how it ended, if it went where this policy would have had it."""
        way = self._pending.pop(outcome.request_id, None)
        if outcome.output_tokens:
            self._output_tokens += 0.01 * (outcome.output_tokens - self._output_tokens)
        if way is None or way.worker.worker_id != outcome.worker_id or way.plan != outcome.plan:
            return
        if outcome.cached_tokens is not None and outcome.hit_blocks:
            kept = min(1.0, outcome.cached_tokens / (outcome.hit_blocks * way.worker.block_tokens))
            self._kept[way.is_blocked] += 0.05 * (kept - self._kept[way.is_blocked])
        if outcome.ttft_s is not None:
            model = self.local if way.plan == "local" else self.remote
            model.observe(way.ttft_features, outcome.ttft_s)
            self._usual_ttft_s += 0.02 * (outcome.ttft_s - self._usual_ttft_s)
            self._seen += 1
            if self._seen % DOUBT_EVERY == 0:
                self._doubt[way.plan] = min(model.median_error or 0.0, DOUBT_MAX)
        if outcome.itl_s is not None:
            self.itl.observe(way.itl_features, outcome.itl_s)

    def _terms(self, request: RequestView, way: _Way, crowd: float) -> dict[str, float]:
        worker = way.worker
        model = self.local if way.plan == "local" else self.remote
        ttft_s = model.predict(way.ttft_features)
        itl_s = self.itl.predict(way.itl_features) if self._itl_weight or self._itl_slo_s else 0.0  # Nobody asks.
        terms = {
            "ttft_s": ttft_s,
            "itl_s": self._itl_weight * itl_s * min(request.max_tokens, self._output_tokens),
        }
        prefill_s = way.computed / 1000 * model.weights[1] + way.ttft_features[2] * model.weights[2]
        terms["tail_s"] = self._tail_weight * ttft_s * min(ttft_s / max(self._usual_ttft_s, 1e-6), TAIL_MAX)
        weight = self._work_weight * (LOCAL_WORK if way.plan == "local" else 1.0)
        terms["work_s"] = weight * (1 + CROWD_WORK * crowd) * prefill_s
        if way.plan == "local" and request.prefill_workers:
            terms["stall_s"] = self._stall_weight * prefill_s * worker.load
        needed = (request.prompt_tokens + self._output_tokens) / worker.block_tokens + worker.in_flight_blocks
        if needed > worker.kv_blocks:
            terms["no_room_s"] = NO_ROOM_S * (needed / max(worker.kv_blocks, 1) - 1)
        over_s = max(0.0, ttft_s - self._ttft_slo_s) if self._ttft_slo_s else 0.0
        over_s += max(0.0, itl_s - self._itl_slo_s) * self._output_tokens if self._itl_slo_s else 0.0
        if over_s:
            terms["slo_s"] = 10 * over_s
        return terms

    def _ways(self, request: RequestView, worker: WorkerView, now: float) -> list[_Way]:
        """Local and remote, as far as there are both."""
        is_blocked = worker.waiting > 0 and request.prompt_tokens > worker.kv_blocks_free * worker.block_tokens
        hit_tokens = worker.hit_blocks * worker.block_tokens * self._kept[is_blocked]
        uncached = max(1.0, request.prompt_tokens - hit_tokens)
        kv_tokens = min(worker.in_flight_blocks, worker.kv_blocks) * worker.block_tokens / 1e5
        itl = (1.0, (worker.load + 1) / 10, kv_tokens + request.prompt_tokens / 1e5)
        running = (worker.load / 10, kv_tokens, worker.waiting * float(is_blocked))
        ways = []
        prefills = [prefill for prefill in request.prefill if prefill.fingerprint == worker.fingerprint]
        if worker.can_prefill_locally or not prefills:
            before = float(worker.local_prefill_tokens)
            if not is_blocked:
                before = self._left(worker, now)
            ttft = (1.0, (before + uncached) / 1000, _pairs(request.prompt_tokens, uncached), *running)
            ways.append(_Way(worker, "local", None, uncached, before, is_blocked, ttft, itl))
        if prefills and (uncached > request.local_prefill_tokens_max or not ways):
            shared = request.queued_prefill_tokens / len(prefills)
            queues = [prefill.queued_tokens + shared + _uncached(request, prefill) for prefill in prefills]
            place = min(range(len(prefills)), key=queues.__getitem__)
            computed = _uncached(request, prefills[place])
            pairs, before = _pairs(request.prompt_tokens, computed), queues[place] - computed
            over_link = (1.0, queues[place] / 1000, pairs, *running, uncached / 1000)
            ways.append(_Way(worker, "remote", prefills[place], computed, before, is_blocked, over_link, itl))
        return ways

    def _left(self, worker: WorkerView, now: float) -> float:
        """Prompt tokens that it has yet to compute: the router counts all of a prompt until its first token."""
        placed_tokens = worker.local_prefill_tokens
        last = self._backlog.get(worker.worker_id)
        if last is None:
            return float(placed_tokens)
        done = (now - last.at_s) * 1000 / max(self.local.weights[1], 1e-6)
        others = max(0, placed_tokens - last.placed_tokens)
        return min(float(placed_tokens), max(0.0, last.tokens - done) + others)


def _uncached(request: RequestView, prefill: PrefillView) -> int:
    return max(1, request.prompt_tokens - prefill.hit_blocks * prefill.block_tokens)


def _pairs(prompt_tokens: int, uncached_tokens: float) -> float:
    """Millions of (token, token it attends to) that computing the last `uncached_tokens` of a prompt takes."""
    return uncached_tokens * (prompt_tokens - uncached_tokens / 2) / 1e6
