"""How a worker is told to stop: SIGTERM or SIGINT once to finish what runs, twice to leave at once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """`asked` ends the service, `hurried` also the time that running requests are given."""

    def __init__(self, asked: asyncio.Event | None = None) -> None:
        self.asked = asked or asyncio.Event()
        self.hurried = asyncio.Event()

    def on_signal(self) -> None:
        if self.asked.is_set():
            self.hurried.set()
        self.asked.set()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Listen to the process's signals; from the main thread only."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.on_signal)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)
