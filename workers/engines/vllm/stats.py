"""The last word of vLLM's scheduler, through the hook that it has for loggers."""

from __future__ import annotations

from dataclasses import dataclass

from . import versions
from .versions import Unchecked


@dataclass(slots=True)
class SchedulerStats:
    """As of the last step."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    steps: int = 0  # empty ones, too: while requests wait for KV, vLLM goes round and round


def logger_of(stats: SchedulerStats) -> Unchecked:
    """A logger's class for `AsyncLLM`, which keeps `stats` up to date; imports vLLM."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Load(StatLoggerBase):  # type: ignore[misc]  # vLLM has no stubs here.
        """Keeps what `VllmEngine.load` tells."""

        def __init__(self, vllm_config: Unchecked, engine_index: int = 0) -> None:
            pass

        def record(self, scheduler_stats: Unchecked, *_: Unchecked, **__: Unchecked) -> None:
            stats.steps += 1
            if scheduler_stats is not None:
                stats.running = scheduler_stats.num_running_reqs
                stats.waiting = versions.waiting_requests(scheduler_stats)
                stats.kv_usage = scheduler_stats.kv_cache_usage

        def log_engine_initialized(self) -> None:
            pass

    return Load
