"""Whether an engine that somebody waits for still makes steps: the decision alone, told what it shows and when.

A worker whose engine hangs looks alive, for its heartbeats come from another thread or process than the steps.
"""

from __future__ import annotations

from .engines.base import EngineLoad

LOOK_S = 0.5
FIRST_STEP_SHARE = 3  # more time for the first step, in which much is compiled


class Watchdog:
    """Counts the time in which a step was due and none was finished.

    Only time that it has seen counts: whoever was suspended itself saw nothing. Idle time neither counts nor forgives, because
    requests that nobody serves leave, and others come.
    """

    def __init__(self, limit_s: float) -> None:
        """`limit_s`: longer than any step takes; 0 never finds anything."""
        self._limit_s = limit_s
        self._steps = 0
        self._looked_s: float | None = None
        self.stuck_s = 0.0

    def look(self, load: EngineLoad, now: float) -> bool:
        """Whether it hangs; to be asked every `LOOK_S`."""
        since_s = 0.0 if self._looked_s is None else min(now - self._looked_s, 2 * LOOK_S)
        self._looked_s = now
        if load.steps != self._steps:
            self._steps, self.stuck_s = load.steps, 0.0
        elif load.due:
            self.stuck_s += since_s
        limit_s = self._limit_s if load.steps else self._limit_s * FIRST_STEP_SHARE
        return 0 < limit_s <= self.stuck_s
