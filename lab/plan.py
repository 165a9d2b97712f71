"""`hocket lab plan`: how many GPUs a workload needs under an SLO, together or apart, found by simulating pools."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from .measure import Summary
from .run import run_one
from .scenario import Scenario
from .traces import Trace

WORKERS_MAX = 1024
ROUNDS_MAX = 24
"""Pools tried beyond the two bounds before a split is given up."""

Tell = Callable[[str], None]


@dataclass(slots=True)
class Plan:
    """The smallest pools that keep the SLO, and the two compared at an equal number of GPUs."""

    good_share: float
    together: Summary | None  # every worker does both
    apart: Summary | None
    rivals: list[Summary] = field(default_factory=list)  # the other kind, with as many GPUs as the smaller pool

    def verdict(self) -> str:
        """What to do, in a sentence or two."""
        share = f"{self.good_share:.0%} of the requests within the limits"
        if self.together is None and self.apart is None:
            return f"No pool keeps {share}, however large: the limits are tighter than an engine's own time."
        if self.apart is None:
            assert self.together is not None
            return f"Do not disaggregate: {_pool(self.together)} keep {share}; no split does, however large."
        if self.together is None:
            return f"Disaggregate: {_pool(self.apart)} keep {share}; no pool of workers that do both does."
        together, apart = self.together, self.apart
        if apart.gpus < together.gpus:
            return f"Disaggregate: {_pool(apart)} keep {share}, workers that do both need {together.gpus} GPUs."
        if apart.gpus > together.gpus:
            return f"Do not disaggregate: {_pool(together)} keep {share}, apart it takes {apart.gpus} GPUs."
        return (
            f"It makes no difference in GPUs ({together.gpus} either way keep {share}): ITL p99 is "
            f"{together.itl_s.p99 * 1e3:.0f} ms together and {apart.itl_s.p99 * 1e3:.0f} ms apart, "
            f"TTFT p99 {together.ttft_s.p99:.2f} s and {apart.ttft_s.p99:.2f} s."
        )


def _pool(summary: Summary) -> str:
    scenario = summary.scenario
    gpus = f"{summary.gpus} GPU{'s' * (summary.gpus != 1)}"
    if scenario.prefill:
        return f"{scenario.prefill} prefill and {scenario.decode} decode workers ({gpus})"
    return f"{scenario.decode} workers that do both ({gpus})"


class Planner:
    """Simulates pools, each once."""

    def __init__(self, trace: Trace, base: Scenario, *, good_share: float, tell: Tell = lambda _: None) -> None:
        self._trace = trace
        self._base = base
        self._good_share = good_share
        self._tell = tell
        self._seen: dict[tuple[int, int], Summary] = {}

    def plan(self) -> Plan:
        """Both kinds of pool, as small as they can be."""
        together = self._smallest_together()
        apart = self._smallest_apart()
        plan = Plan(self._good_share, together, apart)
        if together is not None and apart is not None and together.gpus != apart.gpus:
            plan.rivals = self._rivals(together, apart)
        return plan

    def tried(self) -> list[Summary]:
        """Every pool that was simulated, the smallest first."""
        return sorted(self._seen.values(), key=lambda s: (s.gpus, s.scenario.prefill))

    def _run(self, prefill: int, decode: int) -> Summary:
        key = prefill, decode
        if key not in self._seen:
            scenario = msgspec.structs.replace(self._base, prefill=prefill, decode=decode)
            summary = self._seen[key] = run_one(self._trace, scenario)
            self._tell(f"{summary.label}: {summary.goodput:.1%} good, TTFT p99 {summary.ttft_s.p99:.2f} s")
        return self._seen[key]

    def _goodput(self, prefill: int, decode: int) -> float:
        return self._run(prefill, decode).goodput

    def _smallest_together(self) -> Summary | None:
        workers = smallest(lambda count: self._goodput(0, count), self._good_share)
        return self._run(0, workers) if workers else None

    def _smallest_apart(self) -> Summary | None:
        """Bounds for each side with the other one ample; then the smallest pool from there on that is good."""
        share = self._good_share
        ample = smallest(lambda count: self._goodput(count, count), share)
        if ample is None:
            return None
        prefill_min = smallest(lambda count: self._goodput(count, 2 * ample), share, ample) or ample
        decode_min = smallest(lambda count: self._goodput(2 * ample, count), share, ample) or ample
        splits = self._splits(prefill_min, decode_min)
        return self._run(*next((split for split in splits if self._goodput(*split) >= share), (ample, ample)))

    def _splits(self, prefill: int, decode: int) -> Iterator[tuple[int, int]]:
        """Pools with at least so many on either side, the fewest GPUs first."""
        per_prefill, per_decode = self._base.gpus()
        more = [(x, y) for x in range(ROUNDS_MAX) for y in range(ROUNDS_MAX)]
        more.sort(key=lambda split: (split[0] * per_prefill + split[1] * per_decode, split))
        for extra_prefill, extra_decode in more[:ROUNDS_MAX]:
            yield prefill + extra_prefill, decode + extra_decode

    def _rivals(self, together: Summary, apart: Summary) -> list[Summary]:
        """The kind that needs more GPUs, with as many as the other has."""
        gpus = min(together.gpus, apart.gpus)
        per_prefill, per_decode = self._base.gpus()
        if together.gpus > apart.gpus:
            workers = gpus // per_decode
            return [self._run(0, workers)] if workers else []
        share = apart.scenario.prefill * per_prefill / apart.gpus
        prefill = max(1, round(gpus * share / per_prefill))
        decode = (gpus - prefill * per_prefill) // per_decode
        return [self._run(prefill, decode)] if decode else []


def smallest(goodput: Callable[[int], float], enough: float, most: int = WORKERS_MAX) -> int | None:
    """The smallest count from 1 to `most` that brings `enough`, by doubling and halving.

    None when `most` does not, or when twice as many brought nothing: more workers share less of their caches.
    """
    high, before = 1, -1.0
    while (now := goodput(high)) < enough:
        if high >= most or now <= before:
            return None
        high, before = min(2 * high, most), now
    low = high // 2 + 1
    while low < high:
        middle = (low + high) // 2
        if goodput(middle) >= enough:
            high = middle
        else:
            low = middle + 1
    return high


def rows_of(plan: Plan) -> Sequence[Summary]:
    """What to show of it: the smallest pool of each kind, and their rivals."""
    return [summary for summary in (plan.together, plan.apart, *plan.rivals) if summary is not None]
