"""What to do with each prefill job that comes, and with each that failed: decisions alone, without I/O or clock."""

from __future__ import annotations

from dataclasses import dataclass

from ..bus.messages import PrefillJob, WorkerCard
from .attempts import RecentAttempts
from .engines.base import BadTask, EngineError, HandoffFailed, PrefillOutcome

RETRY_DELAY_S = 1.0  # before a job whose decode worker could not be reached is tried again
ELSEWHERE_DELAY_S = 0.5  # times the delivery, before a job that only another worker can do is offered again


@dataclass(frozen=True, slots=True)
class Take:
    """Run it."""


@dataclass(frozen=True, slots=True)
class Join:
    """It runs here already: this delivery ends as the running one does."""


@dataclass(frozen=True, slots=True)
class AckAgain:
    """It was done here before; only the ack was lost."""


@dataclass(frozen=True, slots=True)
class GiveBack:
    """Another worker may do it."""

    why: str
    delay_s: float


@dataclass(frozen=True, slots=True)
class Leave:
    """A newer delivery of it runs elsewhere: say nothing to anybody."""


@dataclass(frozen=True, slots=True)
class Discard:
    """Nobody should do it. With a `reason` (of PrefillFailed) the router is told."""

    why: str
    reason: str = ""


Ending = PrefillOutcome | GiveBack | Leave | Discard
Verdict = Take | Join | AckAgain | GiveBack | Discard


class PrefillIntake:
    """What to do with each job that comes, and with each that failed."""

    def __init__(self, card: WorkerCard) -> None:
        self._card = card
        self._running: dict[tuple[str, int], None] = {}
        self._cancelled = RecentAttempts()
        self._done = RecentAttempts()
        self.is_draining = False

    @property
    def running(self) -> int:
        return len(self._running)

    def offer(self, job: PrefillJob, delivery: int, left_s: float) -> Verdict:
        """Taken jobs run until `ended`. `left_s`: until its deadline."""
        key = (job.request_id, job.attempt)
        if self._cancelled.covers(*key):
            return Discard("cancelled")
        if key in self._running:
            return Join()
        if self._done.get(job.request_id) == job.attempt:
            return AckAgain()
        if left_s <= 0:
            return Discard("its deadline has passed", "expired")
        if self.is_draining:
            return GiveBack("the worker stops", 0.0)
        if not is_for(self._card, job):
            return GiveBack("it is for another model or KV layout", ELSEWHERE_DELAY_S * delivery)
        if not job.token_ids or len(job.token_ids) % 4:
            return Discard(f"{len(job.token_ids)} bytes are no prompt of 4-byte token ids", "bad_job")
        self._running[key] = None
        return Take()

    def cancel(self, request_id: str, attempt: int) -> list[tuple[str, int]]:
        """Forget every attempt up to this one; those to stop."""
        self._cancelled.note(request_id, attempt)
        return [key for key in self._running if key[0] == request_id and key[1] <= attempt]

    def is_cancelled(self, job: PrefillJob) -> bool:
        return self._cancelled.covers(job.request_id, job.attempt)

    def ended(self, job: PrefillJob, *, is_done: bool) -> None:
        self._running.pop((job.request_id, job.attempt), None)
        if is_done:
            self._done.note(job.request_id, job.attempt)

    def failed(self, job: PrefillJob, error: EngineError, left_s: float) -> GiveBack | Leave | Discard:
        """What becomes of a job that the engine could not do."""
        if self._cancelled.covers(job.request_id, job.attempt):
            return Discard("cancelled")
        if isinstance(error, BadTask):
            return Discard(str(error), "bad_job")
        if left_s <= 0:
            return Discard("its deadline has passed", "expired")
        if not isinstance(error, HandoffFailed):
            return GiveBack(str(error), RETRY_DELAY_S)
        match error.reason:
            case "refused:stale_attempt":
                return Leave()
            case "cancelled":
                return Discard("the decode worker needs it no more")
            case "refused:unknown_token" | "refused:busy" | "link_lost" | "timeout" | "closing":
                return GiveBack(error.reason, RETRY_DELAY_S)  # It may not have made room yet, or be back soon.
            case reason:
                return Discard(reason, "refused")


def is_for(card: WorkerCard, job: PrefillJob) -> bool:
    """Whether a worker like this can do the job: same model, same KV, and as many ranks as decode was told of."""
    return (job.model, job.fingerprint, job.prefill_ranks) == (card.model, card.fingerprint, card.tp_size)
