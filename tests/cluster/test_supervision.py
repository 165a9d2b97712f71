"""What the supervisor decides, without a process: all rules on a clock of the test's own."""

from __future__ import annotations

import pytest

from hocket.cluster.supervision import (
    AllReady,
    ChildSpec,
    Ended,
    Kill,
    Limits,
    Restarting,
    Start,
    Supervision,
    Terminate,
)

LIMITS = Limits(start_timeout_s=30.0, stop_s=(5.0, 2.0))
CHILDREN = (ChildSpec("router", 1), ChildSpec("prefill-0", 0), ChildSpec("decode-0", 0))


def complete(limits: Limits = LIMITS) -> Supervision:
    supervision = Supervision(CHILDREN, limits)
    supervision.start(0.0)
    for child in CHILDREN:
        last = supervision.ready(child.name, 1.0)
    assert last == [AllReady()]
    return supervision


def test_everything_starts_at_once_and_the_last_ready_child_completes_the_cluster():
    supervision = Supervision(CHILDREN, LIMITS)
    assert supervision.start(0.0) == [Start("router"), Start("prefill-0"), Start("decode-0")]
    assert supervision.ready("router", 1.0) == []
    assert supervision.ready("decode-0", 1.0) == []
    assert supervision.waiting_for == ["prefill-0"]
    assert supervision.ready("prefill-0", 2.0) == [AllReady()]
    assert supervision.deadline() == float("inf")


def test_a_child_that_ends_while_starting_fails_the_start_with_its_name_and_exit_code():
    supervision = Supervision(CHILDREN, LIMITS)
    supervision.start(0.0)
    assert supervision.exited("prefill-0", 2, 1.0) == [Terminate("decode-0")]
    assert supervision.exited("decode-0", 0, 1.5) == [Terminate("router")]
    assert supervision.exited("router", 0, 1.6) == [Ended(1, "prefill-0 ended while starting (exit 2)", "prefill-0")]


def test_a_child_that_is_never_ready_is_killed_and_fails_the_start():
    supervision = Supervision(CHILDREN, LIMITS)
    supervision.start(0.0)
    supervision.ready("router", 1.0)
    supervision.ready("decode-0", 1.0)
    assert supervision.deadline() == 30.0
    assert supervision.tick(29.9) == []
    assert supervision.tick(30.0) == [Kill("prefill-0")]
    assert supervision.exited("prefill-0", -9, 30.1) == [Terminate("decode-0")]
    supervision.exited("decode-0", 0, 31.0)
    assert supervision.exited("router", 0, 31.0) == [Ended(1, "prefill-0 was not ready after 30 s", "prefill-0")]


def test_a_child_that_dies_later_is_started_again_with_growing_back_off():
    supervision, now = complete(), 10.0
    for after_s in (0.5, 1.0, 2.0):
        assert supervision.exited("decode-0", -9, now) == [Restarting("decode-0", -9, after_s)]
        assert supervision.deadline() == now + after_s
        now += after_s
        assert supervision.tick(now) == [Start("decode-0")]
        assert supervision.ready("decode-0", now) == []


def test_back_off_starts_anew_after_a_quiet_minute():
    supervision = complete()
    supervision.exited("decode-0", -9, 10.0)
    supervision.tick(11.0)
    supervision.ready("decode-0", 12.0)
    assert supervision.exited("decode-0", -9, 75.0) == [Restarting("decode-0", -9, 0.5)]


def test_the_sixth_death_in_a_minute_fails_the_cluster():
    supervision, now = complete(), 10.0
    for _ in range(5):
        assert isinstance(supervision.exited("decode-0", 1, now)[0], Restarting)
        now = supervision.deadline()
        supervision.tick(now)
    assert supervision.exited("decode-0", 1, now) == [Terminate("prefill-0")]
    supervision.exited("prefill-0", 0, now)
    ended = supervision.exited("router", 0, now)
    assert ended == [Ended(1, "decode-0 died 6 times in 60 s (last: exit 1)", "decode-0")]


def test_a_restarted_child_that_hangs_is_killed_and_counts_as_a_death():
    supervision = complete()
    supervision.exited("decode-0", -9, 10.0)
    supervision.tick(10.5)
    assert supervision.tick(40.5) == [Kill("decode-0")]
    assert supervision.exited("decode-0", -9, 40.6) == [Restarting("decode-0", -9, 1.0)]


def test_stopping_goes_workers_then_router():
    supervision = complete()
    assert supervision.stop(5.0) == [Terminate("prefill-0"), Terminate("decode-0")]
    assert supervision.exited("prefill-0", 0, 5.5) == []
    assert supervision.exited("decode-0", 0, 6.0) == [Terminate("router")]
    assert supervision.exited("router", 0, 6.1) == [Ended(0, "", "")]


def test_a_child_that_ignores_sigterm_is_killed_when_its_time_is_over():
    supervision = complete()
    supervision.stop(5.0)
    supervision.exited("prefill-0", 0, 5.1)
    assert supervision.tick(10.0) == [Kill("decode-0")]
    assert supervision.exited("decode-0", -9, 10.1) == [Terminate("router")]
    assert supervision.tick(12.1) == [Kill("router")]
    assert supervision.exited("router", -9, 12.2) == [Ended(0, "", "")]


def test_a_second_stop_kills_everything_at_once():
    supervision = complete()
    supervision.stop(5.0)
    assert supervision.stop(5.2) == [Kill("router"), Kill("prefill-0"), Kill("decode-0")]
    supervision.exited("prefill-0", -9, 5.3)
    supervision.exited("router", -9, 5.3)
    assert supervision.exited("decode-0", -9, 5.3) == [Ended(0, "", "")]


def test_stopping_while_a_child_waits_for_its_restart_does_not_start_it():
    supervision = complete()
    supervision.exited("decode-0", -9, 5.0)
    assert supervision.stop(5.1) == [Terminate("prefill-0")]
    assert supervision.tick(6.0) == []
    supervision.exited("prefill-0", 0, 6.0)
    assert supervision.exited("router", 0, 6.0) == [Ended(0, "", "")]


def test_stopping_during_the_start_ends_with_exit_0():
    supervision = Supervision(CHILDREN, LIMITS)
    supervision.start(0.0)
    assert supervision.stop(1.0) == [Terminate("prefill-0"), Terminate("decode-0")]
    assert supervision.ready("decode-0", 1.1) == []
    supervision.exited("decode-0", 0, 1.2)
    supervision.exited("prefill-0", -15, 1.2)
    assert supervision.exited("router", -15, 1.3) == [Ended(0, "", "")]


@pytest.mark.parametrize("order", [("router", "prefill-0", "decode-0"), ("decode-0", "router", "prefill-0")])
def test_children_that_die_while_stopping_are_only_counted_off(order: tuple[str, ...]):
    supervision = complete()
    supervision.stop(5.0)
    ended = [instruction for name in order for instruction in supervision.exited(name, 1, 6.0)]
    assert ended[-1] == Ended(0, "", "")
    assert not any(isinstance(instruction, Start | Restarting) for instruction in ended)
