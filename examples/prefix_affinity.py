"""A routing policy of one's own: stay with the worker that knows the prompt, unless it is clearly busier than the rest.

hocket serve --policy examples/prefix_affinity.py:PrefixAffinity
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from hocket.router.policies import Choice, RequestView, WorkerView

HIT_SHARE_MIN = 0.5
"""A shorter prefix hit is not worth a detour."""
EXTRA_LOAD_MAX = 4
"""How many requests more than the least loaded worker a preferred one may hold."""


class PrefixAffinity:
    """At least half of the prompt cached and not four requests behind: there; else the least loaded worker."""

    def pick(self, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random) -> Choice:
        least = min(worker.load for worker in workers)
        fair = [worker for worker in workers if worker.load <= least + EXTRA_LOAD_MAX]
        best = max(fair, key=lambda worker: worker.hit_blocks)
        if best.hit_blocks * best.block_tokens >= HIT_SHARE_MIN * request.prompt_tokens:
            return Choice(best.worker_id, why=f"knows {best.hit_blocks} blocks of it, {best.load} running")
        idle = rng.choice([worker for worker in fair if worker.load == least])
        return Choice(idle.worker_id, why=f"nobody knows it, {idle.load} running")
