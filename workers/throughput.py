"""Tokens per second of busy time, with a memory of some seconds."""

from __future__ import annotations

HALF_LIFE_S = 10.0  # of busy time
TOKENS_MIN = (
    128  # fewer (prompts that were cached but for their end) tell how long a hand-off takes, not how fast one computes
)


class Throughput:
    """Busy while at least one task runs. Pure: the caller gives the time."""

    def __init__(self) -> None:
        self._tasks = 0
        self._since_s = 0.0
        self._busy_s = 0.0
        self._tokens = 0.0

    def begin(self, now_s: float) -> None:
        if self._tasks == 0:
            self._since_s = now_s
        self._tasks += 1

    def end(self, now_s: float, tokens: int | None) -> None:
        """A task has ended that computed so many tokens; None: it failed, and its time says nothing of the speed."""
        self._tasks -= 1
        if tokens is None:
            if self._tasks == 0:
                return
            tokens = 0
        elapsed_s, self._since_s = now_s - self._since_s, now_s
        fade = 0.5 ** (elapsed_s / HALF_LIFE_S)
        self._busy_s = self._busy_s * fade + elapsed_s
        self._tokens = self._tokens * fade + tokens

    @property
    def tokens_per_s(self) -> float:
        """0.0 while nothing is known."""
        return self._tokens / self._busy_s if self._tokens >= TOKENS_MIN and self._busy_s > 0.001 else 0.0
