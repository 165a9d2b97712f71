"""Policies that look at no prompt: round robin, random, least loaded, power of two choices."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .base import Choice, RequestView, WorkerView
from .spread import least_loaded


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
        worker = least_loaded(workers, rng)
        return Choice(worker.worker_id, why=f"{worker.load} of {worker.slots} slots taken")


class Random:
    """Any worker, each as likely as the others."""

    def pick(self, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random) -> Choice:
        return Choice(rng.choice(workers).worker_id, why=f"one of {len(workers)} by chance")


class PowerOfTwo:
    """The less loaded of two that chance names: nearly as even as least loaded, and many routers do not all meet at one.

    Mitzenmacher, "The power of two choices in randomized load balancing", 2001.
    """

    def pick(self, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random) -> Choice:
        pair = rng.sample(workers, min(2, len(workers)))
        worker = min(pair, key=lambda worker: worker.load / max(worker.slots, 1))
        return Choice(worker.worker_id, why=f"{worker.load} running, the least of {len(pair)} by chance")
