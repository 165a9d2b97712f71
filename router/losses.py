"""What a worker's death means for the requests that it had: asks the judge, then each request's machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from ..bus.jobs_pull import PULL_EXPIRES_S
from .blame import Aboard, Blame, Quarantined, Verdict
from .generation import Generation
from .live import Live
from .request import Instruction, Pick
from .view import ClusterView, Member

log = logging.getLogger(__name__)


class WorkerLosses:
    """`carry_out(live, instructions)` does what a machine says; `lives` are the requests in flight, by stream."""

    def __init__(
        self,
        lives: Mapping[int, Live],
        view: ClusterView,
        carry_out: Callable[[Live, list[Instruction]], None],
        *,
        clock: Callable[[], float],
    ) -> None:
        self._lives = lives
        self._view = view
        self._carry_out = carry_out
        self._clock = clock
        self._blame = Blame()

    def on_lost(self, member: Member, is_silent: bool) -> None:
        """A worker that only hangs has open pulls: what the queue gave it since it was heard last may never be claimed."""
        worker = member.card.worker_id
        can_prefill = bool(self._view.members("prefill"))
        verdicts = self._judge(member)
        hangs = is_silent and member.card.role == "prefill"
        for live in list(self._lives.values()):
            heard_s = member.seen_s - PULL_EXPIRES_S
            may_be_swallowed = hangs and live.machine.is_unclaimed and live.published_s > heard_s
            nak_delay_s, verdict = PULL_EXPIRES_S if is_silent else 0.0, verdicts.get(live.stream_id, Verdict.AGAIN)
            self._carry_out(live, live.machine.worker_lost(worker, nak_delay_s, verdict))
            if not can_prefill or may_be_swallowed:
                self._carry_out(live, live.machine.prefill_gone())

    def _judge(self, member: Member) -> dict[int, Verdict]:
        """Nobody is to blame when a worker leaves that said so before."""
        heartbeat, worker = member.heartbeat, member.card.worker_id
        if heartbeat.is_draining:
            return {}
        aboard = [
            Aboard(live.stream_id, live.machine.generation, live.machine.has_token)
            for live in self._lives.values()
            if live.machine.was_on(worker)
        ]
        is_shared = member.others_in_flight > 0 or heartbeat.running + heartbeat.waiting > len(aboard)
        verdicts = self._blame.lost(aboard, self._clock(), is_shared=is_shared)
        for one in aboard:
            if verdicts[one.stream_id] is Verdict.GUILTY:
                log.error("workers die of a request", extra={"request_id": one.generation.request_id})
        return verdicts

    def check(self, generation: Generation) -> None:
        """Raises Quarantined when workers died of the same before."""
        if self._blame.is_guilty(generation, self._clock()):
            raise Quarantined

    def enter(self, stream_id: int, generation: Generation) -> None:
        """A request comes."""
        self._blame.enter(stream_id, generation, self._clock())

    def must_wait(self, live: Live, pick: Pick) -> bool:
        """Whether it has to wait for its turn, to go alone; then it is given its pick later."""
        if not self._blame.must_wait(live.stream_id):
            return False
        live.parked = pick
        return True

    def made_token(self, stream_id: int) -> None:
        """Its worker has survived its prompt."""
        self._give_turn(self._blame.moved_on(stream_id))

    def ended_well(self, stream_id: int) -> None:
        """It is cleared."""
        self._blame.clear(stream_id)

    def left(self, stream_id: int) -> None:
        """It has ended somehow."""
        self._give_turn(self._blame.leave(stream_id))

    def _give_turn(self, stream_id: int | None) -> None:
        live = self._lives.get(stream_id) if stream_id is not None else None
        if live is not None and live.parked is not None:
            self._carry_out(live, [live.parked])
