"""`hocket lab diff` and `hocket lab chaos`: flags and output. What a command needs is imported when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeVar

Parser = TypeVar("Parser", bound=argparse.ArgumentParser)


def add_chaos_commands(actions: argparse._SubParsersAction[Parser]) -> None:
    """Add them to the commands of `hocket lab`."""
    summary = "show where two event logs first differ (exit status 1 when they do)"
    diff = actions.add_parser("diff", help=summary, description=summary[0].upper() + summary[1:] + ".")
    diff.add_argument("first", metavar="A", type=Path, help="an event log")
    diff.add_argument("second", metavar="B", type=Path, help="another event log")
    diff.add_argument("--context", metavar="LINES", type=int, default=5, help="equal lines shown before (default: 5)")
    diff.set_defaults(run=_diff)


def _diff(options: argparse.Namespace) -> int:
    from .log import first_difference

    first, second = (path.read_text().splitlines() for path in (options.first, options.second))
    difference = first_difference(first, second, context=options.context)
    print(difference or "equal")
    return 1 if difference else 0
