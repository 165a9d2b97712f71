"""Does the index tell the truth? What it predicted, against what the engines report. Pure.

An engine's cache may be worth less than its events say (lost events, offloading, windows) or more (no events at all).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..bus.ids import WorkerId

SMOOTHING = 0.1
"""Weight of a new observation: the last 20 or so count."""

DRIFT_MAX = 0.25
"""Share of the prompts' tokens that may be wrong: events are a moment old when the engine looks."""

OBSERVATIONS_MIN = 8
"""Before that a worker is believed."""


@dataclass(slots=True)
class _Drift:
    share: float = 0.0  # of prompt tokens predicted wrongly, smoothed
    observations: int = 0


class TruthCheck:
    """One number for each worker: the share of prompt tokens whose prediction was wrong, 0.0 to 1.0."""

    def __init__(self) -> None:
        self._drifts: dict[WorkerId, _Drift] = {}

    def observe(
        self, worker: WorkerId, *, told_tokens: int, predicted_tokens: int, cached_tokens: int, prompt_tokens: int
    ) -> float:
        """Take one request's truth into account; returns the worker's drift now.

        The worker's events have told of so many tokens; with what was on its way there (siblings that were placed shortly
        before) so many were predicted. The events cannot know which of those were there in time: anything between is right.
        """
        drift = self._drifts.setdefault(worker, _Drift())
        # An engine computes the last token in any case.
        least, most = (min(tokens, prompt_tokens - 1) for tokens in (told_tokens, max(told_tokens, predicted_tokens)))
        error = max(least - cached_tokens, cached_tokens - most, 0) / max(prompt_tokens, 1)
        drift.observations += 1
        weight = max(SMOOTHING, 1 / drift.observations)  # The mean at first, so that the start at 0.0 does not count.
        drift.share += weight * (error - drift.share)
        return drift.share

    def has_drifted(self, worker: WorkerId) -> bool:
        """True when the worker's predictions are not to be believed."""
        drift = self._drifts.get(worker)
        return drift is not None and drift.observations >= OBSERVATIONS_MIN and drift.share > DRIFT_MAX

    def drift(self, worker: WorkerId) -> float | None:
        """The worker's drift; None while nothing was observed."""
        drift = self._drifts.get(worker)
        return drift.share if drift is not None else None

    def forget(self, worker: WorkerId) -> None:
        """Begin anew: the worker left, or its index was mended."""
        self._drifts.pop(worker, None)
