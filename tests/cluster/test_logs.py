"""One line for each record, whatever is in it."""

from __future__ import annotations

import logging
import re
import sys

from hocket.cluster.logs import OneLineFormatter


def formatted(message: str, *arguments: object, **extra: object) -> str:
    record = logging.makeLogRecord(
        {"name": "hocket.x", "levelname": "INFO", "msg": message, "args": arguments, **extra}
    )
    return OneLineFormatter().format(record)


def test_a_record_is_time_level_logger_message_and_extras():
    line = formatted("started %s", "it", request_id="r1", vllm_process_name="EngineCore")
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} INFO    hocket\.x started it request_id=r1", line)


def test_a_record_cannot_forge_another_or_reach_the_terminal():
    line = formatted("%s", "a\n12:00:00.000 ERROR hocket.x forged\r\x1b[31m\x00")
    assert "\n" not in line
    assert line.endswith("a | 12:00:00.000 ERROR hocket.x forged\\x1b[31m\\x00")


def test_a_traceback_stays_on_its_records_line():
    try:
        raise ValueError("no")
    except ValueError:
        line = formatted("failed", exc_info=sys.exc_info())
    assert "\n" not in line
    assert line.endswith("ValueError: no")
