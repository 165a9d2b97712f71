"""What a worker decides: admission, the fate of prefill jobs, the ledger of its prefix cache. No I/O, no clock."""

from __future__ import annotations

import array
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.bus.ids import HandoffToken, RequestId, RouterId, WorkerId
from hocket.bus.messages import (
    Admitted,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    DecodeJob,
    PrefillJob,
    Refused,
    SamplingParams,
    WorkerCard,
    pack_tokens,
)
from hocket.workers.admission import Admission
from hocket.workers.attempts import RecentAttempts
from hocket.workers.engines.base import BadTask, HandoffFailed
from hocket.workers.kv_ledger import KvLedger
from hocket.workers.prefill_intake import AckAgain, Discard, GiveBack, Join, Leave, PrefillIntake, Take
from hocket.workers.router_clocks import ROUTERS_MAX, RouterClocks
from hocket.workers.throughput import Throughput

CARD = WorkerCard(
    worker_id=WorkerId("decode-1"),
    role="decode",
    epoch=9,
    model="m",
    fingerprint="f",
    block_tokens=16,
    kv_blocks=100,
    slots=2,
    max_model_len=64,
)


def decode_job(request_id: str = "r", attempt: int = 1) -> DecodeJob:
    return DecodeJob(
        request_id=RequestId(request_id),
        attempt=attempt,
        router_id=RouterId("router-1"),
        stream_id=1,
        token_ids=pack_tokens([1, 2, 3]),
        sampling=SamplingParams(),
        model="m",
        time_left_s=10.0,
    )


def prefill_job(request_id: str = "r", attempt: int = 1, **changes: object) -> PrefillJob:
    job = PrefillJob(
        request_id=RequestId(request_id),
        attempt=attempt,
        router_id=RouterId("router-1"),
        token_ids=pack_tokens([1, 2, 3]),
        model="m",
        handoff_token=HandoffToken(b"t" * 16),
        decode_worker=WorkerId("decode-1"),
        decode_epoch=9,
        decode_addresses=("tcp://127.0.0.1:1",),
        fingerprint="f",
        deadline_unix_s=100.0,
    )
    return msgspec.structs.replace(job, **changes)


# Admission.


def test_a_slot_is_free_again_when_its_request_has_ended():
    admission = Admission(CARD, held_max=1)
    assert admission.offer(decode_job("a")).is_new
    answer = admission.offer(decode_job("b")).answer
    assert isinstance(answer, Refused)
    assert answer.reason == "busy"
    admission.ended("a", 1)
    assert admission.offer(decode_job("b")).is_new


def test_a_newer_attempt_takes_the_place_of_the_older_one_also_on_a_full_worker():
    admission = Admission(CARD, held_max=1)
    admission.offer(decode_job("a", 1))
    decision = admission.offer(decode_job("a", 3))
    assert (decision.is_new, decision.replaces) == (True, 1)
    admission.ended("a", 1)
    assert admission.held == 1
    answer = admission.offer(decode_job("a", 2)).answer
    assert isinstance(answer, Refused)
    assert answer.reason == "stale"


def test_a_cancel_of_an_older_attempt_leaves_the_newer_one():
    admission = Admission(CARD, held_max=1)
    admission.offer(decode_job("a", 2))
    assert admission.cancel("a", 1) is None
    assert admission.cancel("a", 2) == 2


def test_a_draining_worker_still_answers_for_what_it_has_admitted():
    admission = Admission(CARD, held_max=1)
    admission.offer(decode_job("a"))
    admission.is_draining = True
    assert admission.offer(decode_job("a")).answer == Admitted(RequestId("a"), 1)
    answer = admission.offer(decode_job("b")).answer
    assert isinstance(answer, Refused)
    assert answer.reason == "draining"


steps = st.lists(
    st.tuples(st.sampled_from(["offer", "cancel", "end"]), st.sampled_from("abc"), st.integers(0, 3)), max_size=40
)


@settings(max_examples=200, deadline=None)
@given(steps)
def test_no_attempt_runs_twice_or_after_a_newer_one_or_after_its_cancel(moves: list[tuple[str, str, int]]):
    admission = Admission(CARD, held_max=2)
    started: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    cancelled = {"a": -1, "b": -1, "c": -1}
    for move, request_id, attempt in moves:
        if move == "offer":
            if admission.offer(decode_job(request_id, attempt)).is_new:
                assert attempt > max(started[request_id], default=-1)
                assert attempt > cancelled[request_id]
                started[request_id].append(attempt)
        elif move == "cancel":
            stopped = admission.cancel(request_id, attempt)
            cancelled[request_id] = max(cancelled[request_id], attempt)
            assert stopped is None or stopped == started[request_id][-1]
        elif started[request_id]:
            admission.ended(request_id, started[request_id][-1])
        assert admission.held <= 2


def test_attempts_are_remembered_up_to_a_bound():
    recent = RecentAttempts(requests_max=2)
    recent.note("a", 5)
    recent.note("a", 3)
    assert recent.covers("a", 5)
    assert not recent.covers("a", 6)
    recent.note("b", 1)
    recent.note("c", 1)
    assert recent.get("a") is None
    assert recent.covers("b", 0)


# Prefill jobs.


def test_the_way_of_a_job_and_of_its_second_delivery():
    intake = PrefillIntake(CARD)
    assert intake.offer(prefill_job(), 1, 50.0) == Take()
    assert intake.offer(prefill_job(), 2, 50.0) == Join()
    assert intake.offer(prefill_job(attempt=2), 1, 50.0) == Take()
    intake.ended(prefill_job(), is_done=False)
    assert intake.offer(prefill_job(), 3, 50.0) == Take()
    intake.ended(prefill_job(), is_done=True)
    assert intake.offer(prefill_job(), 4, 50.0) == AckAgain()


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"token_ids": b""}, Discard),
        ({"token_ids": b"12345"}, Discard),
        ({"fingerprint": "g"}, GiveBack),
        ({"model": "n"}, GiveBack),
    ],
)
def test_what_is_not_taken(changes: dict[str, object], kind: type):
    intake = PrefillIntake(CARD)
    assert isinstance(intake.offer(prefill_job(**changes), 1, 50.0), kind)
    assert intake.running == 0


def test_a_job_whose_deadline_has_passed_is_dropped():
    assert PrefillIntake(CARD).offer(prefill_job(), 1, 0.0) == Discard("its deadline has passed", "expired")


def test_a_cancelled_job_is_not_taken_and_a_running_one_is_named():
    intake = PrefillIntake(CARD)
    intake.offer(prefill_job("a", 2), 1, 50.0)
    assert intake.cancel("a", 1) == []
    assert intake.cancel("a", 2) == [("a", 2)]
    assert intake.offer(prefill_job("a", 1), 1, 50.0) == Discard("cancelled")
    assert intake.offer(prefill_job("a", 3), 1, 50.0) == Take()


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (HandoffFailed("refused:stale_attempt"), Leave, ""),
        (HandoffFailed("refused:spent_token"), Discard, "refused"),
        (HandoffFailed("refused:unknown_token"), GiveBack, ""),
        (HandoffFailed("cancelled"), Discard, ""),
        (HandoffFailed("link_lost"), GiveBack, ""),
        (HandoffFailed("timeout"), GiveBack, ""),
        (BadTask("too long"), Discard, "bad_job"),
    ],
)
def test_what_becomes_of_a_job_that_failed(error: HandoffFailed | BadTask, kind: type, reason: str):
    verdict = PrefillIntake(CARD).failed(prefill_job(), error, 50.0)
    assert isinstance(verdict, kind)
    assert getattr(verdict, "reason", "") == reason
    late = PrefillIntake(CARD).failed(prefill_job(), error, 0.0)
    assert isinstance(late, Discard)
    assert late.reason == ("bad_job" if isinstance(error, BadTask) else "expired")


# Ledger and throughput.


def test_the_snapshot_is_what_the_events_leave():
    ledger = KvLedger(WorkerId("w"), 1)
    assert ledger.apply([BlockStored([1, 2, 3])]).seq == 1
    assert ledger.apply([BlockRemoved([2]), BlockStored([4], parent=3)]).seq == 2
    snapshot = ledger.snapshot()
    assert (snapshot.seq, snapshot.is_complete) == (2, True)
    assert array.array("Q", snapshot.hashes).tolist() == [1, 3, 4]
    assert not ledger.snapshot(hashes_max=2).is_complete
    ledger.apply([AllBlocksCleared()])
    assert ledger.snapshot().hashes == b""


def test_throughput_counts_busy_time_only():
    throughput = Throughput()
    assert throughput.tokens_per_s == 0.0
    throughput.begin(0.0)
    throughput.begin(0.5)
    throughput.end(1.0, 100)
    throughput.end(2.0, 100)
    assert 90 < throughput.tokens_per_s < 110
    throughput.begin(100.0)
    throughput.end(101.0, 100)
    assert 90 < throughput.tokens_per_s < 110


def test_work_that_failed_says_nothing_of_the_speed():
    throughput = Throughput()
    throughput.begin(0.0)
    throughput.end(30.0, None)  # A decode worker that did not answer.
    assert throughput.tokens_per_s == 0.0
    throughput.begin(40.0)
    throughput.begin(40.0)
    throughput.end(40.5, None)
    throughput.end(41.0, 200)
    assert throughput.tokens_per_s == pytest.approx(200.0, rel=0.05)


def test_a_few_tokens_say_nothing_of_the_speed():
    throughput = Throughput()
    for second in range(100):  # Prompts that are cached but for one token.
        throughput.begin(float(second))
        throughput.end(second + 0.25, 1)
        assert throughput.tokens_per_s == 0.0
    throughput.begin(100.0)
    throughput.end(101.0, 10_000)
    assert throughput.tokens_per_s > 500.0


# Clocks.


def job_sent(sent_s: float, time_left_s: float = 10.0) -> PrefillJob:
    return prefill_job(sent_s=sent_s, time_left_s=time_left_s)


def test_a_deadline_means_the_same_on_clocks_that_are_hours_apart():
    clocks = RouterClocks()
    for tick in range(20):
        clocks.heard(RouterId("router-1"), 5000.0 + tick / 2, 91_400.0 + tick / 2 + (0.2, 0.01, 0.7)[tick % 3])
    assert clocks.deadline_s(job_sent(5010.0), 91_412.0) == pytest.approx(91_420.01)


def test_without_a_word_of_its_router_a_job_has_its_time_from_when_it_came():
    clocks = RouterClocks()
    clocks.heard(RouterId("router-2"), 5000.0, 70.0)
    clocks.heard(RouterId("router-1"), 0.0, 70.0)  # One that tells no time.
    assert clocks.deadline_s(job_sent(5010.0), 80.0) == 90.0
    assert clocks.deadline_s(prefill_job(), 80.0) == math.inf


def test_what_was_heard_late_makes_no_deadline_earlier_nor_later_than_from_now():
    clocks = RouterClocks()
    clocks.heard(RouterId("router-1"), 5000.0, 500.0)  # 100 s late.
    assert clocks.deadline_s(job_sent(5000.0), 401.0) == 411.0
    clocks.heard(RouterId("router-1"), 5100.0, 500.0)
    assert clocks.deadline_s(job_sent(5000.0), 401.0) == 410.0


def test_a_host_that_was_suspended_has_another_distance_soon():
    clocks = RouterClocks()
    for tick in range(10):
        clocks.heard(RouterId("router-1"), 5000.0 + tick, 1000.0 + tick)
    for tick in range(10):  # Its clock stood still for an hour.
        clocks.heard(RouterId("router-1"), 5010.0 + tick, 4610.0 + tick)
    assert clocks.deadline_s(job_sent(5020.0), 4620.0) == 4630.0


def test_clocks_of_routers_that_are_gone_are_forgotten():
    clocks = RouterClocks()
    clocks.heard(RouterId("router-1"), 5000.0, 500.0)
    for number in range(ROUTERS_MAX):
        clocks.heard(RouterId(f"other-{number}"), 1.0, 2.0)
    assert clocks.deadline_s(job_sent(4999.0), 500.0) == 510.0
