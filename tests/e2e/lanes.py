"""Policies for the tests: one lane for every prompt; one decode worker for every request."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from hocket.router.policies.base import Choice, RequestView, WorkerView
from hocket.router.policies.basic import LeastLoaded


class ToTarget:
    """Least loaded decode worker, one lane."""

    def __init__(self) -> None:
        self._inner = LeastLoaded()

    def pick(self, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random) -> Choice:
        """The lane is left out when the target is gone."""
        choice = self._inner.pick(request, workers, now, rng)
        lanes = [prefill.worker_id for prefill in request.prefill if prefill.worker_id.startswith("prefill-target")]
        return dataclasses.replace(choice, lane=lanes[0] if lanes else None)


class AllToTheFirst:
    """As blind as can be: whoever comes first in the list."""

    def pick(self, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random) -> Choice:
        """Those that refused are not offered again."""
        return Choice(workers[0].worker_id)
