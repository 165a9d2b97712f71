"""`hocket lab run`: one trace on many scenarios, in parallel over the cores."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import msgspec

from .measure import Summary, summarize
from .replay import Replay
from .scenario import Scenario
from .traces import Trace

Progress = Callable[[int, int], None]
"""Called with requests that ended and all requests, over every run together."""


def run_one(trace: Trace, scenario: Scenario, progress: Progress = lambda *_: None) -> Summary:
    """One run in this process."""
    begin_s = time.perf_counter()
    replayed = Replay(trace, scenario, progress).run()
    wall_s = time.perf_counter() - begin_s
    summary = summarize(replayed, trace, trace.ideal_hit_tokens(scenario.engine.block_tokens))
    rss_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return msgspec.structs.replace(summary, wall_s=wall_s, rss_mib=rss_mib)


def run_all(
    trace: Trace, scenarios: Sequence[Scenario], *, jobs: int = 0, progress: Progress = lambda *_: None
) -> list[Summary]:
    """Every scenario, `jobs` at once (0: as many as there are cores); results in the order of the scenarios."""
    jobs = min(jobs or len(os.sched_getaffinity(0)), len(scenarios))
    total = len(trace.turns) * len(scenarios)
    if jobs <= 1:
        summaries: list[Summary] = []
        for scenario in scenarios:
            before = len(summaries) * len(trace.turns)
            summaries.append(run_one(trace, scenario, partial(_add, progress, before, total)))
        return summaries
    context = multiprocessing.get_context("spawn")  # A fork would share threads' locks.
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(jobs, context, _set_up, (trace, counter)) as pool:
        futures = [pool.submit(_run_in_child, scenario) for scenario in scenarios]
        while not all(future.done() for future in futures):
            progress(counter.value, total)
            time.sleep(0.2)
        return [future.result() for future in futures]


def _add(progress: Progress, before: int, total: int, ended: int, _: int) -> None:
    progress(before + ended, total)


_trace: Trace
_counter: object


def _set_up(trace: Trace, counter: object) -> None:
    global _trace, _counter
    _trace, _counter = trace, counter


def _run_in_child(scenario: Scenario) -> Summary:
    told = 0

    def progress(ended: int, _: int) -> None:
        nonlocal told
        with _counter.get_lock():  # type: ignore[attr-defined]  # multiprocessing's synchronized value has no public type.
            _counter.value += ended - told  # type: ignore[attr-defined]
        told = ended

    return run_one(_trace, scenario, progress)


def write_json(path: Path, summaries: Sequence[Summary]) -> None:
    """A list of rows, one object a run."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(summaries)))


COLUMNS: tuple[tuple[str, Callable[[Summary], str]], ...] = (
    ("scenario", lambda s: s.label),
    ("TTFT mean s", lambda s: f"{s.ttft_s.mean:.3f}"),
    ("p50", lambda s: f"{s.ttft_s.p50:.3f}"),
    ("p90", lambda s: f"{s.ttft_s.p90:.3f}"),
    ("p99", lambda s: f"{s.ttft_s.p99:.3f}"),
    ("ITL p50 ms", lambda s: f"{s.itl_s.p50 * 1e3:.1f}"),
    ("p99", lambda s: f"{s.itl_s.p99 * 1e3:.1f}"),
    ("E2E p50 s", lambda s: f"{s.e2e_s.p50:.2f}"),
    ("p99", lambda s: f"{s.e2e_s.p99:.2f}"),
    ("good %", lambda s: f"{s.goodput * 100:.1f}"),
    ("hit %", lambda s: f"{s.hit_rate * 100:.1f}"),
    ("of ideal %", lambda s: f"{100 * s.hit_rate / s.ideal_hit_rate:.0f}" if s.ideal_hit_rate else "-"),
    ("tok/s/GPU", lambda s: f"{s.output_tokens_per_s_gpu:.1f}"),
    ("busy %", lambda s: f"{s.busy * 100:.0f}"),
    ("KV GB", lambda s: f"{s.transfer_gb:.0f}"),
    ("msg/req", lambda s: f"{s.messages_per_request:.0f}"),
    ("failed", lambda s: str(s.failed)),
    ("wall s", lambda s: f"{s.wall_s:.1f}"),
)


def table(summaries: Iterable[Summary]) -> str:
    """One line for each run."""
    rows = [[name for name, _ in COLUMNS], *([cell(summary) for _, cell in COLUMNS] for summary in summaries)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
