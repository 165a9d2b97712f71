"""What keeps a policy that looks for caches from sending everybody to the same worker."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .base import WorkerView

SKEW_FACTOR, SKEW_REQUESTS = 1.5, 4.0


def unherded(workers: Sequence[WorkerView]) -> list[WorkerView]:
    """Those that hold at most 1.5 times the mean of the workers, plus 4 requests; never empty.

    A policy that picks among these alone leaves no worker with more than that and one request. Dynamo's KV router has
    none of it, and was seen to use one of eight workers (its issue 737); SGLang's cache-aware policy has such a bound.
    """
    mean = sum(worker.load for worker in workers) / len(workers)
    return [worker for worker in workers if worker.load <= SKEW_FACTOR * mean + SKEW_REQUESTS]


def cheapest(costs: Sequence[float], workers: Sequence[WorkerView], rng: random.Random) -> WorkerView:
    """The worker with the least cost; a tie goes to the one with fewer requests for its slots, then to chance."""
    least = min(costs)
    best = [worker for worker, cost in zip(workers, costs, strict=True) if cost == least]
    if len(best) == 1:
        return best[0]
    fewest = min(worker.load / max(worker.slots, 1) for worker in best)
    return rng.choice([worker for worker in best if worker.load / max(worker.slots, 1) == fewest])
