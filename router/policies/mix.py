"""A weighted sum of scores, each 0 (best) to 1: for who wants to turn knobs (llm-d's scorers work like this)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .base import Choice, PolicyError, RequestView, WorkerView
from .spread import cheapest, unherded


class WeightedMix:
    """The least `prefix x uncached share + load x slots taken + queue x prompt tokens waiting + kv x blocks in use`.

    Loads and queues are shares of the largest among the candidates; a term whose weight is 0 costs nothing.
    """

    def __init__(self, prefix: float = 4.0, load: float = 1.0, queue: float = 1.0, kv: float = 0.5) -> None:
        if min(prefix, load, queue, kv) < 0 or not max(prefix, load, queue, kv):
            raise PolicyError("weights must not be negative, and one must be above 0")
        self._weights = {"prefix": prefix, "load": load, "queue": queue, "kv": kv}

    def pick(self, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random) -> Choice:
        fair = unherded(workers)
        load_max = max(worker.load for worker in fair) or 1
        queue_max = max(worker.local_prefill_tokens for worker in fair) or 1
        terms = {}
        for worker in fair:
            used_blocks = max(worker.kv_blocks - worker.kv_blocks_free, worker.in_flight_blocks)
            shares = {
                "prefix": 1 - min(1.0, worker.hit_blocks * worker.block_tokens / max(request.prompt_tokens, 1)),
                "load": worker.load / load_max,
                "queue": worker.local_prefill_tokens / queue_max,
                "kv": min(1.0, used_blocks / max(worker.kv_blocks, 1)),
            }
            terms[worker.worker_id] = {name: self._weights[name] * share for name, share in shares.items()}
        worker = cheapest([sum(terms[worker.worker_id].values()) for worker in fair], fair, rng)
        return Choice(
            worker.worker_id,
            why=", ".join(f"{name} {value:.2f}" for name, value in terms[worker.worker_id].items()),
            costs=terms,
        )
