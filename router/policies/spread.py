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
    loads = [worker.load for worker in workers]
    most = SKEW_FACTOR * (sum(loads) / len(loads)) + SKEW_REQUESTS
    return [worker for worker, load in zip(workers, loads, strict=True) if load <= most]


def cheapest(costs: Sequence[float], workers: Sequence[WorkerView], rng: random.Random) -> WorkerView:
    """The worker with the least cost; a tie goes to the one with fewer requests for its slots, then to chance."""
    least = min(costs)
    best = [worker for worker, cost in zip(workers, costs, strict=True) if cost == least]
    if len(best) == 1:
        return best[0]
    return least_loaded(best, rng)


def least_loaded(workers: Sequence[WorkerView], rng: random.Random) -> WorkerView:
    """The worker with the fewest requests for its slots; a tie goes to chance."""
    shares = [worker.load / (worker.slots or 1) for worker in workers]
    fewest = min(shares)
    return rng.choice([worker for worker, share in zip(workers, shares, strict=True) if share == fewest])
