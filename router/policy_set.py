"""The policies that decide, and those that are only asked: primary, canary, shadows. Pure, and a policy itself.

What they cost is measured with `timer` and bounded: a policy that raises or overruns its budget too often is replaced by
least loaded until the next version is switched on; a shadow is then no longer asked, and a canary's requests go to the
primary. A policy cannot be interrupted: its overrun is noticed when it returns.
"""

from __future__ import annotations

import logging
import math
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .control_messages import ArmStatus, Distribution, PolicyConfig, ShadowStatus
from .policies.base import Choice, ObservingPolicy, Outcome, Plan, Policy, RequestView, WorkerView
from .policies.basic import LeastLoaded

log = logging.getLogger(__name__)

SHADOW_TIME_SHARE = 0.05
"""Shadows together may take so much of the router's time; past it they are asked about a sample of the picks."""
SHADOW_CREDIT_MAX_S = 0.05
OVERRUN_PICKS_MIN = 20
"""Overruns count when at least every so manyth pick is one: a stall of the whole process is not the policy's fault."""
GROSS_OVERRUN = 100
"""A pick over so many times its budget is not waited for again: half a second by default, no stall is as long."""


@dataclass(frozen=True, slots=True)
class ShadowPick:
    """What a shadow would have done."""

    shadow: Shadow
    choice: Choice
    plan: Plan
    pick_s: float


@dataclass(frozen=True, slots=True)
class Trace:
    """Who decided, and what it took."""

    arm: Arm
    version: int
    pick_s: float
    failure: str  # why the fallback chose in the arm's place; "": it did not
    shadows: tuple[ShadowPick, ...] = ()


class Guard:
    """Counts one policy's failures in windows of `window_s`."""

    def __init__(self, config: PolicyConfig) -> None:
        self.budget_s = config.pick_budget_ms / 1000
        self._failures_max = config.failures_max
        self._window_s = config.window_s
        self._began_s = float("-inf")
        self._picks = self._raised = self._overruns = 0

    def began(self, now: float) -> None:
        """One more pick."""
        if now - self._began_s > self._window_s:
            self._began_s = now
            self._picks = self._raised = self._overruns = 0
        self._picks += 1

    def raised(self, error: str) -> str:
        """It raised; why it has to be replaced, "" when it has not."""
        self._raised += 1
        return (
            f"raised {self._raised} times in {self._window_s:g} s, last {error}" if self._is_over(self._raised) else ""
        )

    def overran(self, pick_s: float) -> str:
        """It was slow; why it has to be replaced, "" when it has not."""
        self._overruns += 1
        many = self._is_over(self._overruns) and self._overruns * OVERRUN_PICKS_MIN >= self._picks
        if not many and pick_s < GROSS_OVERRUN * self.budget_s:
            return ""
        took = f"{pick_s * 1000:.1f} ms, over its {self.budget_s * 1000:g} ms"
        return f"took {took}, {self._overruns} of {self._picks} times in {self._window_s:g} s"

    def _is_over(self, count: int) -> bool:
        return count >= self._failures_max


class Arm:
    """One policy that decides."""

    def __init__(self, arm: str, name: str, policy: Policy, config: PolicyConfig) -> None:
        self.status = ArmStatus(arm, name)
        self.policy = policy
        self.guard = Guard(config)

    @property
    def is_out(self) -> bool:
        """The fallback decides in its place."""
        return bool(self.status.replaced)

    def ended(self, outcome: Outcome | None, *, is_error: bool) -> None:
        """A request that it placed has ended."""
        status = self.status
        status.requests += 1
        status.errors += is_error
        if outcome is None:
            return
        status.prompt_tokens += outcome.prompt_tokens
        if outcome.cached_tokens is not None:
            status.cached_tokens += outcome.cached_tokens
            status.cached_of_tokens += outcome.prompt_tokens
        if outcome.ttft_s is not None:
            status.ttft_s.add(outcome.ttft_s)
            _add_error(status.prediction_error, outcome.predicted_ttft_s, outcome.ttft_s)
        if outcome.itl_s is not None:
            status.itl_s.add(outcome.itl_s)


class Shadow:
    """One policy that is only asked."""

    def __init__(self, name: str, policy: Policy, config: PolicyConfig) -> None:
        self.status = ShadowStatus(name)
        self.policy = policy
        self.guard = Guard(config)

    @property
    def is_out(self) -> bool:
        """It is not asked any more."""
        return bool(self.status.stopped)

    def compare(self, choice: Choice, plan: Plan, done: Choice, done_plan: Plan) -> None:
        """Its own choice against what was done."""
        status = self.status
        is_same = choice.worker_id == done.worker_id
        status.same_worker += is_same
        status.same_plan += is_same and plan == done_plan
        if choice.ttft_s is not None and done.ttft_s is not None:
            status.ttft_pairs += 1
            status.ttft_gain_s += done.ttft_s - choice.ttft_s
        own, others = choice.costs.get(choice.worker_id), choice.costs.get(done.worker_id)
        if own is not None and others is not None:
            status.cost_pairs += 1
            status.cost_excess += total_cost(others) - total_cost(own)


class PolicySet:
    """Primary, canary and shadows of one version. `policies` are instances in the order of `config.seats`."""

    def __init__(
        self,
        config: PolicyConfig,
        policies: Sequence[Policy],
        *,
        version: int,
        timer: Callable[[], float],
        scratch_rng: random.Random,
        on_replaced: Callable[[str, str, str], None] = lambda place, policy, why: None,
    ) -> None:
        self.config = config
        self.version = version
        seats = list(zip(config.seats, policies, strict=True))
        self.primary = Arm("primary", *seats[0], config)
        self.canary = Arm("canary", *seats[1], config) if config.canary else None
        self.arms = [self.primary, *([self.canary] if self.canary else ())]
        self.shadows = [Shadow(name, policy, config) for name, policy in seats[len(self.arms) :]]
        self._observers: list[tuple[Arm | Shadow, ObservingPolicy]] = [
            (seat, seat.policy) for seat in (*self.arms, *self.shadows) if isinstance(seat.policy, ObservingPolicy)
        ]
        self._share = config.canary.share if config.canary else 0.0
        self._timer = timer
        self._on_replaced = on_replaced
        self._fallback = LeastLoaded()
        self._scratch_rng = scratch_rng  # seeded again before each use
        self._credit_s, self._credit_at_s = SHADOW_CREDIT_MAX_S, 0.0

    def successor(self, config: PolicyConfig, policies: Sequence[Policy], *, version: int) -> PolicySet:
        """The next version, in the same surroundings."""
        return PolicySet(
            config,
            policies,
            version=version,
            timer=self._timer,
            scratch_rng=self._scratch_rng,
            on_replaced=self._on_replaced,
        )

    def pick(self, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random) -> Choice:
        """As a plain policy."""
        return self.decide(request, workers, now, rng)[0]

    def decide(
        self, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random
    ) -> tuple[Choice, Trace]:
        """Never raises what a policy raised."""
        arm = self.arm_of(request)
        if not self.shadows or not self._may_ask_shadows(now):
            choice, pick_s, failure = self._ask(arm, request, workers, now, rng)
            return choice, Trace(arm, self.version, pick_s, failure)
        # All of them get the same chances, so that equal policies agree whatever is drawn.
        seed = rng.getrandbits(64)
        self._scratch_rng.seed(seed)
        choice, pick_s, failure = self._ask(arm, request, workers, now, self._scratch_rng)
        return choice, Trace(
            arm, self.version, pick_s, failure, self._ask_shadows(request, workers, now, seed=seed, done=choice)
        )

    def observe(self, outcome: Outcome, now: float) -> None:
        """Tell every policy that wants to know how a request ended."""
        for seat, policy in self._observers:
            if seat.is_out:
                continue
            try:
                policy.observe(outcome, now)
            except Exception as error:  # A user's policy may raise anything; the request must not pay for it.
                self._raised(seat, error)

    def arm_of(self, request: RequestView) -> Arm:
        """Which policy decides for it: always the same one for a session while the share does not shrink."""
        if self.canary is None or self.canary.is_out:
            return self.primary
        place = zlib.crc32((request.session_id or request.request_id).encode()) / 2**32
        return self.canary if place < self._share else self.primary

    # ---- parts

    def _ask(
        self, arm: Arm, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random
    ) -> tuple[Choice, float, str]:
        status = arm.status
        status.picks += 1
        if status.replaced:
            return self._fallback.pick(request, workers, now, rng), 0.0, status.replaced
        arm.guard.began(now)
        start = self._timer()
        try:
            choice = arm.policy.pick(request, workers, now, rng)
            _worker(choice, workers)
        except Exception as error:  # As above.
            self._raised(arm, error)
            return self._fallback.pick(request, workers, now, rng), self._timer() - start, status.last_error
        pick_s = self._timer() - start
        self._took(arm, pick_s)
        return choice, pick_s, ""

    def _ask_shadows(
        self, request: RequestView, workers: Sequence[WorkerView], now: float, *, seed: int, done: Choice
    ) -> tuple[ShadowPick, ...]:
        done_plan = done.plan or request.default_plan(_worker(done, workers))
        picks: list[ShadowPick] = []
        for shadow in self.shadows:
            if shadow.is_out:
                continue
            self._scratch_rng.seed(seed)
            shadow.status.scored += 1
            shadow.guard.began(now)
            start = self._timer()
            try:
                choice = shadow.policy.pick(request, workers, now, self._scratch_rng)
                plan = choice.plan or request.default_plan(_worker(choice, workers))
                pick_s = self._timer() - start
                shadow.compare(choice, plan, done, done_plan)
                picks.append(ShadowPick(shadow, choice, plan, pick_s))
            except Exception as error:  # As above.
                pick_s = self._timer() - start
                self._raised(shadow, error)
            self._credit_s -= pick_s
            self._took(shadow, pick_s)
        return tuple(picks)

    def _may_ask_shadows(self, now: float) -> bool:
        for shadow in self.shadows:
            shadow.status.seen += 1
        earned_s = max(now - self._credit_at_s, 0.0) * SHADOW_TIME_SHARE
        self._credit_s, self._credit_at_s = min(self._credit_s + earned_s, SHADOW_CREDIT_MAX_S), now
        return self._credit_s > 0

    def _took(self, seat: Arm | Shadow, pick_s: float) -> None:
        seat.status.pick_s.add(pick_s)
        if pick_s > seat.guard.budget_s:
            seat.status.overruns += 1
            self._replace(seat, seat.guard.overran(pick_s))

    def _raised(self, seat: Arm | Shadow, error: Exception) -> None:
        seat.status.raised += 1
        if seat.status.raised == 1:  # The next ones look alike, and may be many.
            log.error("policy %s failed", seat.status.policy, exc_info=error)
        seat.status.last_error = f"{type(error).__name__}: {error}"[:200]
        self._replace(seat, seat.guard.raised(seat.status.last_error))

    def _replace(self, seat: Arm | Shadow, why: str) -> None:
        if not why or seat.is_out:
            return
        status = seat.status
        if isinstance(status, ArmStatus):
            status.replaced = why
            self._on_replaced(status.arm, status.policy, why)
        else:
            status.stopped = why
            self._on_replaced("shadow", status.policy, why)


def note_end(trace: Trace, outcome: Outcome | None, *, plan: Plan, is_error: bool) -> None:
    """How a request ended counts for the arm that placed it, and for shadows that would have placed it so.

    `plan` is the one that was carried out; without an outcome there was no answer.
    """
    trace.arm.ended(outcome, is_error=is_error)
    if outcome is None or outcome.ttft_s is None:
        return
    for pick in trace.shadows:
        if (pick.choice.worker_id, pick.plan) == (outcome.worker_id, plan):
            _add_error(pick.shadow.status.prediction_error, pick.choice.ttft_s, outcome.ttft_s)


def total_cost(terms: Mapping[str, float]) -> float:
    """What a policy compared: its own total where it names one, else the sum of its terms."""
    total = terms.get("total", terms.get("cost"))
    return sum(terms.values()) if total is None else total


def _worker(choice: Choice, workers: Sequence[WorkerView]) -> WorkerView:
    for worker in workers:
        if worker.worker_id == choice.worker_id:
            return worker
    raise LookupError(f"{choice.worker_id!r} was not offered")


def _add_error(errors: Distribution, predicted_s: float | None, seen_s: float) -> None:
    if predicted_s is not None and math.isfinite(predicted_s) and seen_s > 0:
        errors.add(abs(predicted_s - seen_s) / seen_s)
