"""Seconds: what a request would wait at each worker, by each plan, and what the others there would wait for it.

Three linear models are fitted live from how requests ended: the time to the first token when the decode worker computes the
prompt, the same over a prefill worker, and the gap between tokens. The choice is the least of

    TTFT + TTFT x TTFT / the usual TTFT x `tail_weight` + output tokens x ITL x `itl_weight`
        + seconds of prefill x `work_weight`, twice for "local"
          x (1 + 4 x requests that wait for blocks) x (1 + 4 x the worker's share of KV in use)

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

import msgspec

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
MEMORY_WORK = 4.0
"""How many times it costs more where all KV memory is in use: what is computed there drops prefixes that others would find."""
TAIL_MAX = 4.0
"""A wait of more than so many usual ones is not counted more often."""
DOUBT_MAX = 0.25
DOUBT_EVERY = 16
"""Observations from one look at how well the models fit to the next."""
NO_ROOM_S = 5.0
"""For a worker whose KV blocks are promised twice over; it waits until others end."""


class _Way(msgspec.Struct, frozen=True, eq=False, gc=False):
    """Made for every worker and plan: nothing here that the choice does not need."""

    worker: WorkerView
    plan: Plan
    prefill: PrefillView | None
    prompt_tokens: int
    computed: float  # prompt tokens
    before: float  # prompt tokens that are computed before them, as far as they are left
    is_blocked: bool  # it would wait for blocks, behind others
    memory: float  # share of the worker's KV blocks that are promised
    ttft_s: float
    ttft_features: tuple[float, ...]

    @property
    def itl_features(self) -> tuple[float, ...]:
        _, _, _, running, kv_tokens, *_ = self.ttft_features
        return 1.0, running + 0.1, kv_tokens + self.prompt_tokens / 1e5


class _Lane(NamedTuple):
    """The prefill worker that would be done first."""

    prefill: PrefillView
    computed: int  # prompt tokens
    queued: float  # those, and all that are computed before them
    pairs: float


class _Prices(msgspec.Struct, frozen=True, eq=False, gc=False):
    """What is the same for all ways of a plan."""

    token_s: float  # of prefill; the same for a million pairs of attention
    pairs_s: float
    tail_per_s: float
    tail_max_s: float
    work: float
    stall: float
    needed_tokens: float


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
        self._is_asked = bool(itl_weight or ttft_slo_s or itl_slo_s)
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
        ways = self._ways(request, unherded(workers), now)
        crowd = sum([way.ttft_features[WAITING] for way in ways]) / len(ways)  # that waits for blocks at a worker
        local, remote = (self._prices(request, crowd, is_local=is_local) for is_local in (True, False))
        terms = [self._terms(way, local if way.plan == "local" else remote) for way in ways]
        if self._is_asked:
            for term, way in zip(terms, ways, strict=True):
                term |= self._asked_terms(request, way)
        costs = [sum(term.values()) for term in terms]
        place = self._best(ways, costs, rng)
        way, cost = ways[place], costs[place]
        worker = way.worker
        if way.plan == "local":
            placed_tokens = worker.local_prefill_tokens + round(way.computed)
            self._backlog[worker.worker_id] = _Backlog(way.before + way.computed, placed_tokens, now)
        self._pending[request.request_id] = way
        self._pending.move_to_end(request.request_id)
        if len(self._pending) > PENDING_MAX:
            self._pending.popitem(last=False)
        lane = way.prefill.worker_id if way.prefill is not None and way.prefill.hit_blocks else None
        by_cost = sorted(range(len(ways)), key=costs.__getitem__, reverse=True)
        return Choice(
            worker.worker_id,
            way.plan,
            why=f"{way.plan}: first token in {way.ttft_s:.3f} s, cost {cost:.3f} s",
            lane=lane,
            costs={
                ways[number].worker.worker_id: terms[number] for number in by_cost
            },  # The cheapest of a worker is last.
            ttft_s=way.ttft_s,
            itl_s=self.itl.predict(way.itl_features),
        )

    def _best(self, ways: Sequence[_Way], costs: Sequence[float], rng: random.Random) -> int:
        """Place of the least cost. What differs by less than a step and the predictions' error is equal: there a hit decides."""
        least = min(range(len(costs)), key=costs.__getitem__)
        plan = ways[least].plan
        # Nobody knows how far the step under way is.
        step_s = (self.local if plan == "local" else self.remote).weights[0]
        most = costs[least] + step_s + self._doubt[plan] * ways[least].ttft_s
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

    def _prices(self, request: RequestView, crowd: float, *, is_local: bool) -> _Prices:
        model, work = (self.local, self._work_weight * LOCAL_WORK) if is_local else (self.remote, self._work_weight)
        weights = model.weights
        return _Prices(
            token_s=weights[1] / 1000,
            pairs_s=weights[2],
            tail_per_s=self._tail_weight / max(self._usual_ttft_s, 1e-6),
            tail_max_s=TAIL_MAX * self._usual_ttft_s,
            work=work * (1 + CROWD_WORK * crowd),
            stall=self._stall_weight if is_local and request.prefill_workers else 0.0,
            needed_tokens=request.prompt_tokens + self._output_tokens,
        )

    def _terms(self, way: _Way, prices: _Prices) -> dict[str, float]:
        worker, ttft_s = way.worker, way.ttft_s
        prefill_s = way.computed * prices.token_s + way.ttft_features[2] * prices.pairs_s
        terms = {
            "ttft_s": ttft_s,
            "tail_s": prices.tail_per_s * ttft_s * min(ttft_s, prices.tail_max_s),
            "work_s": prices.work * prefill_s * (1 + MEMORY_WORK * way.memory),
        }
        if prices.stall:
            terms["stall_s"] = prices.stall * prefill_s * worker.load
        needed = prices.needed_tokens / worker.block_tokens + worker.in_flight_blocks
        if needed > worker.kv_blocks:
            terms["no_room_s"] = NO_ROOM_S * (needed / max(worker.kv_blocks, 1) - 1)
        return terms

    def _asked_terms(self, request: RequestView, way: _Way) -> dict[str, float]:
        """Those that are 0 unless somebody has set their weight or limit."""
        itl_s = self.itl.predict(way.itl_features)
        over_s = max(0.0, way.ttft_s - self._ttft_slo_s) if self._ttft_slo_s else 0.0
        over_s += max(0.0, itl_s - self._itl_slo_s) * self._output_tokens if self._itl_slo_s else 0.0
        return {"itl_s": self._itl_weight * itl_s * min(request.max_tokens, self._output_tokens), "slo_s": 10 * over_s}

    def _ways(self, request: RequestView, workers: Sequence[WorkerView], now: float) -> list[_Way]:
        """For each worker local and remote, as far as there are both."""
        lanes = {name: _lane(request, name) for name in {worker.fingerprint for worker in workers}}
        prompt_tokens, local_max = request.prompt_tokens, request.local_prefill_tokens_max
        # LiveFit.predict, written out: it is asked for every worker.
        a, b, c, d, e, f = self.local.weights
        a_far, b_far, c_far, d_far, e_far, f_far, g_far = self.remote.weights
        ways = []
        for worker in workers:
            lane, waiting, block_tokens = lanes[worker.fingerprint], worker.waiting, worker.block_tokens
            is_blocked = waiting > 0 and prompt_tokens > worker.kv_blocks_free * block_tokens
            hit_tokens = worker.hit_blocks * block_tokens * self._kept[is_blocked]
            uncached = prompt_tokens - hit_tokens if hit_tokens < prompt_tokens - 1 else 1.0
            kv_blocks = worker.kv_blocks if worker.kv_blocks < worker.in_flight_blocks else worker.in_flight_blocks
            kv, memory = kv_blocks * block_tokens / 1e5, kv_blocks / (worker.kv_blocks or 1)
            running, waits = worker.load / 10, float(waiting) if is_blocked else 0.0
            has_local = worker.can_prefill_locally or lane is None
            if has_local:
                before = float(worker.local_prefill_tokens) if is_blocked else self._left(worker, now)
                tokens, pairs = (before + uncached) / 1000, _pairs(prompt_tokens, uncached)
                features: tuple[float, ...] = (1.0, tokens, pairs, running, kv, waits)
                ttft_s = a + b * tokens + c * pairs + d * running + e * kv + f * waits
                ways.append(
                    _Way(worker, "local", None, prompt_tokens, uncached, before, is_blocked, memory, ttft_s, features)
                )
            if lane is not None and (uncached > local_max or not has_local):
                prefill, computed, queued, pairs = lane
                link = uncached / 1000
                features = (1.0, queued / 1000, pairs, running, kv, waits, link)
                ttft_s = a_far + b_far * queued / 1000 + c_far * pairs + d_far * running + e_far * kv + f_far * waits
                ttft_s += g_far * link
                before = queued - computed
                ways.append(
                    _Way(
                        worker, "remote", prefill, prompt_tokens, computed, before, is_blocked, memory, ttft_s, features
                    )
                )
        return ways

    def _left(self, worker: WorkerView, now: float) -> float:
        """Prompt tokens that it has yet to compute: the router counts all of a prompt until its first token."""
        placed_tokens = worker.local_prefill_tokens
        last = self._backlog.get(worker.worker_id) if placed_tokens else None
        if last is None:
            return float(placed_tokens)
        done = (now - last.at_s) * 1000 / max(self.local.weights[1], 1e-6)
        others = max(0, placed_tokens - last.placed_tokens)
        return min(float(placed_tokens), max(0.0, last.tokens - done) + others)


def _lane(request: RequestView, fingerprint: str) -> _Lane | None:
    """None: there is no such prefill worker."""
    prefills = [prefill for prefill in request.prefill if prefill.fingerprint == fingerprint]
    if not prefills:
        return None
    shared = request.queued_prefill_tokens / len(prefills)
    lanes = [
        _Lane(prefill, computed, prefill.queued_tokens + shared + computed, _pairs(request.prompt_tokens, computed))
        for prefill in prefills
        for computed in (_uncached(request, prefill),)
    ]
    return min(lanes, key=lambda lane: lane.queued)


def _uncached(request: RequestView, prefill: PrefillView) -> int:
    return max(1, request.prompt_tokens - prefill.hit_blocks * prefill.block_tokens)


def _pairs(prompt_tokens: int, uncached_tokens: float) -> float:
    """Millions of (token, token it attends to) that computing the last `uncached_tokens` of a prompt takes."""
    return uncached_tokens * (prompt_tokens - uncached_tokens / 2) / 1e6
