"""Views that are kept from one decision to the next are those that would be made now."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import astuple

from hocket.bus.block_hash import block_hashes_of
from hocket.bus.ids import RequestId, WorkerId
from hocket.bus.messages import Heartbeat, WorkerCard
from hocket.router.chooser import Ask, Chooser
from hocket.router.index import PrefixIndex
from hocket.router.placed import SHARED
from hocket.router.policies.basic import Random
from hocket.router.roster import prefill_view, worker_view
from hocket.router.view import ClusterView

WORKERS = {WorkerId(name): role for name, role in zip("dcbapq", ["decode"] * 4 + ["prefill"] * 2, strict=True)}
MODELS = ("m", "other")
PROMPT = range(16)
STEP = st.tuples(
    st.sampled_from(["join", "leave", "beat", "beat", "assign", "release", "share", "trust", "silent", "place", "computed",
                     "claim", "elsewhere"]),
    st.sampled_from(sorted(WORKERS)),
    st.integers(0, 3),
)  # fmt: skip


class Rig:
    """A chooser, and what the tests know of the work that it placed."""

    def __init__(self) -> None:
        self.view, self.index, self.now = ClusterView(suspect_s=1.5, dead_s=99.0), PrefixIndex(), 0.0
        self.chooser = Chooser(self.view, self.index, Random(), local_prefill_tokens_max=8, rng=random.Random(1))
        self.elsewhere: dict[WorkerId, int] = {}
        self.chooser.waiting_elsewhere = lambda: self.elsewhere
        self.placed = {}
        self.waits: dict[RequestId, tuple[WorkerId | None, int]] = {}

    def step(self, what: str, worker: WorkerId, number: int) -> None:
        self.now += 0.4
        role, view = WORKERS[worker], self.view
        beat = Heartbeat(worker, 1, role, running=number, kv_blocks_free=number, is_draining=number == 3)
        match what:
            case "join":
                card = WorkerCard(worker, role, 1, MODELS[number == 2], "fg"[number == 1], 4, kv_blocks=40, slots=9,
                                  max_model_len=99, handoff_addresses=["inproc://x"])  # fmt: skip
                view.join(card, beat, self.now)
                self.index.add_worker(worker)
                self.index.store(worker, block_hashes_of(PROMPT, 4)[:number])
            case "leave":
                view.leave(worker)
                self.index.remove_worker(worker)
            case "beat":
                view.heard(beat, self.now)
            case "assign":
                view.assign(worker, number, 5)
            case "release":
                view.release(worker, number)
            case "share":
                view.share(worker, number, 2 * number)
            case "trust":
                view.trust(worker, ("exact", "approximate")[number % 2])
            case "silent":
                view.silent(self.now)
            case "elsewhere":
                self.elsewhere = {worker: number, SHARED: 3} if number else {}
            case _:
                self.work(what, worker, RequestId(str(number)))

    def work(self, what: str, worker: WorkerId, request: RequestId) -> None:
        match what:
            case "place" if chosen := self.chooser.choose(ask(request, "m"), frozenset(), self.now):
                self.chooser.placed(chosen, self.now)
                self.placed[request], self.waits[request] = chosen, chosen.waits_for
            case "computed" if request in self.placed:
                self.chooser.computed(self.placed[request])
                self.waits.pop(request, None)
            case "claim" if request in self.placed:
                self.chooser.claimed(self.placed[request], worker, self.now)
                if request in self.waits:
                    self.waits[request] = worker, self.waits[request][1]

    def queued(self, worker: WorkerId | None) -> int:
        return sum(tokens for where, tokens in self.waits.values() if where == worker)


def ask(request: RequestId, model: str) -> Ask:
    return Ask(request, model, len(PROMPT), 8, lambda size: block_hashes_of(PROMPT, size))


@settings(max_examples=300, deadline=None)
@given(st.lists(STEP, max_size=40), st.sampled_from([frozenset(), frozenset([WorkerId("a")])]))
def test_a_policy_sees_each_worker_as_it_is_now(steps: list[tuple[str, WorkerId, int]], exclude: frozenset[WorkerId]):
    rig = Rig()
    for number, step in enumerate([*((("join", worker, 0)) for worker in WORKERS), *steps]):
        rig.step(*step)
        model = MODELS[number % 5 == 4]
        members = rig.view.candidates(model, exclude)
        chosen = rig.chooser.choose(ask(RequestId("-"), model), exclude, rig.now)
        assert (chosen is None) == (not members)
        if chosen is None:
            continue
        seen = [astuple(worker)[:5] + astuple(worker)[6:] for worker in chosen.candidates]  # All but the hits.
        made = [astuple(worker_view(member, rig.queued(member.card.worker_id))) for member in members]
        assert seen == [worker[:5] + worker[6:] for worker in made]
        prefill = rig.view.prefill_members(model, {member.card.fingerprint for member in members})
        assert [(one.worker_id, one.running, one.queued_tokens) for one in chosen.request.prefill] == [
            (
                member.card.worker_id,
                member.heartbeat.running,
                prefill_view(member, rig.queued(member.card.worker_id)).queued_tokens
                + rig.elsewhere.get(member.card.worker_id, 0),
            )
            for member in prefill
        ]
        assert chosen.request.queued_prefill_tokens == rig.queued(None) + rig.elsewhere.get(SHARED, 0)
        told = rig.index.hit_blocks(block_hashes_of(PROMPT, 4))
        for one in (*chosen.candidates, *chosen.request.prefill):
            assert told.get(one.worker_id, 0) <= one.hit_blocks <= 4
