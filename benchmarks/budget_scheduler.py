"""vLLM's scheduler with a chunk budget that a file changes: budgets are swept without starting an engine for each.

The engine is started with the largest one (`max_num_batched_tokens` sizes its buffers), `$CHUNK_BUDGET_FILE` names a smaller
one at any time. Given to vLLM as `scheduler_cls`.
"""

from __future__ import annotations

import os
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

Unchecked = Any
"""vLLM has no stubs here."""


class _Budget:
    """Reads the file when it has changed."""

    def __init__(self, largest: int) -> None:
        self._path = os.environ["CHUNK_BUDGET_FILE"]
        self._largest = largest
        self._seen_ns = -1
        self._tokens = largest

    def tokens(self) -> int:
        """Of a step, from now on (a stat call: 1 us)."""
        changed_ns = os.stat(self._path).st_mtime_ns
        if changed_ns != self._seen_ns:
            self._seen_ns = changed_ns
            with open(self._path) as file:
                self._tokens = min(self._largest, int(file.read() or self._largest))
        return self._tokens


class _Budgeted:
    """What both schedulers have in common."""

    max_num_scheduled_tokens: int
    _budget: _Budget | None = None

    def schedule(self, *args: Unchecked, **kwargs: Unchecked) -> Unchecked:
        if self._budget is None:
            self._budget = _Budget(self.max_num_scheduled_tokens)
        self.max_num_scheduled_tokens = self._budget.tokens()
        return super().schedule(*args, **kwargs)  # type: ignore[misc]  # vLLM's, beside this class


class BudgetScheduler(_Budgeted, Scheduler):  # type: ignore[misc]
    """For engines on a CPU, which cannot schedule ahead."""


class AsyncBudgetScheduler(_Budgeted, AsyncScheduler):  # type: ignore[misc]
    """For engines on a GPU."""
