"""A routing policy of one's own: workers have a price, and the cheapest that is quick enough gets the request.

hocket serve --policy examples/cost_aware.py:CostAware
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from hocket.router.policies import Choice, RequestView, WorkerView

PRICE = {"spot": 1.0, "reserved": 2.5}
"""The first part of a worker's id -> what an hour of it costs."""
WAIT_TOKENS_MAX = 6000
"""Prompt tokens that may be computed before the first token: 0.6 s at 10,000 tokens/s."""


class CostAware:
    """Quick enough and cheap; when all are slow, the quickest."""

    def pick(self, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random) -> Choice:
        def wait_tokens(worker: WorkerView) -> int:
            uncached = request.prompt_tokens - worker.hit_blocks * worker.block_tokens
            return worker.local_prefill_tokens + uncached

        def price(worker: WorkerView) -> float:
            return PRICE.get(worker.worker_id.split("-")[0], 1.0)

        quick = [worker for worker in workers if wait_tokens(worker) <= WAIT_TOKENS_MAX]
        worker = min(quick, key=lambda worker: (price(worker), worker.load)) if quick else min(workers, key=wait_tokens)
        return Choice(worker.worker_id, why=f"price {price(worker):g}, {wait_tokens(worker)} tokens to compute first")
