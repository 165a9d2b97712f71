"""Cluster view, prefix index and KV feed: pure state, no clock of their own."""

from __future__ import annotations

import array
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.bus.block_hash import block_hashes_of
from hocket.bus.ids import WorkerId
from hocket.bus.messages import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Heartbeat,
    KvEvent,
    KvEvents,
    KvSnapshot,
    WorkerCard,
)
from hocket.router.index import PrefixIndex
from hocket.router.kv_feed import FeedMode, KvFeed
from hocket.router.view import ClusterView

A, B = WorkerId("a"), WorkerId("b")


def card(worker: WorkerId, role: str = "decode", fingerprint: str = "f") -> WorkerCard:
    return WorkerCard(
        worker, role, 1, "m", fingerprint, block_tokens=4, kv_blocks=10, slots=2, max_model_len=100
    )  # fmt: skip


def beat(worker: WorkerId, epoch: int = 1, *, is_draining: bool = False) -> Heartbeat:
    return Heartbeat(worker, epoch, "decode", is_draining=is_draining)


def view() -> ClusterView:
    return ClusterView(suspect_s=1.5, dead_s=3.0)


def test_a_worker_that_is_silent_is_suspect_and_then_dead():
    cluster = view()
    cluster.join(card(A), beat(A), 0.0)
    assert cluster.silent(1.4) == ([], [])
    assert cluster.silent(1.5) == ([A], [])
    assert cluster.candidates("m", ()) == []
    assert cluster.silent(2.0) == ([], [])
    assert cluster.silent(3.0) == ([], [A])


def test_a_worker_without_progress_gets_work_only_when_no_other_is_left():
    cluster = view()
    for worker in (A, B):
        cluster.join(card(worker), beat(worker), 0.0)
    for tenth in range(5, 50, 5):
        cluster.heard(Heartbeat(A, 1, "decode", steps=7, due=2), tenth / 10)
        cluster.heard(Heartbeat(B, 1, "decode", steps=tenth, due=2), tenth / 10)
    assert [member.card.worker_id for member in cluster.candidates("m", ())] == [B]
    assert [member.card.worker_id for member in cluster.candidates("m", (B,))] == [A]
    cluster.heard(Heartbeat(A, 1, "decode", steps=8, due=2), 5.0)
    assert [member.card.worker_id for member in cluster.candidates("m", ())] == [A, B]


def test_a_worker_that_is_idle_or_older_than_progress_is_not_without_it():
    cluster = view()
    for worker in (A, B):
        cluster.join(card(worker), beat(worker), 0.0)
    for second in range(1, 20):
        cluster.heard(Heartbeat(A, 1, "decode", steps=7), float(second))
        cluster.heard(Heartbeat(B, 1, "decode", running=3), float(second))
    assert [member.card.worker_id for member in cluster.candidates("m", ())] == [A, B]


def test_progress_that_a_router_could_not_hear_of_is_not_missed():
    cluster = view()
    for worker in (A, B):
        cluster.join(card(worker), Heartbeat(worker, 1, "decode", steps=7, due=1), 0.0)
    cluster.freeze(60.0)
    for worker in (A, B):
        cluster.heard(Heartbeat(worker, 1, "decode", steps=7, due=1), 60.5)
    cluster.heard(Heartbeat(A, 1, "decode", steps=8, due=1), 61.0)
    assert [member.card.worker_id for member in cluster.candidates("m", ())] == [A, B]


def test_a_sign_of_life_ends_the_suspicion():
    cluster = view()
    cluster.join(card(A), beat(A), 0.0)
    cluster.silent(2.0)
    assert cluster.heard(beat(A), 2.1)
    assert [member.card.worker_id for member in cluster.candidates("m", ())] == [A]


def test_another_incarnation_is_not_the_member():
    cluster = view()
    cluster.join(card(A), beat(A), 0.0)
    assert not cluster.heard(beat(A, epoch=2), 1.0)
    assert not cluster.heard(beat(B), 1.0)


def test_clocks_stand_still_after_our_own_connection_was_away():
    cluster = view()
    cluster.join(card(A), beat(A), 0.0)
    cluster.freeze(10.0)
    assert cluster.silent(12.9) == ([], [])
    assert cluster.silent(13.1) == ([], [A])


def test_draining_excluded_and_foreign_workers_are_no_candidates():
    cluster = view()
    cluster.join(card(A), beat(A, is_draining=True), 0.0)
    cluster.join(card(B), beat(B), 0.0)
    assert [member.card.worker_id for member in cluster.candidates("m", ())] == [B]
    assert cluster.candidates("m", {B}) == []
    assert cluster.candidates("other", ()) == []


def test_load_is_given_back_exactly_once():
    cluster = view()
    member = cluster.join(card(A), beat(A), 0.0)
    cluster.assign(A, 1, 5)
    cluster.assign(A, 1, 5)
    cluster.assign(A, 2, 3)
    assert member.in_flight_blocks == 8
    cluster.release(A, 1)
    cluster.release(A, 1)
    assert member.in_flight_blocks == 3


def test_an_index_finds_how_deep_each_worker_holds_a_prompt():
    index = PrefixIndex()
    index.add_worker(A)
    index.add_worker(B)
    hashes = block_hashes_of(range(40), 4)
    index.apply(A, [BlockStored(hashes[:7])])
    index.apply(B, [BlockStored(hashes[:3])])
    assert index.hit_blocks(hashes) == {A: 7, B: 3}
    assert index.hit_blocks(block_hashes_of(range(1, 41), 4)) == {}
    index.apply(A, [BlockRemoved(hashes[2:3])])
    assert index.hit_blocks(hashes) == {A: 2, B: 3}
    index.remove_worker(B)
    assert index.hit_blocks(hashes) == {A: 2}
    index.apply(A, [AllBlocksCleared()])
    assert len(index) == 0


HASHES = st.lists(st.integers(0, 11), min_size=1, max_size=6)
KV_EVENT: st.SearchStrategy[KvEvent] = st.one_of(
    HASHES.map(BlockStored), HASHES.map(BlockRemoved), st.just(AllBlocksCleared())
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([A, B]), KV_EVENT), max_size=40),
    st.lists(st.integers(0, 11), max_size=12, unique=True),
)
def test_the_index_equals_a_naive_model(events: list[tuple[WorkerId, KvEvent]], prompt: list[int]):
    index, model = PrefixIndex(), {A: set(), B: set()}
    for worker in model:
        index.add_worker(worker)
    for worker, event in events:
        index.apply(worker, [event])
        match event:
            case BlockStored(hashes=hashes):
                model[worker] |= set(hashes)
            case BlockRemoved(hashes=hashes):
                model[worker] -= set(hashes)
            case AllBlocksCleared():
                model[worker] = set()
    expected = {}
    for worker, held in model.items():
        depth = next((i for i, block in enumerate(prompt) if block not in held), len(prompt))
        if depth:
            expected[worker] = depth
    assert index.hit_blocks(prompt) == expected
    assert {worker: index.blocks_of(worker) for worker in model} == {
        worker: len(held) for worker, held in model.items()
    }


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 64), min_size=1, max_size=20),
    st.lists(st.tuples(st.integers(0, 19), st.integers(0, 63)), max_size=6),
    st.integers(0, 64),
)
def test_long_prompts_are_found_to_the_first_hole_of_each_worker(
    depths: list[int], holes: list[tuple[int, int]], asked: int
):
    chain = block_hashes_of(range(64), 1)
    index, held = PrefixIndex(), {WorkerId(str(number)): set(chain[:depth]) for number, depth in enumerate(depths)}
    for worker, blocks in held.items():
        index.add_worker(worker)
        index.store(worker, blocks)
    for number, place in holes:
        worker = WorkerId(str(number % len(depths)))
        index.drop(worker, [chain[place]])
        held[worker].discard(chain[place])
    found = {
        worker: next((place for place in range(asked) if chain[place] not in blocks), asked)
        for worker, blocks in held.items()
    }
    assert index.hit_blocks(chain[:asked]) == {worker: depth for worker, depth in found.items() if depth}


def snapshot(seq: int, hashes: set[int]) -> KvSnapshot:
    return KvSnapshot(A, 1, seq, array.array("Q", sorted(hashes)).tobytes())


@settings(max_examples=300, deadline=None)
@given(st.lists(KV_EVENT, max_size=30), st.integers(0, 2**32))
def test_a_feed_that_loses_and_repeats_messages_ends_up_equal_to_the_worker(events: list[KvEvent], seed: int):
    rng = random.Random(seed)
    index = PrefixIndex()
    feed = KvFeed(index, A)
    held: set[int] = set()
    seq = 0
    needs_snapshot = True

    def answer_snapshot() -> None:
        nonlocal needs_snapshot
        needs_snapshot = feed.on_snapshot(snapshot(seq, held))

    for event in events:
        match event:
            case BlockStored(hashes=hashes):
                held |= set(hashes)
            case BlockRemoved(hashes=hashes):
                held -= set(hashes)
            case AllBlocksCleared():
                held = set()
        seq += 1
        message = KvEvents(A, 1, seq, [event])
        for _ in range(rng.choice([0, 1, 1, 1, 2])):
            needs_snapshot = feed.on_events(message) or needs_snapshot
        if needs_snapshot and rng.random() < 0.5:
            answer_snapshot()
    needs_snapshot = feed.on_heartbeat(seq) or needs_snapshot
    if needs_snapshot or feed.mode is FeedMode.CATCHING_UP:
        answer_snapshot()
    assert feed.mode is FeedMode.EXACT
    assert {block for block in range(12) if A in index.hit_blocks([block])} == held
