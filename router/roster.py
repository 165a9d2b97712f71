"""The workers of a model as policies see them, kept from one decision to the next: only what has changed is made again. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from msgspec.structs import replace

from ..bus.ids import WorkerId
from .policies.base import PrefillView, WorkerView
from .view import ClusterView, Member


class Roster:
    """Decode workers that may get a request for `model`, and prefill workers for them, in the order of their ids.

    It holds until `ClusterView.version` changes. `queued(worker)`: prompt tokens that this router has placed there.
    """

    def __init__(
        self, view: ClusterView, model: str, exclude: Collection[WorkerId], queued: Callable[[WorkerId], int]
    ) -> None:
        self.members = view.candidates(model, exclude)
        fingerprints = {member.card.fingerprint for member in self.members}
        self.prefill = view.prefill_members(model, fingerprints)
        self.prefill_ranks = {fingerprint: view.prefill_ranks(model, fingerprint) for fingerprint in fingerprints}
        self.block_sizes = sorted({member.card.block_tokens for member in (*self.members, *self.prefill)})
        self.places = {member.card.worker_id: place for place, member in enumerate(self.members)}
        self._queued = queued
        self._prefill_places = {member.card.worker_id: place for place, member in enumerate(self.prefill)}
        self._cold_prefill = [prefill_view(member, queued(member.card.worker_id)) for member in self.prefill]
        self._cold = [worker_view(member, queued(member.card.worker_id)) for member in self.members]

    def refresh(self, workers: Iterable[WorkerId]) -> None:
        """Something about these workers has changed; those that are not here are ignored."""
        for worker in workers:
            place = self.places.get(worker)
            if place is not None:
                self._cold[place] = worker_view(self.members[place], self._queued(worker))
            elif (place := self._prefill_places.get(worker)) is not None:
                self._cold_prefill[place] = prefill_view(self.prefill[place], self._queued(worker))

    def views(self, hit_blocks: Mapping[WorkerId, int]) -> list[WorkerView]:
        """All decode workers, with what each of them knows of a prompt."""
        views, places = self._cold.copy(), self.places
        for worker, blocks in hit_blocks.items():
            place = places.get(worker)
            if place is not None:
                views[place] = replace(views[place], hit_blocks=blocks)
        return views

    def prefill_views(
        self, hit_blocks: Mapping[WorkerId, int], queued_elsewhere: Mapping[WorkerId, int]
    ) -> list[PrefillView]:
        """All prefill workers, the same; `queued_elsewhere`: prompt tokens of other routers' jobs that wait for them."""
        views, places = self._cold_prefill.copy(), self._prefill_places
        for worker in places.keys() & (hit_blocks.keys() | queued_elsewhere.keys()):
            view = views[places[worker]]
            queued_tokens = view.queued_tokens + queued_elsewhere.get(worker, 0)
            views[places[worker]] = replace(view, hit_blocks=hit_blocks.get(worker, 0), queued_tokens=queued_tokens)
        return views


def worker_view(member: Member, local_prefill_tokens: int) -> WorkerView:
    """The member as a policy sees it, without a prefix hit."""
    card, heartbeat = member.card, member.heartbeat
    return WorkerView(
        worker_id=card.worker_id,
        block_tokens=card.block_tokens,
        slots=card.slots,
        kv_blocks=card.kv_blocks,
        can_prefill_locally=card.can_prefill_locally,
        hit_blocks=0,
        in_flight=len(member.in_flight) + member.others_in_flight,
        in_flight_blocks=member.in_flight_blocks + member.others_blocks,
        running=heartbeat.running,
        waiting=heartbeat.waiting,
        kv_blocks_free=heartbeat.kv_blocks_free,
        fingerprint=card.fingerprint,
        local_prefill_tokens=local_prefill_tokens,
        index_mode=member.index_mode,
        prefill_tokens_per_s=heartbeat.prefill_tokens_per_s,
    )


def prefill_view(member: Member, queued_tokens: int) -> PrefillView:
    """A prefill worker as a policy sees it, without a prefix hit."""
    card, heartbeat = member.card, member.heartbeat
    return PrefillView(
        worker_id=card.worker_id,
        fingerprint=card.fingerprint,
        block_tokens=card.block_tokens,
        slots=card.slots,
        hit_blocks=0,
        running=heartbeat.running,
        waiting=heartbeat.waiting,
        queued_tokens=queued_tokens,
        prefill_tokens_per_s=heartbeat.prefill_tokens_per_s,
    )
