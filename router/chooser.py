"""From a request to its worker and plan: view, index and policy put together. Pure, so that a trace can be replayed on it.

The router's shell and the lab ask the same object. What it knows besides the view is the work it has placed itself: the
prompt tokens that are queued for prefill or that a decode worker still has to compute.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..bus.block_hash import block_hashes, chain_seed
from ..bus.ids import RequestId, WorkerId
from .generation import Generation
from .index import PrefixIndex
from .placed import SHARED
from .policies.base import Choice, ObservingPolicy, Outcome, Plan, Policy, RequestView, WorkerView
from .policies.basic import LeastLoaded
from .policy_set import PolicySet, Trace
from .predicted import APPROXIMATE_TTL_S, PREDICTED_TTL_S, PredictedIndex
from .roster import Roster
from .view import ClusterView
from .work import PlacedWork

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ask:
    """What has to be placed."""

    request_id: RequestId
    model: str
    prompt_tokens: int
    max_tokens: int
    hashes: Callable[[int], Sequence[int]]  # tokens a block -> the chained hashes of the prompt's whole blocks
    deadline_s: float = float("inf")
    tenant: str = ""
    session_id: str = ""
    priority: int = 0

    @classmethod
    def of(cls, generation: Generation) -> Ask:
        """What has to be known of it."""
        parent = chain_seed(generation.salt)
        return cls(
            request_id=generation.request_id,
            model=generation.model,
            prompt_tokens=generation.prompt_tokens,
            max_tokens=generation.sampling.max_tokens,
            hashes=lambda block_tokens: block_hashes(generation.packed_tokens, block_tokens, parent=parent),
            deadline_s=generation.deadline_s,
            tenant=generation.tenant,
            session_id=generation.session_id,
            priority=generation.priority,
        )


@dataclass(frozen=True, slots=True)
class Chosen:
    """Where it goes, and what was known when that was decided."""

    choice: Choice
    plan: Plan
    worker: WorkerView
    prefill_ranks: int  # tensor-parallel size of the prefill workers; 1 where none is needed
    request: RequestView
    candidates: tuple[WorkerView, ...]
    is_fallback: bool  # the policy failed, least loaded chose
    trace: Trace | None = None  # with a PolicySet: who decided

    told_blocks: int = 0  # of the worker's hit, those that its events tell of
    hashes: Mapping[int, Sequence[int]] = field(default_factory=dict)  # by tokens a block

    @property
    def waits_for(self) -> tuple[WorkerId | None, int]:
        """Who computes the prompt (None: any prefill worker), and how many of its tokens."""
        lanes = [prefill for prefill in self.request.prefill if prefill.worker_id == self.choice.lane]
        if self.plan != "local" and not lanes:
            return None, self.request.prompt_tokens
        where = self.worker if self.plan == "local" else lanes[0]
        return where.worker_id, max(1, self.request.prompt_tokens - where.hit_blocks * where.block_tokens)

    def outcome(
        self, *, prefill_worker: WorkerId | None, cached_tokens: int | None, ttft_s: float | None, itl_s: float | None,
        output_tokens: int,
    ) -> Outcome:  # fmt: skip
        """What became of it."""
        return Outcome(
            self.request.request_id, self.worker.worker_id, self.plan, prefill_worker, self.request.prompt_tokens,
            self.worker.hit_blocks, cached_tokens, ttft_s, itl_s, output_tokens, self.worker.load, self.choice.ttft_s,
            self.choice.itl_s,
        )  # fmt: skip


class Chooser:
    """Asks `policy`, and least loaded when that fails."""

    def __init__(
        self,
        view: ClusterView,
        index: PrefixIndex,
        policy: Policy,
        *,
        local_prefill_tokens_max: int,
        rng: random.Random,
    ) -> None:
        self.policy = policy
        self.failures = 0
        self._view = view
        self._index = index
        self._predicted = PredictedIndex()
        self._work = PlacedWork()
        self.waiting_elsewhere: Callable[[], Mapping[WorkerId, int]] = dict  # by lane: tokens of other routers' jobs
        self._local_prefill_tokens_max = local_prefill_tokens_max
        self._rng = rng
        self._fallback = LeastLoaded()
        self._rosters: dict[str, Roster] = {}  # by model, of `_version`
        self._version = -1

    def choose(self, ask: Ask, exclude: frozenset[WorkerId], now: float) -> Chosen | None:
        """None when no live worker outside `exclude` serves the model."""
        roster = self._roster(ask.model, exclude)
        if not roster.members:
            return None
        sizes = roster.block_sizes if ask.prompt_tokens else ()
        hashes = {block_tokens: ask.hashes(block_tokens) for block_tokens in sizes}
        told, hits = self._hit_blocks(hashes, now)
        workers = roster.views(hits)
        first_block = next((chain[0] for _, chain in sorted(hashes.items()) if chain), 0)
        request = self._request_view(ask, first_block, roster, hits)
        choice, is_fallback, trace = self._pick(request, workers, roster.places, now)
        place = roster.places[choice.worker_id]
        chosen, card = workers[place], roster.members[place].card
        plan = choice.plan or request.default_plan(chosen)
        ranks = roster.prefill_ranks[card.fingerprint]
        if not ranks or not card.handoff_addresses:
            plan = "local"
        told_blocks = told.get(chosen.worker_id, 0)
        return Chosen(
            choice, plan, chosen, ranks or 1, request, tuple(workers), is_fallback, trace, told_blocks, hashes
        )  # fmt: skip

    def placed(self, chosen: Chosen, now: float) -> None:
        """It goes there: its blocks count as held by the worker, and by the prefill worker of its lane."""
        self._work.place(chosen.request.request_id, *chosen.waits_for)
        self._predict(chosen, chosen.worker.worker_id, now)
        if chosen.plan == "remote" and chosen.choice.lane is not None:
            self._predict(chosen, chosen.choice.lane, now)

    def claimed(self, chosen: Chosen, prefill_worker: WorkerId, now: float) -> None:
        """A prefill worker computes it now."""
        self._work.claim(chosen.request.request_id, prefill_worker)
        self._predict(chosen, prefill_worker, now)

    def released(self, chosen: Chosen) -> None:
        """It failed, or goes elsewhere: what it alone would have brought to the decode worker is not there."""
        self.computed(chosen)
        self._predicted.released(chosen.worker.worker_id, chosen.request.request_id)

    def computed(self, chosen: Chosen) -> None:
        """Its prompt is computed, or nobody will."""
        self._work.done(chosen.request.request_id)

    def observe(self, outcome: Outcome, now: float) -> None:
        """Tell the policy how a request ended, if it wants to know."""
        if isinstance(self.policy, ObservingPolicy):
            self.policy.observe(outcome, now)

    def _roster(self, model: str, exclude: frozenset[WorkerId]) -> Roster:
        if exclude:
            return Roster(self._view, model, exclude, self._work.tokens)
        if self._version != self._view.version:
            self._version = self._view.version
            self._rosters.clear()
            for worker in self._predicted.workers():
                if self._view.get(worker) is None:
                    self._predicted.remove_worker(worker)
        changed = self._view.take_changed() | self._work.take_changed()
        for roster in self._rosters.values():
            roster.refresh(changed)
        if model not in self._rosters:
            roster = Roster(self._view, model, exclude, self._work.tokens)
            if not roster.members:
                return roster  # There is no end of names that nobody serves.
            self._rosters[model] = roster
        return self._rosters[model]

    def _pick(
        self, request: RequestView, workers: list[WorkerView], places: Mapping[WorkerId, int], now: float
    ) -> tuple[Choice, bool, Trace | None]:
        if isinstance(self.policy, PolicySet):
            choice, trace = self.policy.decide(request, workers, now, self._rng)
            return choice, bool(trace.failure), trace
        try:
            choice = self.policy.pick(request, workers, now, self._rng)
            if choice.worker_id not in places:
                raise LookupError(f"{choice.worker_id!r} was not offered")
            return choice, False, None
        except Exception:  # A user's policy may raise anything; the request must not pay for it.
            log.exception("policy failed, least loaded chose", extra={"request_id": request.request_id})
            self.failures += 1
            return self._fallback.pick(request, workers, now, self._rng), True, None

    def _request_view(self, ask: Ask, first_block: int, roster: Roster, hits: Mapping[WorkerId, int]) -> RequestView:
        elsewhere = self.waiting_elsewhere()
        return RequestView(
            request_id=ask.request_id,
            model=ask.model,
            prompt_tokens=ask.prompt_tokens,
            max_tokens=ask.max_tokens,
            prefill_workers=len(roster.prefill),
            local_prefill_tokens_max=self._local_prefill_tokens_max,
            tenant=ask.tenant,
            session_id=ask.session_id,
            first_block=first_block,
            priority=ask.priority,
            deadline_s=ask.deadline_s,
            prefill=tuple(roster.prefill_views(hits, elsewhere)),
            queued_prefill_tokens=self._work.tokens(None) + elsewhere.get(SHARED, 0),
        )

    def _predict(self, chosen: Chosen, worker: WorkerId, now: float) -> None:
        member = self._view.get(worker)
        if member is None or not (hashes := chosen.hashes.get(member.card.block_tokens)):
            return
        ttl_s = PREDICTED_TTL_S if member.index_mode == "exact" else APPROXIMATE_TTL_S
        self._predicted.placed(
            worker, chosen.request.request_id, hashes, until_s=now + ttl_s, capacity=member.card.kv_blocks
        )

    def _hit_blocks(
        self, hashes: Mapping[int, Sequence[int]], now: float
    ) -> tuple[dict[WorkerId, int], dict[WorkerId, int]]:
        """What the workers' events tell, and the same with what we expect: the longer run of the two counts."""
        told: dict[WorkerId, int] = {}
        hits: dict[WorkerId, int] = {}
        for chain in hashes.values():
            told |= self._index.hit_blocks(chain)
            expected = self._predicted.hit_blocks(chain, now)
            hits |= {worker: blocks for worker, blocks in expected.items() if blocks > told.get(worker, 0)}
        return told, told | hits
