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
from ..router.kv_feed import KvFeed
from ..router.policies.base import Policy
from ..router.request import Instruction, RequestMachine
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
        feeds_prefill: bool,
        rng: random.Random,
    ) -> None:
        defaults = RouterConfig()
        self.index_blocks_max = 0
        self._block_tokens = block_tokens
        self._feeds_prefill = feeds_prefill
        self._view = ClusterView(suspect_s=defaults.suspect_s, dead_s=defaults.dead_s)
        self._index = PrefixIndex()
        self._feeds: dict[WorkerId, KvFeed] = {}
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
        if self.hears_kv_of(worker):
            feed = self._feeds[worker.worker_id] = KvFeed(self._index, worker.worker_id)
            feed.on_snapshot(KvSnapshot(worker.worker_id, EPOCH, 0, b""))

    def hears_kv_of(self, worker: SimWorker) -> bool:
        """Whether the index is told of its prefix cache."""
        return self._feeds_prefill or not worker.is_prefill

    def on_heartbeat(self, heartbeat: Heartbeat, now: float) -> None:
        """As `Membership` does."""
        self._view.heard(heartbeat, now)
        if feed := self._feeds.get(heartbeat.worker_id):
            needs_snapshot = feed.on_heartbeat(heartbeat.kv_event_seq)
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
        self, machine: RequestMachine, turn: Turn, chain: Sequence[int], exclude: frozenset[WorkerId], now: float
    ) -> tuple[Chosen | None, list[Instruction]]:
        """Ask the policy and tell the machine."""
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
        token = HandoffToken(int(generation.request_id, 16).to_bytes(16, "little"))
        worker = chosen.worker.worker_id
        return chosen, machine.picked(worker, chosen.plan, chosen.choice.why, token, prefill_ranks=chosen.prefill_ranks)

    def assign(self, chosen: Chosen, index: int, turn: Turn) -> None:
        """The request counts as load of the worker."""
        tokens = turn.prompt_tokens + turn.output_tokens
        self._view.assign(chosen.worker.worker_id, index, -(-tokens // self._block_tokens))
        self._view.work.place(index, *chosen.waits_for)

    def claimed(self, index: int, worker: WorkerId) -> None:
        """A prefill worker computes its prompt."""
        self._view.work.claim(index, worker)

    def first_token(self, index: int) -> None:
        """Its prompt is computed."""
        self._view.work.done(index)

    def release(self, worker: WorkerId, index: int) -> None:
        """It does not any more."""
        self._view.release(worker, index)

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
        self._chooser.observe(outcome, now)
