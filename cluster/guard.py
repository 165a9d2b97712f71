"""A small process that outlives `hocket serve` by a few seconds and ends whatever it left: also after `kill -9`.

`serve` starts each child in a session of its own and tells the guard through a pipe. When the pipe closes, `serve` has
gone, however it ended: the guard sends SIGTERM to every session it still knows and SIGKILL to what is left after that.
PR_SET_PDEATHSIG would not do: it reaches only the direct child, and an engine's own processes outlive a worker that was
killed (vLLM's EngineCore and its workers keep gigabytes). A session holds all of them.

It runs with `python -I -S`, so it imports nothing but the standard library. Lines: `+ PID`, `- PID`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable

POLL_S = 0.05


def members(leaders: Iterable[int]) -> set[int]:
    """Every living process of these leaders' sessions, and the descendants of those that left the session."""
    wanted = set(leaders)
    parents: dict[int, int] = {}
    found: set[int] = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file:
                state, parent, _, session = file.read().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):  # It ended meanwhile.
            continue
        if state in "ZX":
            continue
        parents[int(entry)] = int(parent)
        if int(session) in wanted:
            found.add(int(entry))
    grew = True
    while grew:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        found |= more
        grew = bool(more)
    return found


def signal_all(pids: Iterable[int], number: int) -> None:
    """Send a signal to each process that still exists."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def end_sessions(leaders: set[int], grace_s: float) -> None:
    """SIGTERM to the leaders (they know how to stop what they started), after `grace_s` SIGKILL to all that is left."""
    signal_all(leaders & members(leaders), signal.SIGTERM)
    end_s = time.monotonic() + grace_s
    while time.monotonic() < end_s and members(leaders):
        time.sleep(POLL_S)
    for _ in range(2):  # A second look: a process may start another one between the look and the signal.
        signal_all(members(leaders), signal.SIGKILL)


def main() -> None:
    """Usage: guard.py GRACE_S (reads stdin)"""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # It ends by the end of its pipe and by nothing else.
    leaders: set[int] = set()
    for line in sys.stdin:
        sign, _, pid = line.partition(" ")
        if sign == "+":
            leaders.add(int(pid))
        else:
            leaders.discard(int(pid))
    end_sessions(leaders, float(sys.argv[1]))


if __name__ == "__main__":
    main()
