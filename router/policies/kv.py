"""Prefix hits against load.

`KvPolicy` is the cost of Dynamo's KV router (its docs, "KV cache routing"): blocks of the prompt still to compute plus
blocks that the worker is busy with, drawn by softmax at a temperature. There the first count once; then a busy home loses its
conversations and 38 % of the hits are missed (docs/policies.md), so here they count 16 times. `Lmetric` has no knob: tokens
to compute times requests held (SGLang's `lmetric`; Dynamo's docs name it as well).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from .base import Choice, PolicyError, RequestView, WorkerView
from .spread import cheapest, unherded


class KvPolicy:
    """The worker with the least `hit_weight x (prompt - hit blocks) + blocks it has yet to compute + active blocks`."""

    def __init__(self, temperature: float = 0.0, hit_weight: float = 16.0) -> None:
        """`temperature` 0 takes the least cost; above it, a worker is as likely as `exp(-cost / (temperature x spread))`."""
        if temperature < 0 or hit_weight < 0:
            raise PolicyError(f"temperature {temperature} and hit_weight {hit_weight} must not be negative")
        self._temperature = temperature
        self._hit_weight = hit_weight

    def pick(self, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random) -> Choice:
        fair = unherded(workers)
        costs = self._costs(request.prompt_tokens, fair)
        worker = self._draw(costs, fair, rng) if self._temperature else cheapest(costs, fair, rng)
        prompt_blocks = -(-request.prompt_tokens // worker.block_tokens)
        return Choice(
            worker.worker_id,
            why=f"prefix hit {worker.hit_blocks} of {prompt_blocks} blocks, {worker.load} running",
            costs={one.worker_id: {"blocks": cost} for one, cost in zip(fair, costs, strict=True)},
        )

    def _costs(self, prompt_tokens: int, workers: list[WorkerView]) -> list[float]:
        return [
            self._hit_weight * (-(-prompt_tokens // worker.block_tokens) - worker.hit_blocks)
            + worker.local_prefill_tokens / worker.block_tokens
            + max(worker.kv_blocks - worker.kv_blocks_free, worker.in_flight_blocks)
            for worker in workers
        ]

    def _draw(self, costs: list[float], workers: list[WorkerView], rng: random.Random) -> WorkerView:
        least, spread = min(costs), max(costs) - min(costs) or 1.0
        weights = [math.exp((least - cost) / (self._temperature * spread)) for cost in costs]
        return rng.choices(workers, weights)[0]


class Lmetric:
    """The worker with the least `tokens to compute x (requests held + 1)`; what it still has to compute counts, too."""

    def pick(self, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random) -> Choice:
        fair = unherded(workers)
        costs = [
            (request.prompt_tokens - worker.hit_blocks * worker.block_tokens + worker.local_prefill_tokens)
            * (worker.load + 1.0)
            for worker in fair
        ]
        worker = cheapest(costs, fair, rng)
        return Choice(
            worker.worker_id,
            why=f"prefix hit {worker.hit_blocks} blocks, {worker.local_prefill_tokens} tokens before it, {worker.load} running",
            costs={one.worker_id: {"token_requests": cost} for one, cost in zip(fair, costs, strict=True)},
        )
