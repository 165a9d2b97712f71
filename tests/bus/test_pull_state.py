"""The open pull alone: when to ask again, told the time."""

from __future__ import annotations

import pytest

from hocket.bus.jobs_pull import (
    BACKOFF_S,
    HEARTBEAT_S,
    PULL_EXPIRES_S,
    SILENCE_S,
    OpenPull,
    consumer_name,
    nak_payload,
)


def asked(now: float = 100.0) -> OpenPull:
    pull = OpenPull()
    assert pull.wait_s(now) == 0.0
    pull.sent(now)
    return pull


def test_nothing_is_asked_while_the_server_is_heard() -> None:
    pull = asked()
    now = 100.0
    while now < 100.0 + PULL_EXPIRES_S - HEARTBEAT_S:
        assert pull.wait_s(now) > 0
        now += HEARTBEAT_S
        pull.on_status("100", b"", now)
    assert pull.is_open


def test_a_silent_server_is_asked_again_after_two_missed_heartbeats() -> None:
    pull = asked()
    assert pull.wait_s(100.0) == SILENCE_S
    assert pull.wait_s(100.0 + SILENCE_S) == 0.0
    assert not pull.is_open


def test_a_request_past_its_time_is_asked_again_though_the_server_is_heard() -> None:
    pull = asked()
    pull.on_status("100", b"", 100.0 + PULL_EXPIRES_S)
    assert pull.wait_s(100.0 + PULL_EXPIRES_S + 1.0) == 0.0


@pytest.mark.parametrize("status", ["404", "408"])
def test_an_expired_request_is_asked_again_at_once(status: str) -> None:
    pull = asked()
    pull.on_status(status, b"", 110.0)
    assert pull.wait_s(110.0) == 0.0
    assert not pull.is_consumer_in_doubt


@pytest.mark.parametrize(
    ("status", "description", "is_in_doubt"),
    [
        ("503", b"", True),
        ("409", b"NATS/1.0 409 Consumer Deleted\r\n\r\n", True),
        ("409", b"NATS/1.0 409 Leadership Change\r\n\r\n", False),
        ("409", b"NATS/1.0 409 Server Shutdown\r\n\r\n", False),
        ("409", b"NATS/1.0 409 Exceeded MaxWaiting\r\n\r\n", False),
    ],
)
def test_a_refused_request_is_asked_again_after_a_while(status: str, description: bytes, *, is_in_doubt: bool) -> None:
    pull = asked()
    pull.on_status(status, description, 110.0)
    assert pull.wait_s(110.0) == BACKOFF_S
    assert pull.wait_s(110.0 + BACKOFF_S) == 0.0
    assert pull.is_consumer_in_doubt == is_in_doubt


def test_a_job_and_a_disconnect_end_the_request() -> None:
    for end in (OpenPull.on_job, OpenPull.on_disconnected):
        pull = asked()
        end(pull)
        assert pull.wait_s(100.0) == 0.0


def test_a_nak_says_its_delay_in_nanoseconds() -> None:
    assert nak_payload(0) == b"-NAK"
    assert nak_payload(1.5) == b'-NAK {"delay": 1500000000}'


def test_lanes_that_read_alike_have_consumers_of_their_own() -> None:
    names = {
        consumer_name(subject) for subject in ("hk.a_b.prefill.c.any", "hk.a.b_prefill.c.any", "hk.a.b.prefill.c_any")
    }
    assert len(names) == 3
    assert all(not set(name) & set(".*> ") for name in names)
