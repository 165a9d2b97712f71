"""Logging of the `hocket` processes: one line for each record, on stderr. Libraries add no handler; only this does."""

from __future__ import annotations

import logging
import sys

_OWN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_OWN |= {"color_message", "vllm_process_name"}  # uvicorn and vLLM put these into every record of their process.
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), 127)} | {ord("\n"): " | ", ord("\r"): "", ord("\t"): "    "}


class OneLineFormatter(logging.Formatter):
    """`12:30:01.250 INFO    hocket.router.main listening on ... request_id=...`; a traceback stays on its record's line.

    Control characters are escaped: nothing a client sends can forge a record or reach the terminal.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        extras = "".join(f" {key}={value}" for key, value in vars(record).items() if key not in _OWN)
        return (super().format(record) + extras).translate(_ESCAPES)


def set_up_logging(level: str) -> None:
    """Called once, by the process's `main`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLineFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
