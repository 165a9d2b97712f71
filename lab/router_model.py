"""One router's mind on virtual time: its own view, index, feeds, chooser and policy, without its shell."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..bus.ids import HandoffToken, RequestId, WorkerId
from ..bus.messages import Heartbeat, KvEvents, KvSnapshot, SamplingParams
from ..router.chooser import Ask, Chooser, Chosen
from ..router.config import RouterConfig
from ..router.generation import Generation
from ..router.index import PrefixIndex
from ..router.kv_feed import FeedMode, KvFeed
from ..router.policies.base import Policy
from ..router.request import Instruction, RequestMachine
from ..router.truth import TruthCheck
from ..router.view import ClusterView
from .pool import EPOCH, SimWorker
from .scenario import MODEL
from .traces import Turn


class RouterModel:
    """What the shell (`replay`) tells it is what `router.membership` would tell it; nothing is ever lost here."""

    def __init__(
        self,
        policy: Policy,
        *,
        local_prefill_tokens_max: int,
        block_tokens: int,
        rng: random.Random,
    ) -> None:
        defaults = RouterConfig()
        self.index_blocks_max = 0
        self.ttft_errors: list[float] = []  # |predicted - seen| / seen, where the policy predicts
        self.itl_errors: list[float] = []
        self._block_tokens = block_tokens
        self._view = ClusterView(suspect_s=defaults.suspect_s, dead_s=defaults.dead_s)
        self._index = PrefixIndex()
        self._feeds: dict[WorkerId, KvFeed] = {}
        self._truth = TruthCheck()
        self._chooser = Chooser(
            self._view, self._index, policy, local_prefill_tokens_max=local_prefill_tokens_max, rng=rng
        )

    @property
    def policy_failures(self) -> int:
        """How often least loaded had to choose instead."""
        return self._chooser.failures

    def join(self, worker: SimWorker) -> None:
        """A worker has shown its card; its prefix cache is empty."""
        self._view.join(worker.card, worker.heartbeat(0.0), 0.0)
        feed = self._feeds[worker.worker_id] = KvFeed(self._index, worker.worker_id)
        feed.on_snapshot(KvSnapshot(worker.worker_id, EPOCH, 0, b""))

    def on_heartbeat(self, heartbeat: Heartbeat, now: float) -> None:
        """As `Membership` does."""
        self._view.heard(heartbeat, now)
        needs_snapshot = self._feeds[heartbeat.worker_id].on_heartbeat(heartbeat.kv_event_seq)
        assert not needs_snapshot, "nothing is lost here"

    def on_kv_events(self, message: KvEvents) -> None:
        """As `Membership` does."""
        needs_snapshot = self._feeds[message.worker_id].on_events(message)
        assert not needs_snapshot, "nothing is lost here"
        self.index_blocks_max = max(self.index_blocks_max, len(self._index))

    def generation(self, index: int, turn: Turn, deadline_s: float) -> Generation:
        """The request as the router's API would hand it over; its tokens are known by their hashes alone."""
        sampling = SamplingParams(max_tokens=turn.output_tokens)
        return Generation(RequestId(f"{index:032x}"), MODEL, b"", turn.prompt_tokens, sampling, deadline_s)

    def pick(
        self, machine: RequestMachine, turn: Turn, chain: Sequence[int], exclude: frozenset[WorkerId], now: float,
        before: Chosen | None = None,
    ) -> tuple[Chosen | None, list[Instruction]]:  # fmt: skip
        """Ask the policy and tell the machine; `before`: where the request was to go, and does not."""
        if before is not None:
            self._chooser.released(before)
        generation = machine.generation
        ask = Ask(
            request_id=generation.request_id,
            model=MODEL,
            prompt_tokens=turn.prompt_tokens,
            max_tokens=turn.output_tokens,
            hashes=lambda block_tokens: chain[: turn.prompt_tokens // block_tokens],
            deadline_s=generation.deadline_s,
            session_id=turn.session,
        )
        chosen = self._chooser.choose(ask, exclude, now)
        if chosen is None:
            return None, machine.nothing_to_pick()
        self._chooser.placed(chosen, now)
        token = HandoffToken(int(generation.request_id, 16).to_bytes(16, "little"))
        worker = chosen.worker.worker_id
        return chosen, machine.picked(worker, chosen.plan, chosen.choice.why, token, prefill_ranks=chosen.prefill_ranks)

    def assign(self, worker: WorkerId, index: int, turn: Turn) -> None:
        """The request counts as load of the worker."""
        tokens = turn.prompt_tokens + turn.output_tokens
        self._view.assign(worker, index, -(-tokens // self._block_tokens))

    def release(self, worker: WorkerId, index: int, chosen: Chosen | None) -> None:
        """It does not any more."""
        self._view.release(worker, index)
        if chosen is not None:
            self._chooser.computed(chosen)

    def claimed(self, chosen: Chosen, worker: WorkerId, now: float) -> None:
        """A prefill worker computes its prompt."""
        self._chooser.claimed(chosen, worker, now)

    def first_token(self, chosen: Chosen, cached_tokens: int) -> None:
        """Its prompt is computed; what the engine had of it in its cache, as `Membership` uses it. No snapshot is needed here."""
        self._chooser.computed(chosen)
        worker = chosen.worker
        feed = self._feeds[worker.worker_id]
        blocks = worker.hit_blocks if feed.mode is FeedMode.EXACT else chosen.told_blocks
        self._truth.observe(
            worker.worker_id,
            told_tokens=chosen.told_blocks * worker.block_tokens,
            predicted_tokens=blocks * worker.block_tokens,
            cached_tokens=cached_tokens,
            prompt_tokens=chosen.request.prompt_tokens,
        )
        feed.on_truth(has_drifted=self._truth.has_drifted(worker.worker_id))
        self._view.trust(worker.worker_id, feed.mode.value)

    def observe(
        self, chosen: Chosen, prefill_worker: WorkerId | None, cached_tokens: int, *, ttft_s: float, itl_s: float | None,
        output_tokens: int, now: float,
    ) -> None:  # fmt: skip
        """A request has ended."""
        outcome = chosen.outcome(
            prefill_worker=prefill_worker,
            cached_tokens=cached_tokens,
            ttft_s=ttft_s,
            itl_s=itl_s,
            output_tokens=output_tokens,
        )
        if outcome.predicted_ttft_s is not None:
            self.ttft_errors.append(abs(outcome.predicted_ttft_s - ttft_s) / ttft_s)
        if outcome.predicted_itl_s is not None and itl_s:
            self.itl_errors.append(abs(outcome.predicted_itl_s - itl_s) / itl_s)
        self._chooser.observe(outcome, now)
