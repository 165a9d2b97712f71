"""One request's life as a synchronous state machine: events in (method calls), instructions out, no I/O.

    PICKING -> ADMITTING -> RUNNING -> ENDED
       ^___________|___________|           a worker refuses, is silent or dies: the next attempt

Every attempt has a number that only grows and a hand-off token of its own; whatever comes from an older attempt is
ignored here, by the workers and by the token path. While no token was accepted a failed attempt is made again
elsewhere (`ATTEMPTS_MAX`); after that a lost worker ends the stream with one error. Instructions are carried out in
order by `router.py`, which answers the ones that ask something with the next event.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..bus.ids import HandoffToken, WorkerId
from .blame import Verdict, quarantined
from .generation import Failure, Generation, NoWorker, Overloaded, Rejected, RouterError
from .policies.base import Plan

ATTEMPTS_MAX = 6
"""Admissions tried for one request; a worker that refused it is not asked again, so this bounds large pools only."""


class Phase(Enum):
    """Where a request stands."""

    PICKING = "picking"  # the policy is asked
    ADMITTING = "admitting"  # a decode worker is asked
    RUNNING = "running"  # a decode worker holds it
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Pick:
    """Ask the policy; answered by `picked` or `nothing_to_pick`."""

    exclude: frozenset[WorkerId]


@dataclass(frozen=True, slots=True)
class AskDecode:
    """Send the DecodeJob; answered by `admitted`, `refused` or `decode_silent`."""

    worker: WorkerId
    attempt: int
    token: HandoffToken | None
    prefill_ranks: int = 1


@dataclass(frozen=True, slots=True)
class PublishPrefill:
    """Put the PrefillJob into the queue; answered by `published` or `not_published`."""

    worker: WorkerId
    attempt: int
    token: HandoffToken
    prefill_ranks: int = 1
    lane: WorkerId | None = None  # prefill worker that should have it first


@dataclass(frozen=True, slots=True)
class Rebind:
    """Only tokens of `attempt` count from now on."""

    attempt: int


@dataclass(frozen=True, slots=True)
class CancelAttempts:
    """Tell every worker to forget attempts up to `attempt`."""

    attempt: int


@dataclass(frozen=True, slots=True)
class DeleteJob:
    """Take the prefill job out of the queue."""

    sequence: int


@dataclass(frozen=True, slots=True)
class NakJob:
    """Give a lost prefill worker's job back to the queue."""

    ack_subject: str
    delay_s: float


@dataclass(frozen=True, slots=True)
class Assign:
    """The request counts as load of `worker` from now on."""

    worker: WorkerId


@dataclass(frozen=True, slots=True)
class Release:
    """The request is not load of `worker` any more."""

    worker: WorkerId


@dataclass(frozen=True, slots=True)
class ReportStarted:
    """Answer `start`: admitted."""

    worker: WorkerId
    plan: Plan
    why: str


@dataclass(frozen=True, slots=True)
class ReportError:
    """Answer `start`: it could not be started."""

    error: RouterError


@dataclass(frozen=True, slots=True)
class FailStream:
    """End the stream with one error event."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Forget:
    """Nothing of the request is left."""


Instruction = (
    Pick
    | AskDecode
    | PublishPrefill
    | Rebind
    | CancelAttempts
    | DeleteJob
    | NakJob
    | Assign
    | Release
    | ReportStarted
    | ReportError
    | FailStream
    | Forget
)


class RequestMachine:
    """The state of one generation; see the module's text."""

    __slots__ = (
        "_ack_subject",
        "_attempt_ranks",
        "_attempt_token",
        "_excluded",
        "_had_by",
        "_is_prefill_open",
        "_is_reported",
        "_lane",
        "_losses",
        "_prefill_worker",
        "_refusals",
        "_sequence",
        "_why",
        "attempt",
        "generation",
        "has_token",
        "phase",
        "plan",
        "prefilled_by",
        "worker",
    )

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.phase = Phase.PICKING
        self.attempt = -1
        self.plan: Plan = "local"
        self.worker: WorkerId | None = None  # the decode worker of this attempt
        self.has_token = False
        self.prefilled_by: WorkerId | None = None  # the last prefill worker that claimed the job of this attempt
        self._why = ""
        self._attempt_token: HandoffToken | None = None
        self._attempt_ranks = 1
        self._lane: WorkerId | None = None
        self._is_reported = False
        self._losses = 0
        self._excluded: set[WorkerId] = set()
        # Workers that may have begun it and did not give it back, each with the first attempt that was sent there.
        self._had_by: dict[WorkerId, int] = {}
        self._refusals: list[float] = []  # each refused worker's retry_after_s
        # The prefill job of this attempt.
        self._is_prefill_open = False
        self._sequence: int | None = None
        self._prefill_worker: WorkerId | None = None
        self._ack_subject = ""

    # ---- starting

    def begin(self) -> list[Instruction]:
        """The first event."""
        return [Pick(frozenset())]

    def picked(
        self, worker: WorkerId, plan: Plan, why: str, token: HandoffToken, *, prefill_ranks: int = 1,
        lane: WorkerId | None = None,
    ) -> list[Instruction]:  # fmt: skip
        """The policy chose; `token` is fresh and used when the plan is remote, from prefill workers of so many ranks."""
        if self.phase is not Phase.PICKING:
            return []
        self.phase = Phase.ADMITTING
        self.attempt += 1
        self.worker, self.plan, self._why = worker, plan, why
        self.prefilled_by = None
        self._had_by.setdefault(worker, self.attempt)
        self._attempt_token = token if plan == "remote" else None
        self._attempt_ranks = prefill_ranks
        self._lane = lane
        rebind: list[Instruction] = [Rebind(self.attempt)] if self.attempt else []
        return [*rebind, Assign(worker), AskDecode(worker, self.attempt, self._attempt_token, prefill_ranks)]

    def nothing_to_pick(self) -> list[Instruction]:
        """No worker is left to ask."""
        if self.phase is not Phase.PICKING:
            return []
        if self._refusals:
            return self._give_up(
                Overloaded("every decode worker is full", retry_after_s=max(1.0, min(self._refusals))), "overloaded"
            )
        error = NoWorker(f"no decode worker serves {self.generation.model!r} now", retry_after_s=2.0)
        return self._give_up(error, "decode_worker_lost" if self._losses else "no_worker")

    def admitted(self, attempt: int) -> list[Instruction]:
        """The decode worker holds it."""
        if attempt != self.attempt or self.phase is not Phase.ADMITTING:
            return self._report() if self.phase is Phase.ENDED else []
        self.phase = Phase.RUNNING
        if self._attempt_token is None or self.worker is None:
            return self._report()
        self._is_prefill_open = True
        return [PublishPrefill(self.worker, attempt, self._attempt_token, self._attempt_ranks, self._lane)]

    def refused(self, attempt: int, reason: str, detail: str, retry_after_s: float) -> list[Instruction]:
        """The decode worker does not want it."""
        if attempt != self.attempt or self.phase is not Phase.ADMITTING or self.worker is None:
            return []
        released = Release(self.worker)
        self._had_by.pop(self.worker, None)
        if reason in ("too_long", "bad_job"):
            return [released, *self._give_up(Rejected(detail or reason), reason)]
        if reason == "busy":
            self._refusals.append(retry_after_s)
        return [released, *self._pick_again()]

    def decode_silent(self, attempt: int) -> list[Instruction]:
        """The decode worker did not answer, or nobody listens there; it may have admitted it all the same."""
        if attempt != self.attempt or self.phase is not Phase.ADMITTING or self.worker is None:
            return []
        return [Release(self.worker), CancelAttempts(attempt), *self._pick_again()]

    def published(self, attempt: int, sequence: int | None) -> list[Instruction]:
        """The prefill job is in the queue (None: a prefill worker took it directly)."""
        if attempt != self.attempt or self.phase is Phase.ENDED:
            return [DeleteJob(sequence)] if sequence is not None else []
        self._sequence = sequence
        return self._report()

    def not_published(self, attempt: int, error: RouterError | None) -> list[Instruction]:
        """The job could not be queued. With `error` the request is refused; without, the decode worker computes the prompt."""
        if attempt != self.attempt or self.phase is not Phase.RUNNING or self.worker is None:
            return []
        self._is_prefill_open = False
        if self.has_token:  # It was stored all the same, and done.
            return []
        if error is not None:
            return [CancelAttempts(attempt), Release(self.worker), *self._give_up(error, error.code)]
        return self._again_locally()

    # ---- the prefill job

    def offered(self, attempt: int, worker: WorkerId) -> bool:
        """The prefill worker is about to get the job itself, and may die before it says so. False: nobody needs the job now."""
        is_needed = attempt == self.attempt and self._is_prefill_open
        if is_needed:
            self._had_by.setdefault(worker, self.attempt)
        return is_needed

    def claimed(self, attempt: int, worker: WorkerId, ack_subject: str) -> list[Instruction]:
        """A prefill worker computes the job now."""
        if attempt == self.attempt and self._is_prefill_open:
            self._prefill_worker = self.prefilled_by = worker
            self._had_by.setdefault(worker, self.attempt)
            self._ack_subject = ack_subject
        return []

    def returned(self, attempt: int, worker: WorkerId) -> list[Instruction]:
        """The prefill worker gave the job back to the queue, or did not take it."""
        if attempt == self.attempt and worker == self._prefill_worker:
            self._prefill_worker, self._ack_subject = None, ""
        self._had_by.pop(worker, None)
        return []

    def prefill_done(self, attempt: int) -> list[Instruction]:
        """The KV has landed and the job is gone."""
        if attempt == self.attempt:
            if self._prefill_worker is not None:
                self._had_by.pop(self._prefill_worker, None)
            self._close_prefill()
        return []

    def prefill_failed(self, attempt: int) -> list[Instruction]:
        """Nobody will do the job: the decode worker computes the prompt itself."""
        if attempt != self.attempt or self.phase is not Phase.RUNNING or not self._is_prefill_open:
            return []
        self._close_prefill()
        return [] if self.has_token else self._again_locally()

    @property
    def is_prefill_open(self) -> bool:
        """The prefill job of this attempt is neither done nor given up."""
        return self._is_prefill_open

    @property
    def is_unclaimed(self) -> bool:
        """A job is in the queue, and no prefill worker has said that it has it."""
        return self._is_prefill_open and self._prefill_worker is None

    def prefill_gone(self) -> list[Instruction]:
        """No prefill worker is left in the pool, or the job may be with one that hangs: do not wait for it."""
        if self.phase is not Phase.RUNNING or not self._is_prefill_open or self.has_token:
            return []
        return [*self._drop_job(), *self._again_locally()]

    # ---- workers

    @property
    def claimed_by(self) -> WorkerId | None:
        """The prefill worker that has the job of this attempt, as far as we know."""
        return self._prefill_worker

    def was_on(self, worker: WorkerId) -> bool:
        """Whether the worker may have died of it; a death may be noticed when the next attempt has begun."""
        return worker in self._had_by

    def unreached(self, attempt: int, worker: WorkerId) -> None:
        """Nobody listens there: the worker did not die of this attempt, though it may have of one before."""
        if self._had_by.get(worker) == attempt:
            del self._had_by[worker]

    def worker_lost(
        self, worker: WorkerId, nak_delay_s: float = 0.0, verdict: Verdict = Verdict.AGAIN
    ) -> list[Instruction]:
        """A worker died or left. `nak_delay_s`: so long the queue may still give jobs to it (it hangs with open pulls)."""
        if self.phase is Phase.ENDED:
            return []
        self._had_by.pop(worker, None)
        if verdict is Verdict.GUILTY and not self.has_token:
            return self.failed(quarantined())
        if self.worker is None:
            return []
        if worker == self.worker:
            return self._decode_lost()
        is_claimed = worker == self._prefill_worker and self._is_prefill_open
        if is_claimed:
            self._prefill_worker = None
        if verdict is Verdict.ALONE and not self.has_token:
            # Not by the queue, which would give it to the next worker at once.
            dropped = [CancelAttempts(self.attempt), Release(self.worker), *self._drop_job()]
            return dropped + self._pick_again(is_refused=False)
        if is_claimed and self.has_token:
            # The decode worker has gone on without it: the next worker would do it in vain.
            return self._drop_job()
        return [NakJob(self._ack_subject, nak_delay_s)] if is_claimed and self._ack_subject else []

    # ---- tokens and ends

    def first_token(self) -> list[Instruction]:
        """A token of the newest attempt was accepted. The caller need not wait for the queue's word: the job was done."""
        self.has_token = True
        return self._report()

    def ended(self) -> list[Instruction]:
        """The worker's terminal entry was accepted; it needs no cancel."""
        return self._end(cancels=False)

    def abandoned(self) -> list[Instruction]:
        """The answer is complete on our side (a stop string), or the client has gone."""
        return self._end(cancels=True)

    def failed(self, failure: Failure) -> list[Instruction]:
        """It takes too long, or the router stops."""
        if self.phase is Phase.ENDED:
            return []
        error = RouterError(failure.message)
        error.status, error.code = failure.status, failure.code
        answer: list[Instruction] = [FailStream(failure)] if self._is_reported else [ReportError(error)]
        self._is_reported = True
        return [*answer, *self._end(cancels=True)]

    # ---- parts

    def _report(self) -> list[Instruction]:
        if self._is_reported or self.worker is None:
            return []
        self._is_reported = True
        return [ReportStarted(self.worker, self.plan, self._why)]

    def _pick_again(self, *, is_refused: bool = True) -> list[Instruction]:
        assert self.worker is not None
        self.phase = Phase.PICKING
        if is_refused:
            self._excluded.add(self.worker)
        self.worker = None
        if self.attempt + 1 >= ATTEMPTS_MAX:
            return self.nothing_to_pick()
        return [Pick(frozenset(self._excluded))]

    def _again_locally(self) -> list[Instruction]:
        """The same decode worker, a new attempt that waits for nobody's KV."""
        assert self.worker is not None
        self.phase = Phase.ADMITTING
        self.attempt += 1
        self.plan, self._attempt_token = "local", None
        return [Rebind(self.attempt), AskDecode(self.worker, self.attempt, None)]

    def _decode_lost(self) -> list[Instruction]:
        assert self.worker is not None
        lost = self.worker
        self._losses += 1
        instructions: list[Instruction] = [CancelAttempts(self.attempt), Release(lost), *self._drop_job()]
        if self.has_token:
            failure = Failure(
                "decode_worker_lost", f"the decode worker {lost} was lost while it answered", is_retryable=True
            )
            self.worker = None
            return instructions + self.failed(failure)
        return instructions + self._pick_again()

    def _give_up(self, error: RouterError, code: str) -> list[Instruction]:
        failure = Failure(code, str(error), is_retryable=True, status=error.status, retry_after_s=error.retry_after_s)
        answer: list[Instruction] = [FailStream(failure)] if self._is_reported else [ReportError(error)]
        self._is_reported = True
        self.phase = Phase.ENDED
        self.worker = None
        return [*answer, Forget()]

    def _end(self, *, cancels: bool) -> list[Instruction]:
        if self.phase is Phase.ENDED:
            return []
        # A short answer may be complete before the queue has confirmed its job: the caller still waits for the start.
        instructions = self._report()
        if cancels and self.attempt >= 0:
            instructions.append(CancelAttempts(self.attempt))
        instructions += self._drop_job()
        if self.worker is not None:
            instructions.append(Release(self.worker))
        self.phase = Phase.ENDED
        return [*instructions, Forget()]

    def _drop_job(self) -> list[Instruction]:
        """The job is of no use any more: out of the queue with it, if it may still be there."""
        sequence = self._sequence
        was_open = self._is_prefill_open
        self._close_prefill()
        return [DeleteJob(sequence)] if was_open and sequence is not None else []

    def _close_prefill(self) -> None:
        self._is_prefill_open = False
        self._sequence = self._prefill_worker = None
        self._ack_subject = ""
