"""`hocket lab diff` and `hocket lab chaos`: flags and output. What a command needs is imported when it runs."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from .search import Found

Parser = TypeVar("Parser", bound=argparse.ArgumentParser)


def add_chaos_commands(actions: argparse._SubParsersAction[Parser]) -> None:
    """Add them to the commands of `hocket lab`."""
    diff = _command(actions, "diff", "show where two event logs first differ (exit status 1 when they do)", _diff)
    diff.add_argument("first", metavar="A", type=Path, help="an event log")
    diff.add_argument("second", metavar="B", type=Path, help="another event log")
    diff.add_argument("--context", metavar="LINES", type=int, default=5, help="equal lines shown before (default: 5)")

    summary = "search for faults that a pool does not survive (exit status 1 when there are some)"
    chaos = _command(actions, "chaos", summary, _chaos)
    chaos.add_argument(
        "--seeds", metavar="A..B", type=seeds, default=range(1000), help="a seed, or A up to B-1 (default: 0..1000)"
    )
    chaos.add_argument("--jobs", metavar="N", type=int, default=0, help="runs at once (default: one a core)")
    chaos.add_argument(
        "--log", metavar="FILE", default="", help="write the event log of the first seed there and run no other"
    )


def _command(
    actions: argparse._SubParsersAction[Parser], name: str, summary: str, act: Callable[[argparse.Namespace], int]
) -> Parser:
    parser = actions.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(run=act)
    return parser


def seeds(text: str) -> range:
    """`7` or `0..1000`. Raises ValueError."""
    first, dots, end = text.partition("..")
    found = range(int(first), int(end) if dots else int(first) + 1)
    if not found or found.start < 0:
        raise ValueError
    return found


def _diff(options: argparse.Namespace) -> int:
    from .log import first_difference

    try:
        first, second = (path.read_text().splitlines() for path in (options.first, options.second))
    except OSError as error:
        print(f"hocket lab diff: {error}", file=sys.stderr)
        return 2
    difference = first_difference(first, second, context=options.context)
    print(difference or "equal")
    return 1 if difference else 0


def _chaos(options: argparse.Namespace) -> int:
    from .chaos import draw, run_seed
    from .search import search, shortened, smaller

    if options.log:
        outcome = run_seed(options.seeds[0])
        Path(options.log).write_text("\n".join([*outcome.lines, ""]))
        print("\n".join([str(draw(outcome.seed).shape), *outcome.violations, f"{len(outcome.lines)} lines"]))
        return 0 if outcome.is_good else 1
    started_s = time.perf_counter()
    found = search(options.seeds, jobs=options.jobs, progress=_Progress(len(options.seeds)))
    wall_s = time.perf_counter() - started_s
    ends = ", ".join(f"{count} {how}" for how, count in found.ends.most_common())
    print(f"{found.runs} runs, {found.virtual_s / 3600:.1f} virtual hours in {wall_s:.0f} s; requests: {ends}")
    for outcome in found.failed[:3]:
        plan, small = smaller(outcome.seed)
        print(f"\nseed {outcome.seed}: {outcome.violations[0]}\n{plan.shape}")
        print(f"with these {len(plan.requests)} requests and faults alone:", *map(str, plan.faults), sep="\n  ")
        print(*shortened(small), sep="\n")
    if found.failed:
        print(f"\n{len(found.failed)} of {found.runs} runs failed: seeds {[outcome.seed for outcome in found.failed]}")
        print(f"replay with: hocket lab chaos --seeds {found.failed[0].seed} --log FILE")
    return 1 if found.failed else 0


class _Progress:
    """One line on a terminal."""

    def __init__(self, total: int) -> None:
        self._total = total

    def __call__(self, found: Found) -> None:
        if sys.stderr.isatty():
            end = "\n" if found.runs == self._total else ""
            share = found.runs / self._total
            text = f"{found.runs:,} of {self._total:,} runs, {len(found.failed)} failed"
            print(f"\r[{'#' * round(40 * share):<40}] {text}", end=end, file=sys.stderr, flush=True)
