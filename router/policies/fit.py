"""A linear model fitted while it is used: weighted least squares with forgetting, and no weight below 0."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from operator import mul
from statistics import median

ERRORS_KEPT = 200
SOLVE_EVERY = 8
"""Observations from one solution to the next, once there are as many as weights."""
SWEEPS = 4
PRIOR_OBSERVATIONS = 1.0
"""What the prior weighs at first: as much as so many observations in which only one weight counts. It fades with each
observation and never ends: what is never observed keeps its prior, and no matrix becomes singular."""
OUTLIER = 1.0
"""An observation that is missed by more than its own size counts for less, as in Huber's estimator."""


class LiveFit:
    """`y ~ sum(weight x feature)`; old observations fade by `memory` at each new one (Ljung, "System Identification", 11.2).

    Relative errors count: a miss of 0.1 s weighs as much at 0.2 s as one of 1 s at 2 s. Weights are never below 0: more work
    never takes less time. They are found by coordinate descent on the normal equations, which cannot diverge.
    """

    def __init__(self, prior: Sequence[float], *, memory: float = 0.998, least: float) -> None:
        """`prior` are the weights to begin with, above 0; below `least` all values of y count alike."""
        self._prior = tuple(prior)
        self._weights = list(prior)
        self._memory = memory
        self._least = least
        self._seen = 0
        size = len(prior)
        self._square = [[0.0] * size for _ in range(size)]  # sum of feature x feature, and of feature x y
        self._target = [0.0] * size
        self._errors: deque[float] = deque(maxlen=ERRORS_KEPT)

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(self._weights)

    @property
    def median_error(self) -> float | None:
        """|predicted - observed| / observed, the median of the last 200; None before the first."""
        return median(self._errors) if self._errors else None

    def predict(self, features: Sequence[float]) -> float:
        total: float = sum(
            map(mul, self._weights, features)
        )  # Asked for each worker; a generator takes thrice as long.
        return total

    def observe(self, features: Sequence[float], y: float) -> None:
        """One more observation."""
        scale = max(y, self._least)
        error = abs(y - self.predict(features)) / scale
        self._errors.append(error)
        share = 1 / scale / scale / max(1.0, error / OUTLIER)
        for place, (row, one) in enumerate(zip(self._square, features, strict=True)):
            weighted = share * one
            self._target[place] = self._memory * self._target[place] + weighted * y
            self._square[place] = [
                self._memory * cell + weighted * other for cell, other in zip(row, features, strict=True)
            ]
        self._seen += 1
        if self._seen <= len(features) or self._seen % SOLVE_EVERY == 0:
            self._solve()

    def _solve(self) -> None:
        for _ in range(SWEEPS):
            for place, row in enumerate(self._square):
                prior = self._prior[place]
                pull = PRIOR_OBSERVATIONS / prior / prior / self._seen
                rest = sum(cell * weight for cell, weight in zip(row, self._weights, strict=True))
                rest -= row[place] * self._weights[place]
                found = (self._target[place] - rest + pull * prior) / (row[place] + pull)
                self._weights[place] = max(0.0, found)
