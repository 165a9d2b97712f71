"""Prefix hits against load, both counted in KV blocks.

The cost is the one of Dynamo's KV router at temperature 0 (its docs, "KV cache routing"): blocks of the prompt still to
compute plus blocks the worker is busy with.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from .base import Choice, RequestView, WorkerView


class KvPolicy:
    """The worker with the fewest blocks to compute and to keep: `prompt blocks - hit blocks + active blocks`."""

    def pick(self, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random) -> Choice:
        """A tie goes to the worker with fewer requests, then to chance."""
        costs = [(self._cost(request, worker), worker.load) for worker in workers]
        best = min(costs)
        worker = rng.choice([worker for worker, cost in zip(workers, costs, strict=True) if cost == best])
        prompt_blocks = -(-request.prompt_tokens // worker.block_tokens)
        return Choice(
            worker.worker_id,
            why=f"prefix hit {worker.hit_blocks} of {prompt_blocks} blocks, {worker.load} running, cost {best[0]} blocks",
        )

    def _cost(self, request: RequestView, worker: WorkerView) -> int:
        prompt_blocks = -(-request.prompt_tokens // worker.block_tokens)
        active_blocks = max(worker.kv_blocks - worker.kv_blocks_free, worker.in_flight_blocks)
        return prompt_blocks - worker.hit_blocks + active_blocks
