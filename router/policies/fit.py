"""A linear model fitted while it is used: recursive least squares with forgetting."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from operator import mul
from statistics import median

ERRORS_KEPT = 200


class LiveFit:
    """`y ~ sum(weight x feature)`; old observations fade by `memory` at each new one (Ljung, "System Identification", 11.2).

    Relative errors count: a miss of 0.1 s weighs as much at 0.2 s as one of 1 s at 2 s. Weights are never below 0: more work
    never takes less time.
    """

    def __init__(self, prior: Sequence[float], *, memory: float = 0.998, least: float) -> None:
        """`prior` are the weights to begin with; below `least` all values of y count alike."""
        self._weights = list(prior)
        self._memory = memory
        self._least = least
        size = range(len(prior))
        self._spread = [[100.0 * max(prior[row], 1e-3) ** 2 * (row == column) for column in size] for row in size]
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
        error = (y - self.predict(features)) / scale
        self._errors.append(abs(error))
        scaled = [feature / scale for feature in features]
        reach = [sum(cell * x for cell, x in zip(row, scaled, strict=True)) for row in self._spread]
        gain = self._memory + sum(x * r for x, r in zip(scaled, reach, strict=True))
        if gain <= 0:  # Rounding has made the matrix useless; it has learnt enough to go on with.
            return
        self._weights = [max(0.0, w + r / gain * error) for w, r in zip(self._weights, reach, strict=True)]
        self._spread = [
            [(cell - one * other / gain) / self._memory for cell, other in zip(row, reach, strict=True)]
            for row, one in zip(self._spread, reach, strict=True)
        ]
        for place in range(len(self._spread)):  # Forgetting must not blow up what is never observed.
            self._spread[place][place] = min(self._spread[place][place], 1e6)
