"""What a step log says, and of which step."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from hocket.workers.engines.base import EngineError
from hocket.workers.engines.step_log import LINES_MAX, LoggedStep, StepLog, step_of


class Clock:
    """Shows what it is set to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def lines(path: Path) -> list[LoggedStep]:
    return [msgspec.json.decode(line, type=LoggedStep) for line in path.read_bytes().splitlines()]


def test_a_step_is_counted_by_what_it_attends_to():
    step = step_of([(0, 4), (10, 2), (99, 1), (0, 1)])
    assert (step.requests, step.prefill_tokens, step.decode_requests, step.decode_kv_tokens) == (4, 7, 1, 100)
    assert step.prefill_pairs == (1 + 2 + 3 + 4) + (11 + 12) + 1


def test_a_step_that_began_before_the_one_before_had_ended_counts_from_that_end(tmp_path: Path):
    clock, path = Clock(), tmp_path / "steps.jsonl"
    log = StepLog(str(path), clock)
    for now, call in (
        (100.0, lambda: log.begin(step_of([(0, 5)]))),
        (100.5, lambda: log.begin(step_of([(5, 1)]))),
        (101.0, log.end),
        (103.0, log.end),
        (110.0, lambda: log.begin(step_of([(6, 1)]))),  # Idle before.
        (110.25, log.end),
    ):
        clock.now = now
        call()
    log.close()
    assert [step.seconds for step in lines(path)] == [1.0, 2.0, 0.25]
    assert [step.prefill_tokens for step in lines(path)] == [5, 0, 0]


def test_steps_without_requests_are_not_written_and_keep_their_place(tmp_path: Path):
    clock, path = Clock(), tmp_path / "steps.jsonl"
    log = StepLog(str(path), clock)
    for parts in ([], [(0, 5)], []):
        log.begin(step_of(parts))
        clock.now += 1.0
        log.end()
    log.end()  # Of a step that nobody began.
    log.close()
    assert [(step.requests, step.seconds) for step in lines(path)] == [(1, 1.0)]


def test_engines_that_share_a_file_append_whole_lines(tmp_path: Path):
    clock, path = Clock(), tmp_path / "steps.jsonl"
    logs = [StepLog(str(path), clock) for _ in range(2)]
    for _ in range(LINES_MAX + 10):
        for log in logs:
            log.begin(step_of([(7, 1)]))
        clock.now += 0.001
        for log in logs:
            log.end()
    for log in logs:
        log.close()
    assert len(lines(path)) == 2 * (LINES_MAX + 10)


def test_a_file_that_cannot_be_opened_is_an_engine_error(tmp_path: Path):
    with pytest.raises(EngineError, match="step_log .*: No such file"):
        StepLog.at(str(tmp_path / "missing" / "steps.jsonl"))
