"""Every Python process that has this folder in its PYTHONPATH writes hocket's log records to $TRACE_FACTS_FILE, a line each.

`<time.perf_counter()> <logger> <message>`: one clock for all processes of a host, finer than what the log has. It reaches
processes that nobody here starts (vLLM's engine core), which is why it is no flag of a worker.
"""

import logging
import os
import time


class _TraceHandler(logging.Handler):
    """Appends; a line is written at once, so that a killed process leaves all of its own."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def emit(self, record: logging.LogRecord) -> None:
        at = time.perf_counter()
        os.write(self._file, f"{at:.7f} {record.name} {record.getMessage()}\n".encode())
        if record.levelno > logging.DEBUG:
            logging.getLogger().handle(record)  # Debug lines go nowhere else: a log costs time, too.


if path := os.environ.get("TRACE_FACTS_FILE"):
    hocket = logging.getLogger("hocket")
    hocket.addHandler(_TraceHandler(path))
    hocket.setLevel(logging.DEBUG)
    hocket.propagate = False
