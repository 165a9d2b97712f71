"""A small process that ends vLLM's processes when the front end is gone, also after `kill -9` and also while they start.

It reads its stdin, a pipe of which the front end holds the other end. When that closes, it kills every process whose
environment carries the engine's mark: children get reparented, but the environment they were started with stays. Then it
removes the engine's private folder.
Runs with `python -I -S`: nothing but the standard library.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time

SWEEPS_MAX = 40
SWEEP_S = 0.03


def marked(mark: bytes) -> list[int]:
    """The living processes that were started with `mark` (NAME=value) in their environment, but this one.

    Python's resource tracker is left alone: it ends by itself after the others, and unlinks the shared memory they left.
    """
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                environment = file.read()
            with open(f"/proc/{name}/cmdline", "rb") as file:
                command = file.read()
        except OSError:
            continue  # It has ended, or is not ours.
        if mark in environment.split(b"\0") and b"resource_tracker" not in command:
            found.append(int(name))
    return found


def reap(mark: bytes) -> None:
    """Kill until none is left: one that is killed may have started another just before. A zombie has no environment."""
    for _ in range(SWEEPS_MAX):
        pids = marked(mark)
        if not pids:
            return
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # It was faster.
        time.sleep(SWEEP_S)


def main() -> None:
    # Ctrl-C and the supervisor's SIGTERM are for the front end; this process ends after it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 4096):
        pass
    mark, folder = sys.argv[1:]
    reap(mark.encode())
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
