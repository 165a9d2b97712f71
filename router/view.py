"""What this router knows of the workers: who lives, how busy, with how much of our work. Pure state.

A worker is taken in when its card is known and it has given a sign of life, is suspect after `suspect_s` of silence (no
new work, and the router asks it), and dead after `dead_s` or when the server says that nobody listens. While our own
connection is down, and for `dead_s` after, no worker's clock runs. One whose heartbeats show no step for `STALL_S`, though
requests wait for one there, gets new work only when all others are like that: a step may be long, and the worker itself
decides whether its engine hangs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from ..bus.ids import WorkerId
from ..bus.messages import Heartbeat, WorkerCard
from .policies.base import IndexMode

STALL_S = 3.0


@dataclass(slots=True)
class Member:
    """One live worker."""

    card: WorkerCard
    seen_s: float
    heartbeat: Heartbeat
    is_suspect: bool = False
    moved_s: float = 0.0  # when its engine was idle or had made a step, as far as we heard
    is_stalled: bool = False
    in_flight: dict[int, int] = field(default_factory=dict)  # our streams on it -> KV blocks they may need
    in_flight_blocks: int = 0
    others_in_flight: int = 0  # streams of the other routers on it, as they last said
    others_blocks: int = 0
    index_mode: IndexMode = "exact"

    @property
    def can_take_work(self) -> bool:
        return not self.is_suspect and not self.heartbeat.is_draining


class ClusterView:
    """The members, by id, in the order of their ids."""

    def __init__(self, *, suspect_s: float, dead_s: float) -> None:
        self.version = 0  # of who lives and who can take work
        self._changed: set[WorkerId] = set()
        self._suspect_s = suspect_s
        self._dead_s = dead_s
        self._members: dict[WorkerId, Member] = {}
        self._frozen_until_s = 0.0

    def get(self, worker: WorkerId) -> Member | None:
        """The member, if it lives."""
        return self._members.get(worker)

    def members(self, role: str | None = None) -> list[Member]:
        """All, or those of one role, in the order of their ids."""
        return [member for member in self._members.values() if role in (None, member.card.role)]

    def join(self, card: WorkerCard, heartbeat: Heartbeat, now: float) -> Member:
        """Take a worker in; a worker that is known starts over."""
        member = Member(card, now, heartbeat, moved_s=now)
        self._members[card.worker_id] = member
        self._members = dict(sorted(self._members.items()))
        self.version += 1
        return member

    def leave(self, worker: WorkerId) -> Member | None:
        """Forget a worker; returns what was known of it."""
        self.version += 1
        return self._members.pop(worker, None)

    def heard(self, heartbeat: Heartbeat, now: float) -> bool:
        """A sign of life. False when the worker, or this incarnation of it, is not known: fetch its card."""
        member = self._members.get(heartbeat.worker_id)
        if member is None or member.card.epoch != heartbeat.epoch:
            return False
        before = member.can_take_work, member.is_stalled
        if not heartbeat.due or heartbeat.steps != member.heartbeat.steps:
            member.moved_s = now
        member.is_stalled = now - member.moved_s >= STALL_S
        member.heartbeat = heartbeat
        member.seen_s = now
        member.is_suspect = False
        self.version += (member.can_take_work, member.is_stalled) != before
        self._changed.add(heartbeat.worker_id)
        return True

    def freeze(self, now: float) -> None:
        """Our own connection is down, or was until now: silence means nothing until `dead_s` from now."""
        self._frozen_until_s = now + self._dead_s
        for member in self._members.values():
            member.moved_s = now

    def silent(self, now: float) -> tuple[list[WorkerId], list[WorkerId]]:
        """Workers that became suspect just now, and workers that are dead (still members: call `leave`)."""
        if now < self._frozen_until_s:
            return [], []
        newly_suspect, dead = [], []
        for worker, member in self._members.items():
            silence_s = now - max(member.seen_s, self._frozen_until_s - self._dead_s)
            if silence_s >= self._dead_s:
                dead.append(worker)
            elif silence_s >= self._suspect_s and not member.is_suspect:
                member.is_suspect = True
                self.version += 1
                newly_suspect.append(worker)
        return newly_suspect, dead

    def assign(self, worker: WorkerId, stream_id: int, blocks: int) -> None:
        """A stream of ours is on `worker` now and may need `blocks` KV blocks."""
        member = self._members.get(worker)
        if member is not None and stream_id not in member.in_flight:
            member.in_flight[stream_id] = blocks
            member.in_flight_blocks += blocks
            self._changed.add(worker)

    def release(self, worker: WorkerId, stream_id: int) -> None:
        """The stream is not on `worker` any more."""
        member = self._members.get(worker)
        if member is not None:
            member.in_flight_blocks -= member.in_flight.pop(stream_id, 0)
            self._changed.add(worker)

    def trust(self, worker: WorkerId, mode: IndexMode) -> None:
        """How far the index is to be believed for `worker` from now on."""
        member = self._members.get(worker)
        if member is not None:
            member.index_mode = mode
            self._changed.add(worker)

    def take_changed(self) -> set[WorkerId]:
        """Workers that a policy may see differently than when this was asked last."""
        changed, self._changed = self._changed, set()
        return changed

    def block_tokens(self, model: str) -> int:
        """Tokens in one KV block of the workers that serve `model`; 0: there are none."""
        cards = (member.card for member in self._members.values())
        return next((card.block_tokens for card in cards if card.role == "decode" and card.model == model), 0)

    def share(self, worker: WorkerId, streams: int, blocks: int) -> None:
        """So much of the other routers is on `worker`."""
        member = self._members.get(worker)
        if member is not None:
            member.others_in_flight, member.others_blocks = streams, blocks
            self._changed.add(worker)

    def candidates(self, model: str, exclude: Iterable[WorkerId]) -> list[Member]:
        """Decode workers that may get a new request for `model`."""
        return _moving(
            member
            for worker, member in self._members.items()
            if member.card.role == "decode"
            and member.card.model == model
            and member.can_take_work
            and worker not in exclude
        )

    def prefill_members(self, model: str, fingerprints: Collection[str]) -> list[Member]:
        """Prefill workers for `model` that take work and whose KV has one of these fingerprints."""
        return _moving(
            member
            for member in self._members.values()
            if member.card.role == "prefill"
            and member.card.model == model
            and member.card.fingerprint in fingerprints
            and member.can_take_work
        )

    def prefill_ranks(self, model: str, fingerprint: str) -> int:
        """The tensor-parallel size that most of the prefill workers with this KV have; 0: there is none."""
        sizes = [member.card.tp_size for member in self.prefill_members(model, (fingerprint,))]
        return max(sorted(set(sizes)), key=sizes.count, default=0)

    def models(self) -> list[str]:
        """Models that a decode worker serves."""
        return sorted({member.card.model for member in self._members.values() if member.card.role == "decode"})


def _moving(members: Iterable[Member]) -> list[Member]:
    """Without those whose engine does not move, unless none moves."""
    found = list(members)
    if any(member.is_stalled for member in found):
        return [member for member in found if not member.is_stalled] or found
    return found
