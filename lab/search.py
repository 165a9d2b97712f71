"""Many seeds on many cores; a failure is made small enough to be read."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .chaos import Outcome, Plan, draw, run_seed

CHUNK = 20
TRIES_MAX = 100
LINES_MAX = 120
_ROUTINE = re.compile(r" > (hk\.load|hk\.kv|hk\.tok|_INBOX)")


@dataclass(slots=True)
class Found:
    """What a search has seen."""

    runs: int = 0
    failed: list[Outcome] = field(default_factory=list)  # without their logs
    ends: Counter[str] = field(default_factory=Counter)  # how requests ended
    virtual_s: float = 0.0


def search(seeds: Sequence[int], *, jobs: int = 0, progress: Callable[[Found], None] = lambda _: None) -> Found:
    """Run every seed, on as many cores (0: all there are); `progress` is called now and then."""
    found = Found()
    chunks = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
    jobs = min(jobs or os.cpu_count() or 1, len(chunks))
    if jobs <= 1:
        for chunk in chunks:
            _add(found, _run_chunk(chunk), progress)
        return found
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for outcomes in pool.imap(_run_chunk, chunks):
            _add(found, outcomes, progress)
    return found


def _add(found: Found, outcomes: list[Outcome], progress: Callable[[Found], None]) -> None:
    found.runs += len(outcomes)
    found.failed += [outcome for outcome in outcomes if not outcome.is_good]
    for outcome in outcomes:
        found.ends.update(outcome.ends)
        found.virtual_s += outcome.virtual_s
    progress(found)


def _run_chunk(seeds: Sequence[int]) -> list[Outcome]:
    outcomes = [run_seed(seed) for seed in seeds]
    for outcome in outcomes:
        outcome.lines = []
    return outcomes


def smaller(seed: int) -> tuple[Plan, Outcome]:
    """The failing plan of a seed with as few faults and requests as still fail, and how that run went."""
    plan = draw(seed)
    best, tries = run_seed(seed), 0
    for name in ("faults", "requests"):
        index = 0
        while index < len(getattr(plan, name)) and tries < TRIES_MAX:
            tries += 1
            less = draw(seed)  # Requests remember how they ended: a new plan, cut to what is left.
            kept = {request.number for request in plan.requests}
            less.requests[:] = [request for request in less.requests if request.number in kept]
            less.faults[:] = plan.faults
            del getattr(less, name)[index]
            outcome = run_seed(seed, less)
            if outcome.is_good:
                index += 1
            else:
                plan, best = less, outcome
    return plan, best


def shortened(outcome: Outcome) -> list[str]:
    """The log up to the first violation, without what happens all the time."""
    lines = [line for line in outcome.lines if not _ROUTINE.search(line)]
    first = next((index for index, line in enumerate(lines) if "INVARIANT" in line), len(lines))
    return lines[max(0, first - LINES_MAX) : first + 3]
