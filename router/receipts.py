"""Why each request went where it went: a bounded ring of what was decided, made readable only when somebody asks.

A record holds what the chooser left behind anyway, by reference. Of the prompt it holds the length alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from ..bus.ids import RequestId, RouterId, WorkerId
from .chooser import Chosen
from .control_messages import AttemptReceipt, CandidateReceipt, OutcomeReceipt, PrefillReceipt, Receipt, ShadowReceipt
from .generation import Generation
from .policies.base import Choice, Outcome, PrefillView, WorkerView
from .policy_set import Trace
from .view import Member

RECORDS_PER_S_MAX = 500
"""Past it a second's further requests leave no receipt, unless they ask for one."""
# Bytes that a record keeps alive, measured with tracemalloc on CPython 3.11 and rounded up.
RECORD_BYTES = 1500
VIEW_BYTES = 320
COSTS_BYTES = 600


@dataclass(slots=True)
class _Attempt:
    after_s: float
    chosen: Chosen | None
    ages_s: list[float]  # since each candidate's last heartbeat
    filtered: dict[WorkerId, str]


@dataclass(slots=True)
class Record:
    """One request, from its start on."""

    request_id: RequestId
    model: str
    prompt_tokens: int
    max_tokens: int
    started_s: float
    started_unix_s: float
    attempts: list[_Attempt] = field(default_factory=list)
    end: tuple[str, str, float] | None = None  # how, detail, duration in seconds
    outcome: Outcome | None = None
    held_bytes: int = RECORD_BYTES


class Receipts:
    """The newest records of one router, at most about `bytes_max` in all; 0 keeps none."""

    def __init__(self, router_id: RouterId, *, bytes_max: int) -> None:
        self._router_id = router_id
        self._bytes_max = bytes_max
        self._records: dict[RequestId, Record] = {}
        self._second = 0
        self._in_second = 0
        self.held_bytes = 0

    def __len__(self) -> int:
        return len(self._records)

    def begin(self, generation: Generation, now: float, unix_s: float) -> Record | None:
        """A request comes; None when it leaves no receipt."""
        if int(now) != self._second:
            self._second, self._in_second = int(now), 0
        self._in_second += 1
        if not self._bytes_max or (self._in_second > RECORDS_PER_S_MAX and not generation.explains):
            return None
        record = Record(
            generation.request_id, generation.model, generation.prompt_tokens, generation.sampling.max_tokens, now, unix_s
        )  # fmt: skip
        self._records[record.request_id] = record
        self._hold(record, RECORD_BYTES)
        return record

    def picked(
        self,
        record: Record,
        chosen: Chosen | None,
        now: float,
        *,
        members: Sequence[Member],
        exclude: Collection[WorkerId],
    ) -> None:
        """The policy was asked; None: there was nobody to choose from. `members` are all decode workers, in order."""
        candidates = chosen.candidates if chosen is not None else ()
        filtered: dict[WorkerId, str] = {}
        if len(candidates) != len(members):
            offered = {worker.worker_id for worker in candidates}
            filtered = {
                member.card.worker_id: _why_filtered(member, record.model, exclude)
                for member in members
                if member.card.worker_id not in offered
            }
            members = [member for member in members if member.card.worker_id in offered]
        ages_s = [now - member.seen_s for member in members]
        # Without the hashes of the prompt: 45 B a block, and nobody asks for them.
        kept = None if chosen is None else replace(chosen, hashes={})
        record.attempts.append(_Attempt(now - record.started_s, kept, ages_s, filtered))
        if record.request_id in self._records:
            added = _bytes_of(chosen)
            record.held_bytes += added
            self._hold(record, added)

    def ended(self, record: Record, end: str, now: float, *, detail: str = "", outcome: Outcome | None = None) -> None:
        """It is over; the first word counts."""
        if record.end is None:
            record.end = end, detail[:500], now - record.started_s
            record.outcome = outcome

    def find(self, request_id: RequestId) -> Receipt | None:
        """The receipt of a request that is still remembered."""
        record = self._records.get(request_id)
        return None if record is None else _receipt(record, self._router_id)

    def newest(self) -> Chosen | None:
        """What was decided last and is remembered."""
        for record in reversed(self._records.values()):
            if record.attempts and record.attempts[-1].chosen is not None:
                return record.attempts[-1].chosen
        return None

    def oldest_s(self, now: float) -> float:
        """Age of the oldest record, in seconds."""
        oldest = next(iter(self._records.values()), None)
        return 0.0 if oldest is None else now - oldest.started_s

    def _hold(self, record: Record, added_bytes: int) -> None:
        self.held_bytes += added_bytes
        while self.held_bytes > self._bytes_max and self._records:
            oldest = next(iter(self._records))
            self.held_bytes -= self._records.pop(oldest).held_bytes


def _bytes_of(chosen: Chosen | None) -> int:
    if chosen is None:
        return VIEW_BYTES
    shadows = chosen.trace.shadows if chosen.trace is not None else ()
    costs = len(chosen.choice.costs) + sum(len(pick.choice.costs) for pick in shadows)
    views = len(chosen.candidates) + len(chosen.request.prefill) + 2 * len(shadows)
    return VIEW_BYTES * (2 + views) + COSTS_BYTES * costs


def _why_filtered(member: Member, model: str, exclude: Collection[WorkerId]) -> str:
    if member.card.model != model:
        return f"serves {member.card.model}"
    if member.card.worker_id in exclude:
        return "refused this request or was lost with it"
    if member.heartbeat.is_draining:
        return "draining"
    return "suspect: silent" if member.is_suspect else "takes no work"


# ---- made readable


def _receipt(record: Record, router_id: RouterId) -> Receipt:
    return Receipt(
        record.request_id, router_id, record.model, record.prompt_tokens, record.max_tokens, record.started_unix_s,
        [_attempt(attempt) for attempt in record.attempts], _outcome(record),
    )  # fmt: skip


def _outcome(record: Record) -> OutcomeReceipt | None:
    if record.end is None:
        return None
    end, detail, duration_s = record.end
    seen, chosen = record.outcome, record.attempts[-1].chosen if record.attempts else None
    if seen is None or chosen is None:
        return OutcomeReceipt(end, duration_s, detail)
    return OutcomeReceipt(
        end, duration_s, detail, seen.output_tokens, seen.ttft_s, seen.itl_s,
        predicted_hit_tokens=seen.hit_blocks * chosen.worker.block_tokens,
        cached_tokens=seen.cached_tokens, prefill_worker=seen.prefill_worker,
    )  # fmt: skip


def _attempt(attempt: _Attempt) -> AttemptReceipt:
    chosen = attempt.chosen
    if chosen is None:
        return AttemptReceipt(attempt.after_s, filtered=attempt.filtered)
    choice, trace = chosen.choice, chosen.trace
    receipt = AttemptReceipt(
        attempt.after_s,
        worker=chosen.worker.worker_id,
        plan=chosen.plan,
        why=choice.why,
        lane=choice.lane,
        predicted_ttft_s=choice.ttft_s,
        candidates=[
            _candidate(worker, choice, age_s)
            for worker, age_s in zip(chosen.candidates, attempt.ages_s, strict=True)
        ],
        prefill=[_prefill(worker, choice) for worker in chosen.request.prefill],
        filtered=attempt.filtered,
    )  # fmt: skip
    return receipt if trace is None else _with_trace(receipt, trace)


def _with_trace(receipt: AttemptReceipt, trace: Trace) -> AttemptReceipt:
    return msgspec.structs.replace(
        receipt,
        policy=trace.arm.status.policy,
        arm=trace.arm.status.arm,
        version=trace.version,
        pick_us=trace.pick_s * 1e6,
        failure=trace.failure,
        shadows=[
            ShadowReceipt(
                pick.shadow.status.policy, pick.choice.worker_id, pick.plan, pick.choice.why, pick.choice.ttft_s,
                pick.pick_s * 1e6,
            )
            for pick in trace.shadows
        ],
    )  # fmt: skip


def _candidate(worker: WorkerView, choice: Choice, heartbeat_age_s: float) -> CandidateReceipt:
    return CandidateReceipt(
        worker.worker_id, worker.hit_blocks * worker.block_tokens, worker.load, worker.slots, worker.in_flight,
        worker.kv_blocks_free, worker.kv_blocks, worker.index_mode, heartbeat_age_s,
        dict(choice.costs.get(worker.worker_id, {})),
    )  # fmt: skip


def _prefill(worker: PrefillView, choice: Choice) -> PrefillReceipt:
    return PrefillReceipt(
        worker.worker_id, worker.hit_blocks * worker.block_tokens, worker.running, worker.waiting, worker.slots,
        dict(choice.costs.get(worker.worker_id, {})),
    )  # fmt: skip
