"""`hocket explain`: asks every router for a request's receipt and makes it readable."""

from __future__ import annotations

import datetime

from ..bus.base import Bus
from ..bus.ids import RequestId
from ..router.control_messages import (
    AskReceipt,
    AttemptReceipt,
    CandidateReceipt,
    OutcomeReceipt,
    Receipt,
    ReceiptAnswer,
)
from .ask_routers import ask_all
from .tables import table


async def find_receipt(bus: Bus, pool: str, request_id: str) -> tuple[Receipt | None, list[ReceiptAnswer]]:
    """The receipt, and what every router answered. Raises BusError."""
    answers = await ask_all(bus, pool, AskReceipt(RequestId(request_id)), ReceiptAnswer)
    return next((answer.receipt for answer in answers if answer.receipt is not None), None), answers


def absence(request_id: str, pool: str, answers: list[ReceiptAnswer]) -> str:
    """Why there is none."""
    if not answers:
        return f"no router of pool {pool!r} answered"
    held = ", ".join(f"{answer.router_id} the last {answer.held} of {answer.oldest_s:.0f} s" for answer in answers)
    return f"no router remembers {request_id}; remembered: {held}"


def receipt_lines(receipt: Receipt) -> list[str]:
    """The whole story."""
    started = datetime.datetime.fromtimestamp(receipt.started_unix_s).astimezone().isoformat(" ", "milliseconds")
    lines = [
        f"request {receipt.request_id}, model {receipt.model}, {receipt.prompt_tokens} prompt tokens, "
        f"at most {receipt.max_tokens} of the answer, started {started} on {receipt.router_id}",
        _outcome_line(receipt, receipt.outcome),
    ]
    for number, attempt in enumerate(receipt.attempts, 1):
        lines += ["", *_attempt_lines(number, attempt)]
    return lines


def _outcome_line(receipt: Receipt, outcome: OutcomeReceipt | None) -> str:
    if outcome is None:
        return "it has not ended"
    facts = [f"{outcome.end} after {outcome.duration_s:.3f} s"]
    if outcome.detail:
        facts.append(outcome.detail)
    if outcome.ttft_s is not None:
        predicted_s = receipt.attempts[-1].predicted_ttft_s
        expected = "" if predicted_s is None else f" (predicted {predicted_s * 1000:.1f})"
        facts.append(
            f"{outcome.output_tokens} tokens, the first {outcome.ttft_s * 1000:.1f} ms after the pick{expected}"
        )
    if outcome.itl_s is not None:
        facts.append(f"ITL {outcome.itl_s * 1000:.2f} ms")
    if outcome.cached_tokens is not None:
        facts.append(f"{outcome.cached_tokens} prompt tokens were cached ({outcome.predicted_hit_tokens} expected)")
    if outcome.prefill_worker is not None:
        facts.append(f"prompt computed by {outcome.prefill_worker}")
    return "; ".join(facts)


def _attempt_lines(number: int, attempt: AttemptReceipt) -> list[str]:
    if attempt.worker is None:
        lines = [f"attempt {number} after {attempt.after_s:.3f} s: no worker could be chosen"]
    else:
        by = f"{attempt.policy} ({attempt.arm}, version {attempt.version}), {attempt.pick_us:.0f} us"
        lane = f", lane {attempt.lane}" if attempt.lane else ""
        lines = [
            f"attempt {number} after {attempt.after_s:.3f} s: {attempt.worker}, {attempt.plan}{lane}, by {by}",
            *([f"  why: {attempt.why}"] if attempt.why else []),
            *([f"  least loaded chose in its place: {attempt.failure}"] if attempt.failure else []),
            *_candidate_lines(attempt),
        ]
    if attempt.prefill:
        lines += [
            f"  prefill {worker.worker}: {worker.hit_tokens} tokens cached, {worker.running} running and "
            f"{worker.waiting} waiting on {worker.slots} slots{_terms(worker.costs)}"
            for worker in attempt.prefill
        ]
    lines += [f"  not offered {worker}: {why}" for worker, why in attempt.filtered.items()]
    for shadow in attempt.shadows:
        first = "" if shadow.predicted_ttft_s is None else f", first token in {shadow.predicted_ttft_s * 1000:.1f} ms"
        lines.append(f"  shadow {shadow.policy}: {shadow.worker}, {shadow.plan}{first}; {shadow.why}")
    return lines


def _candidate_lines(attempt: AttemptReceipt) -> list[str]:
    terms = list(dict.fromkeys(term for worker in attempt.candidates for term in worker.costs))
    head = ("  candidate", "cached", "load", "of ours", "blocks free", "index", "heard", *terms)
    return table(head, [_candidate_row(worker, attempt, terms) for worker in attempt.candidates])


def _candidate_row(worker: CandidateReceipt, attempt: AttemptReceipt, terms: list[str]) -> tuple[str, ...]:
    return (
        f"{'*' if worker.worker == attempt.worker else ' '} {worker.worker}",
        str(worker.hit_tokens),
        f"{worker.load}/{worker.slots}",
        str(worker.in_flight),
        f"{worker.kv_blocks_free}/{worker.kv_blocks}",
        worker.index,
        f"{worker.heartbeat_age_s:.2f} s",
        *(f"{worker.costs[term]:.4g}" if term in worker.costs else "-" for term in terms),
    )


def _terms(costs: dict[str, float]) -> str:
    return "".join(f", {term} {value:.4g}" for term, value in costs.items())
