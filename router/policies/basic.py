"""Policies that look at no prompt: round robin and least loaded."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .base import Choice, RequestView, WorkerView


class RoundRobin:
    """Each worker in turn, whatever its load."""

    def __init__(self) -> None:
        self._turn = 0

    def pick(self, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random) -> Choice:
        """The next worker in the order of their ids."""
        worker = workers[self._turn % len(workers)]
        self._turn += 1
        return Choice(worker.worker_id, why=f"turn {self._turn}")


class LeastLoaded:
    """The worker that holds the fewest requests for its slots; a tie goes to chance."""

    def pick(self, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random) -> Choice:
        """Compares `load / slots`."""
        fewest = min(worker.load / max(worker.slots, 1) for worker in workers)
        worker = rng.choice([worker for worker in workers if worker.load / max(worker.slots, 1) == fewest])
        return Choice(worker.worker_id, why=f"{worker.load} of {worker.slots} slots taken")
