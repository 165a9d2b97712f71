"""The request machine: every path to an end, and that there is exactly one."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.bus.ids import HandoffToken, RequestId, WorkerId
from hocket.bus.messages import SamplingParams
from hocket.router.blame import Verdict
from hocket.router.generation import Failure, Generation, NoWorker, Overloaded, Rejected
from hocket.router.request import (
    ATTEMPTS_MAX,
    AskDecode,
    Assign,
    CancelAttempts,
    DeleteJob,
    FailStream,
    Forget,
    Instruction,
    NakJob,
    Phase,
    Pick,
    PublishPrefill,
    Rebind,
    Release,
    ReportError,
    ReportStarted,
    RequestMachine,
)

D1, D2, P1, P2 = (WorkerId(name) for name in ("decode-1", "decode-2", "prefill-1", "prefill-2"))
TOKEN = HandoffToken(bytes(16))


def machine() -> RequestMachine:
    return RequestMachine(Generation(RequestId("r"), "m", b"", 0, SamplingParams(), 100.0))


def running_remotely() -> RequestMachine:
    request = machine()
    request.begin()
    request.picked(D1, "remote", "why", TOKEN)
    request.admitted(0)
    request.published(0, 7)
    return request


def kinds(instructions: list[Instruction]) -> list[type[Instruction]]:
    return [type(instruction) for instruction in instructions]


def test_a_remote_request_is_admitted_before_its_job_is_published():
    request = machine()
    assert request.begin() == [Pick(frozenset())]
    assert request.picked(D1, "remote", "why", TOKEN) == [Assign(D1), AskDecode(D1, 0, TOKEN)]
    assert request.admitted(0) == [PublishPrefill(D1, 0, TOKEN)]
    assert request.published(0, 7) == [ReportStarted(D1, "remote", "why")]


def test_a_local_request_needs_no_job():
    request = machine()
    request.begin()
    assert request.picked(D1, "local", "", TOKEN) == [Assign(D1), AskDecode(D1, 0, None)]
    assert request.admitted(0) == [ReportStarted(D1, "local", "")]


def test_a_busy_worker_is_not_asked_again():
    request = machine()
    request.begin()
    request.picked(D1, "remote", "", TOKEN)
    assert request.refused(0, "busy", "", 3.0) == [Release(D1), Pick(frozenset({D1}))]
    assert request.picked(D2, "remote", "", TOKEN) == [Rebind(1), Assign(D2), AskDecode(D2, 1, TOKEN)]


def test_when_all_are_busy_the_client_hears_when_to_come_again():
    request = machine()
    request.begin()
    request.picked(D1, "remote", "", TOKEN)
    request.refused(0, "busy", "", 3.0)
    [report, forget] = request.nothing_to_pick()
    assert isinstance(report, ReportError)
    assert isinstance(report.error, Overloaded)
    assert report.error.retry_after_s == 3.0
    assert forget == Forget()


def test_without_any_worker_the_error_is_no_worker():
    request = machine()
    request.begin()
    report = request.nothing_to_pick()[0]
    assert isinstance(report, ReportError)
    assert isinstance(report.error, NoWorker)


def test_a_request_no_worker_can_serve_is_rejected_at_once():
    request = machine()
    request.begin()
    request.picked(D1, "remote", "", TOKEN)
    _, report, _ = request.refused(0, "too_long", "2,050 of 2,048 tokens", 0.0)
    assert isinstance(report, ReportError)
    assert isinstance(report.error, Rejected)


def test_a_silent_worker_loses_the_request_and_is_told_so():
    request = machine()
    request.begin()
    request.picked(D1, "remote", "", TOKEN)
    assert kinds(request.decode_silent(0)) == [Release, CancelAttempts, Pick]
    assert request.admitted(0) == []  # Its late answer has no effect.


def test_a_dead_prefill_worker_gives_its_job_back_to_the_queue():
    request = running_remotely()
    request.claimed(0, P1, "ack.subject")
    assert request.worker_lost(P1) == [NakJob("ack.subject", 0.0)]
    assert request.worker_lost(P1) == []


def test_without_any_prefill_worker_left_the_decode_worker_computes_the_prompt():
    request = running_remotely()
    assert request.prefill_gone() == [DeleteJob(7), Rebind(1), AskDecode(D1, 1, None)]
    assert request.prefill_gone() == []


def test_a_finished_job_is_not_given_back():
    request = running_remotely()
    request.claimed(0, P1, "ack.subject")
    request.prefill_done(0)
    assert request.worker_lost(P1) == []


def test_a_job_nobody_will_do_is_computed_by_the_decode_worker():
    request = running_remotely()
    assert request.prefill_failed(0) == [Rebind(1), AskDecode(D1, 1, None)]
    assert request.admitted(1) == []  # The client has been answered already.


def test_a_decode_worker_lost_before_the_first_token_is_replaced():
    request = running_remotely()
    assert request.worker_lost(D1) == [
        CancelAttempts(0),
        Release(D1),
        DeleteJob(7),
        Pick(frozenset({D1})),
    ]


def test_a_decode_worker_lost_after_the_first_token_ends_the_stream_with_one_error():
    request = running_remotely()
    request.first_token()
    instructions = request.worker_lost(D1)
    assert kinds(instructions) == [CancelAttempts, Release, DeleteJob, FailStream, CancelAttempts, Forget]
    [failure] = [i.failure for i in instructions if isinstance(i, FailStream)]
    assert failure.code == "decode_worker_lost"
    assert request.failed(failure) == []


def test_a_request_that_loses_worker_after_worker_is_given_up():
    request = machine()
    todo = request.begin()
    for loss in range(ATTEMPTS_MAX):
        assert Pick in kinds(todo)
        worker = WorkerId(f"decode-{loss}")
        request.picked(worker, "local", "", TOKEN)
        request.admitted(loss)
        todo = request.worker_lost(worker)
    assert FailStream in kinds(todo)
    assert request.phase is Phase.ENDED


def test_a_request_that_is_guilty_of_its_workers_death_ends():
    request = running_remotely()
    instructions = request.worker_lost(D1, verdict=Verdict.GUILTY)
    assert kinds(instructions) == [FailStream, CancelAttempts, DeleteJob, Release, Forget]
    [failure] = [i.failure for i in instructions if isinstance(i, FailStream)]
    assert (failure.code, failure.status, failure.is_retryable) == ("quarantined", 422, False)


def test_a_job_whose_request_has_to_go_alone_is_not_given_to_the_next_prefill_worker():
    request = running_remotely()
    request.claimed(0, P1, "ack.subject")
    assert request.worker_lost(P1, verdict=Verdict.ALONE) == [
        CancelAttempts(0),
        Release(D1),
        DeleteJob(7),
        Pick(frozenset()),
    ]


def test_a_prefill_worker_that_was_offered_the_job_may_have_died_of_it():
    request = running_remotely()
    assert request.offered(0, P1)
    assert request.was_on(P1)
    request.returned(0, P1)
    assert not request.was_on(P1)
    request.offered(0, P1)
    request.worker_lost(P1, verdict=Verdict.GUILTY)
    assert not request.offered(0, P2)
    assert not request.was_on(P2)


def test_a_worker_that_was_not_reached_did_not_die_of_the_request():
    request = machine()
    request.begin()
    request.picked(D1, "local", "", TOKEN)
    request.unreached(0, D1)
    assert not request.was_on(D1)


def test_a_worker_that_is_not_reached_any_more_may_have_died_of_an_attempt_before():
    request = running_remotely()
    assert AskDecode in kinds(request.prefill_failed(0))
    request.unreached(1, D1)
    assert request.was_on(D1)


def test_a_dead_prefill_workers_job_is_of_no_use_when_the_decode_worker_went_on_without_it():
    request = running_remotely()
    request.claimed(0, P1, "ack.subject")
    request.first_token()
    assert request.worker_lost(P1) == [DeleteJob(7)]
    assert request.worker_lost(P1) == []


def test_a_client_that_leaves_frees_everything():
    request = running_remotely()
    assert request.abandoned() == [CancelAttempts(0), DeleteJob(7), Release(D1), Forget()]
    assert request.abandoned() == []


def test_an_answer_that_ended_before_its_admission_was_read_is_reported_once():
    request = machine()
    request.begin()
    request.picked(D1, "local", "", TOKEN)
    assert request.ended() == [ReportStarted(D1, "local", ""), Release(D1), Forget()]
    assert request.admitted(0) == []


def test_a_first_token_does_not_wait_for_the_queue_to_confirm_its_job():
    request = machine()
    request.begin()
    request.picked(D1, "remote", "", TOKEN)
    request.admitted(0)
    assert request.first_token() == [ReportStarted(D1, "remote", "")]
    assert request.ended() == [Release(D1), Forget()]
    assert request.published(0, 9) == [DeleteJob(9)]


def test_a_job_that_was_done_although_the_queue_did_not_confirm_it_is_not_done_again():
    request = machine()
    request.begin()
    request.picked(D1, "remote", "", TOKEN)
    request.admitted(0)
    request.first_token()
    assert request.not_published(0, None) == []
    assert request.ended() == [Release(D1), Forget()]


def test_a_job_published_after_the_end_is_deleted():
    request = machine()
    request.begin()
    request.picked(D1, "remote", "", TOKEN)
    request.admitted(0)
    request.abandoned()
    assert request.published(0, 9) == [DeleteJob(9)]


def test_a_full_queue_is_the_clients_answer_and_frees_the_decode_worker():
    request = machine()
    request.begin()
    request.picked(D1, "remote", "", TOKEN)
    request.admitted(0)
    instructions = request.not_published(0, Overloaded("full"))
    assert kinds(instructions) == [CancelAttempts, Release, ReportError, Forget]


EVENTS = st.sampled_from(
    ["pick1", "pick2", "none", "admit", "admit_old", "busy", "silent", "publish", "unpublished", "full", "claim"]
    + ["done", "prefill_failed", "lost1", "lost2", "lost_p", "gone", "token", "ended", "left", "timeout"]
)


def drive(request: RequestMachine, event: str) -> list[Instruction]:
    attempt = request.attempt
    match event:
        case "pick1" | "pick2":
            plan = "remote" if event == "pick1" else "local"
            return request.picked(D1 if event == "pick1" else D2, plan, "", TOKEN)
        case "none":
            return request.nothing_to_pick()
        case "admit" | "admit_old":
            return request.admitted(attempt if event == "admit" else attempt - 1)
        case "busy":
            return request.refused(attempt, "busy", "", 1.0)
        case "silent":
            return request.decode_silent(attempt)
        case "publish":
            return request.published(attempt, 5)
        case "unpublished" | "full":
            return request.not_published(attempt, Overloaded("full") if event == "full" else None)
        case "claim":
            return request.claimed(attempt, P1, "ack")
        case "done":
            return request.prefill_done(attempt)
        case "prefill_failed":
            return request.prefill_failed(attempt)
        case "lost1" | "lost2" | "lost_p":
            return request.worker_lost({"lost1": D1, "lost2": D2, "lost_p": P1}[event])
        case "gone":
            return request.prefill_gone()
        case "token":
            return request.first_token()
        case "ended":
            return request.ended()
        case "left":
            return request.abandoned()
    return request.failed(Failure("timeout", "late", is_retryable=True))


@settings(max_examples=500, deadline=None)
@given(st.lists(EVENTS, max_size=40))
def test_any_order_of_events_ends_at_most_once_and_leaves_no_load_behind(events: list[str]):
    request = machine()
    seen = request.begin()
    for event in events:
        seen += drive(request, event)
    if request.phase is not Phase.ENDED:
        seen += request.abandoned()
    names = kinds(seen)
    assert names.count(Forget) == 1
    assert names.count(ReportStarted) + names.count(ReportError) <= 1
    assert names.count(FailStream) <= 1
    assert not (ReportError in names and FailStream in names)
    attempts = [instruction.attempt for instruction in seen if isinstance(instruction, AskDecode)]
    assert attempts == sorted(set(attempts))  # Every attempt has a number of its own, and they grow.
    load: dict[WorkerId, int] = {}
    for instruction in seen:
        match instruction:
            case Assign(worker=worker):
                load[worker] = load.get(worker, 0) + 1
            case Release(worker=worker):
                load[worker] = max(load.get(worker, 0) - 1, 0)
    assert not any(load.values())
