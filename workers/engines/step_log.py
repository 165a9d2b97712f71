"""What an engine's steps computed and how long they took, as `hocket lab fit` reads it: JSON lines, one object a step.

Costs a microsecond or two a step, and one write for many steps. Several engines may share a file: whole lines are appended.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable

import msgspec

from .base import EngineError

LINES_MAX = 256  # that wait to be written
FLUSH_S = 1.0


class LoggedStep(msgspec.Struct):
    """One line. Without its time and duration: what a step is to compute."""

    unix_s: float = 0.0  # when it began
    seconds: float = 0.0
    requests: int = 0
    prefill_tokens: int = 0
    prefill_pairs: int = 0  # over the prompt tokens: how many tokens each attends to, itself included
    decode_requests: int = 0  # each makes a token
    decode_kv_tokens: int = 0  # that these attend to, all together


def step_of(parts: Iterable[tuple[int, int]]) -> LoggedStep:
    """From (tokens that have their KV, tokens computed now) of each request. One token after others is a decode step's."""
    step = LoggedStep()
    for computed, tokens in parts:
        step.requests += 1
        if tokens == 1 and computed:
            step.decode_requests += 1
            step.decode_kv_tokens += computed + 1
        else:
            step.prefill_tokens += tokens
            step.prefill_pairs += tokens * computed + tokens * (tokens + 1) // 2
    return step


class StepLog:
    """Steps begin and end in the same order. One may begin before the one before has ended; its time counts from that end."""

    def __init__(self, path: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises OSError."""
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._clock = clock
        self._unix_s = time.time() - clock()
        self._open: deque[tuple[float, LoggedStep]] = deque()
        self._lines: list[bytes] = []
        self._ended_s = self._flushed_s = clock()

    @classmethod
    def at(cls, path: str, clock: Callable[[], float] = time.monotonic) -> StepLog:
        """As the constructor. Raises EngineError."""
        try:
            return cls(path, clock)
        except OSError as error:
            raise EngineError(f"step_log {path}: {error.strerror}") from error

    def begin(self, step: LoggedStep) -> None:
        """It is given to the engine now. One without requests counts, too, and is not written."""
        self._open.append((self._clock(), step))

    def end(self) -> None:
        """The oldest has been computed."""
        if not self._open:
            return
        now = self._clock()
        begun_s, step = self._open.popleft()
        begun_s = max(begun_s, self._ended_s)
        self._ended_s = now
        if step.requests and now > begun_s:
            step.unix_s, step.seconds = round(self._unix_s + begun_s, 6), now - begun_s
            self._lines.append(msgspec.json.encode(step))
        if len(self._lines) >= LINES_MAX or now - self._flushed_s >= FLUSH_S:
            self._flush(now)

    def close(self) -> None:
        """Write what is left."""
        self._flush(self._clock())
        os.close(self._file)

    def _flush(self, now: float) -> None:
        self._flushed_s = now
        if self._lines:
            os.write(self._file, b"\n".join([*self._lines, b""]))
            self._lines.clear()
