"""The last word of vLLM's scheduler on how busy it is."""

from __future__ import annotations

from dataclasses import dataclass

from . import versions
from .versions import Unchecked


@dataclass(slots=True)
class LoadStats:
    """As of the last step; `logger` keeps it so."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0  # 0 to 1

    def logger(self) -> Unchecked:
        """What vLLM wants as one of its `stat_loggers`; imports vLLM."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        stats = self

        class Load(StatLoggerBase):  # type: ignore[misc]  # vLLM has no stubs here.
            """Keeps what `VllmEngine.load` tells."""

            def __init__(self, vllm_config: Unchecked, engine_index: int = 0) -> None:
                pass

            def record(self, scheduler_stats: Unchecked, *_: Unchecked, **__: Unchecked) -> None:
                if scheduler_stats is not None:
                    stats.running = scheduler_stats.num_running_reqs
                    stats.waiting = versions.waiting_requests(scheduler_stats)
                    stats.kv_usage = scheduler_stats.kv_cache_usage

            def log_engine_initialized(self) -> None:
                pass

        return Load
