"""What every benchmark here needs: exact CPU clocks of other processes, percentiles, a progress bar, a table, a JSON file."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

Cell = str | int | float | None
Row = dict[str, Cell]


def cpu_s(pid: int) -> float:
    """CPU time of a whole process in seconds, exact to the nanosecond.

    The clock id is that of clock_getcpuclockid(3). /proc counts ticks of 10 ms: too coarse for a window of two seconds.
    """
    return time.clock_gettime((~pid << 3) | 2)


def rss_mib(pid: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def process_tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            child = int(folder.name)
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(child)
    tree = [pid]
    for one in tree:  # It grows meanwhile.
        tree += children.get(one, [])
    return tree


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which `share` of the values lie (nearest rank); None when there is none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else None


def median_row(rows: Sequence[Row]) -> Row:
    """The median of each column over windows of the same kind; what is not a number is taken from the first one."""
    merged: Row = {}
    for name, first in rows[0].items():
        numbers = sorted(value for row in rows if isinstance(value := row.get(name), (int, float)))
        merged[name] = numbers[len(numbers) // 2] if isinstance(first, (int, float)) and numbers else first
    return merged


def machine() -> str:
    """The machine in one line, without a name that says whose it is."""
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    cores = os.cpu_count()
    return f"{cores} cores {platform.machine()}, {memory_gib:.0f} GiB, {platform.system()} {platform.release()}"


def versions(*packages: str) -> str:
    """Python's and the packages' versions in one line."""
    found = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


class Progress:
    """A bar on stderr; silent when stderr is not a terminal."""

    WIDTH = 30

    def __init__(self, steps: int) -> None:
        self._steps = max(steps, 1)
        self._done = 0

    def step(self, what: str) -> None:
        """`what` begins; the one before it is done."""
        self._show(what)
        self._done += 1

    def end(self) -> None:
        """Take the bar away."""
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _show(self, what: str) -> None:
        if sys.stderr.isatty():
            filled = self.WIDTH * min(self._done, self._steps) // self._steps
            bar = "#" * filled + "." * (self.WIDTH - filled)
            print(f"\r\x1b[K[{bar}] {what}", end="", file=sys.stderr, flush=True)


def print_table(title: str, columns: dict[str, str], rows: Sequence[Row]) -> None:
    """`columns` is key -> heading with its unit; a value that is missing shows as '-'."""
    lines = [list(columns.values())] + [[_text(row.get(key)) for key in columns] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    print(f"\n{title}")
    for line in lines:
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(line, widths, strict=True))))  # fmt: skip


def _text(value: Cell) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def write_json(path: Path | None, rows: Sequence[Row]) -> None:
    """A list of rows, one object each."""
    if path is not None:
        path.write_text(json.dumps(rows, indent=1) + "\n")
