"""vLLM's scheduler with a chunk budget that a file changes, and a log of its steps. Given to vLLM as `scheduler_cls`.

Budgets are swept without starting an engine for each: it is started with the largest one (`max_num_batched_tokens` sizes its
buffers), `$CHUNK_BUDGET_FILE` names a smaller one at any time. `$STEP_LOG` is a prefix of files, one of each engine, that get a
line a step as `hocket lab fit` reads them.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any, TextIO

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


class StepLog:
    """What each step computed and how long it took: from the end of the step before it, or from when it was scheduled."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._begun: dict[int, tuple[float, dict[str, int]]] = {}  # by id() of the scheduler's output, which vLLM holds
        self._ended_s = 0.0

    def begin(self, output: Unchecked, requests: Unchecked) -> None:
        """It was scheduled."""
        counts = dict.fromkeys(("prefill_tokens", "prefill_pairs", "decode_requests", "decode_kv_tokens"), 0)
        for request_id, tokens in output.num_scheduled_tokens.items():
            request = requests[request_id]
            end = request.num_computed_tokens  # The scheduler has counted this step's already.
            if end - tokens >= request.num_prompt_tokens:
                counts["decode_requests"] += 1
                counts["decode_kv_tokens"] += end
            else:
                counts["prefill_tokens"] += tokens
                counts["prefill_pairs"] += tokens * (end - tokens) + tokens * (tokens + 1) // 2
        self._begun[id(output)] = time.perf_counter(), counts

    def end(self, output: Unchecked) -> None:
        """Its tokens are here."""
        begun_s, counts = self._begun.pop(id(output))
        now = time.perf_counter()
        seconds, self._ended_s = now - max(begun_s, self._ended_s), now
        if output.total_num_scheduled_tokens:
            self._file.write(json.dumps({"seconds": seconds, **counts}) + "\n")


class _Budgeted:
    """What both schedulers have in common."""

    max_num_scheduled_tokens: int
    requests: dict[str, Unchecked]
    _budget: _Budget | None = None
    _log: StepLog | None = None

    def schedule(self, *args: Unchecked, **kwargs: Unchecked) -> Unchecked:
        if self._budget is None:
            self._budget = _Budget(self.max_num_scheduled_tokens)
            if prefix := os.environ.get("STEP_LOG"):
                self._log = StepLog(open(f"{prefix}-{os.getpid()}.jsonl", "w", buffering=1))  # noqa: SIM115  # while we live
        self.max_num_scheduled_tokens = self._budget.tokens()
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]  # vLLM's, beside this class
        if self._log:
            self._log.begin(output, self.requests)
        return output

    def update_from_output(self, output: Unchecked, *args: Unchecked, **kwargs: Unchecked) -> Unchecked:
        if self._log:
            self._log.end(output)
        return super().update_from_output(output, *args, **kwargs)  # type: ignore[misc]


class BudgetScheduler(_Budgeted, Scheduler):  # type: ignore[misc]
    """For engines on a CPU, which cannot schedule ahead."""


class AsyncBudgetScheduler(_Budgeted, AsyncScheduler):  # type: ignore[misc]
    """For engines on a GPU."""
