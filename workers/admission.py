"""Which decode jobs a worker takes: the decision alone, without I/O or clock."""

from __future__ import annotations

from dataclasses import dataclass

from ..bus.messages import Admitted, DecodeJob, Refused, WorkerCard
from ..bus.subjects import token
from .attempts import RecentAttempts

RETRY_AFTER_S = 1.0  # a slot comes free after about one answer; the router tries another worker before it waits


@dataclass(frozen=True, slots=True)
class Decision:
    """What to answer, whether to run the job now, and which attempt of the same request to stop for it."""

    answer: Admitted | Refused
    is_new: bool = False
    replaces: int | None = None


class Admission:
    """Keeps one attempt of each request, the newest; everything older is stale."""

    def __init__(self, card: WorkerCard, *, held_max: int) -> None:
        self._card = card
        self._held_max = held_max
        self._held: dict[str, int] = {}
        self._cancelled = RecentAttempts()
        self._admitted = RecentAttempts()
        self.is_draining = False

    @property
    def held(self) -> int:
        """Requests that run or wait here."""
        return len(self._held)

    def offer(self, job: DecodeJob) -> Decision:
        """A job has come, perhaps not for the first time."""
        newest = self._admitted.get(job.request_id)
        if self._cancelled.covers(job.request_id, job.attempt):
            return self._refuse(job, "stale", "cancelled")
        if newest is not None and job.attempt <= newest:
            if job.attempt == newest:
                return Decision(Admitted(job.request_id, job.attempt))
            return self._refuse(job, "stale", f"attempt {newest} was admitted")
        refusal = self._misdirected(job) or self._unfit(job)
        if refusal is not None:
            return self._refuse(job, *refusal)
        replaces = self._held.get(job.request_id)
        if self.is_draining and replaces is None:  # Another attempt of what runs here is no new work.
            return self._refuse(job, "draining", "the worker stops")
        if replaces is None and len(self._held) >= self._held_max:
            return self._refuse(job, "busy", f"{len(self._held)} requests are held")
        self._held[job.request_id] = job.attempt
        self._admitted.note(job.request_id, job.attempt)
        return Decision(Admitted(job.request_id, job.attempt), is_new=True, replaces=replaces)

    def cancel(self, request_id: str, attempt: int) -> int | None:
        """Forget every attempt up to this one; the attempt to stop, if it is held."""
        self._cancelled.note(request_id, attempt)
        held = self._held.get(request_id)
        return held if held is not None and held <= attempt else None

    def ended(self, request_id: str, attempt: int) -> None:
        """The attempt runs no more."""
        if self._held.get(request_id) == attempt:
            del self._held[request_id]

    def _misdirected(self, job: DecodeJob) -> tuple[str, str] | None:
        card = self._card
        if job.epoch and job.epoch != card.epoch:
            return "wrong_worker", "another incarnation of this worker was meant"
        if job.fingerprint and job.fingerprint != card.fingerprint:
            return "wrong_worker", f"this worker's KV is {card.fingerprint}, the job's is {job.fingerprint}"
        if job.model != card.model:
            return "wrong_worker", f"this worker serves {card.model!r}, not {job.model!r}"
        return None

    def _unfit(self, job: DecodeJob) -> tuple[str, str] | None:
        prompt_tokens, odd_bytes = divmod(len(job.token_ids), 4)
        if odd_bytes or not prompt_tokens:
            return "bad_job", f"{len(job.token_ids)} bytes are no prompt of 4-byte token ids"
        try:
            token(job.router_id)
        except ValueError as error:
            return "bad_job", f"no router can have this id: {error}"
        if prompt_tokens >= self._card.max_model_len:
            return "too_long", f"{prompt_tokens} prompt tokens leave no room in {self._card.max_model_len}"
        if job.time_left_s <= 0:
            return "stale", "its deadline has passed"
        return None

    def _refuse(self, job: DecodeJob, reason: str, detail: str) -> Decision:
        retry_after_s = RETRY_AFTER_S if reason == "busy" else 0.0
        return Decision(Refused(job.request_id, job.attempt, reason, detail, retry_after_s))
