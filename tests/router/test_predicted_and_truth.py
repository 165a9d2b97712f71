"""Predicted blocks, the truth check and what the chooser makes of both."""

from __future__ import annotations

import array
import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.bus.block_hash import block_hashes_of, chain_seed
from hocket.bus.ids import RequestId, WorkerId
from hocket.bus.messages import BlockStored, Heartbeat, KvEvents, KvSnapshot, WorkerCard
from hocket.router.chooser import Ask, Chooser
from hocket.router.index import PrefixIndex
from hocket.router.kv_feed import FeedMode, KvFeed
from hocket.router.policies.kv import KvPolicy
from hocket.router.predicted import APPROXIMATE_TTL_S, PREDICTED_TTL_S, PredictedIndex
from hocket.router.truth import OBSERVATIONS_MIN, TruthCheck
from hocket.router.view import ClusterView

A, B = WorkerId("a"), WorkerId("b")
PROMPT = range(100, 164)
HASHES = block_hashes_of(PROMPT, 4)


def ask(name: str, tokens: range = PROMPT, tenant: str = "") -> Ask:
    parent = chain_seed(tenant)
    return Ask(RequestId(name), "m", len(tokens), 8, lambda size: block_hashes_of(tokens, size, parent=parent))


class Pool:
    """Decode workers `a` and `b`, and a chooser over them."""

    def __init__(self) -> None:
        self.view, self.index = ClusterView(suspect_s=1.5, dead_s=3.0), PrefixIndex()
        for worker in (A, B):
            card = WorkerCard(worker, "decode", 1, "m", "f", block_tokens=4, kv_blocks=40, slots=9, max_model_len=999)
            self.view.join(card, Heartbeat(worker, 1, "decode", kv_blocks_free=40), 0.0)
            self.index.add_worker(worker)
        self.chooser = Chooser(self.view, self.index, KvPolicy(), local_prefill_tokens_max=0, rng=random.Random(1))

    def hits(self, request: Ask, now: float) -> dict[WorkerId, int]:
        chosen = self.chooser.choose(request, frozenset(), now)
        assert chosen is not None
        return {worker.worker_id: worker.hit_blocks for worker in chosen.candidates if worker.hit_blocks}

    def place(self, request: Ask, now: float) -> WorkerId:
        chosen = self.chooser.choose(request, frozenset(), now)
        assert chosen is not None
        self.chooser.placed(chosen, now)
        return chosen.worker.worker_id


def test_a_burst_of_siblings_goes_together_before_any_event():
    pool = Pool()
    first = pool.place(ask("1"), 0.0)
    assert {pool.place(ask(str(i)), 0.1) for i in range(2, 6)} == {first}
    assert pool.hits(ask("9"), 0.2) == {first: 16}


def test_another_tenant_with_the_same_prompt_has_no_hit():
    pool = Pool()
    pool.place(ask("1", tenant="x"), 0.0)
    assert pool.hits(ask("2", tenant="y"), 0.1) == {}


def test_a_prediction_that_no_event_confirms_ends():
    pool = Pool()
    pool.place(ask("1"), 0.0)
    assert pool.hits(ask("2"), PREDICTED_TTL_S + 0.1) == {}


def test_a_worker_that_is_not_exact_is_remembered_for_longer():
    pool = Pool()
    for worker in (A, B):
        pool.view.trust(worker, "approximate")
    first = pool.place(ask("1"), 0.0)
    assert pool.hits(ask("2"), APPROXIMATE_TTL_S - 1.0) == {first: 16}
    assert pool.hits(ask("2"), APPROXIMATE_TTL_S + 0.1) == {}


def test_a_request_that_failed_takes_its_predictions_along_but_not_what_was_told():
    pool = Pool()
    chosen = pool.chooser.choose(ask("1"), frozenset(), 0.0)
    assert chosen is not None
    pool.chooser.placed(chosen, 0.0)
    pool.index.store(chosen.worker.worker_id, HASHES[:3])
    pool.chooser.released(chosen)
    assert pool.hits(ask("2"), 0.1) == {chosen.worker.worker_id: 3}
    assert pool.index.blocks_of(chosen.worker.worker_id) == 3


def test_a_request_without_a_whole_block_can_be_released():
    pool = Pool()
    chosen = pool.chooser.choose(ask("1", range(3)), frozenset(), 0.0)
    assert chosen is not None
    pool.chooser.placed(chosen, 0.0)
    pool.chooser.released(chosen)
    PredictedIndex().released(A, RequestId("1"))
    assert pool.hits(ask("2"), 0.1) == {}


def test_blocks_that_a_sibling_placed_since_outlive_the_request_that_failed():
    index = PredictedIndex()
    index.placed(A, RequestId("1"), HASHES, until_s=5.0, capacity=40)
    index.placed(A, RequestId("2"), HASHES[:4], until_s=5.0, capacity=40)
    index.released(A, RequestId("1"))
    assert index.hit_blocks(HASHES, 1.0) == {A: 4}


def test_a_full_prediction_loses_the_oldest_prompt_first_and_its_end_before_its_start():
    index = PredictedIndex()
    other = block_hashes_of(range(40), 4)
    index.placed(A, RequestId("1"), HASHES, until_s=5.0, capacity=16)
    index.placed(A, RequestId("2"), other[:6], until_s=5.0, capacity=16)
    assert index.hit_blocks(HASHES, 1.0) == {A: 10}
    assert index.hit_blocks(other, 1.0) == {A: 6}


class PlainPredictions:
    """Block by block: at each worker, when it ends and whose it is, the oldest first."""

    def __init__(self, blocks_max: int) -> None:
        self.blocks_max = blocks_max
        self.held: dict[WorkerId, dict[int, tuple[float, int]]] = {A: {}, B: {}}

    def placed(self, worker: WorkerId, request: int, chain: list[int], until_s: float, capacity: int) -> None:
        blocks = self.held[worker]
        self.released(worker, request)
        for block in reversed(chain[:capacity]):  # In a chain the end is older than the start.
            blocks.pop(block, None)
            blocks[block] = until_s, request
        others = sum(map(len, self.held.values())) - len(blocks)
        for block in list(blocks)[: max(0, len(blocks) - min(capacity, self.blocks_max - others))]:
            del blocks[block]

    def released(self, worker: WorkerId, request: int) -> None:
        for block, (_, owner) in list(self.held[worker].items()):
            if owner == request:
                del self.held[worker][block]

    def hit_blocks(self, chain: list[int], now: float) -> dict[WorkerId, int]:
        for blocks in self.held.values():
            for block, (until_s, _) in list(blocks.items()):
                if until_s <= now:
                    del blocks[block]
        found = {
            worker: next((place for place, block in enumerate(chain) if block not in blocks), len(chain))
            for worker, blocks in self.held.items()
        }
        return {worker: depth for worker, depth in found.items() if depth}


CHAINS = [block_hashes_of([*range(shared), *range(100 * own, 100 * own + 12 - shared)], 1) for own, shared in
          ((1, 0), (1, 3), (2, 3), (3, 7), (4, 7), (5, 11))]  # fmt: skip
"""Prompts of 12 blocks that share 3, 7 or 11 of them."""

STEP = st.tuples(
    st.sampled_from(["placed", "placed", "placed", "released", "removed"]),
    st.sampled_from([A, B]),
    st.integers(0, 5),  # request, and its prompt
    st.integers(0, 12),  # blocks
    st.integers(0, 20),  # that the worker has room for
    st.sampled_from([1.0, 5.0, 20.0]),  # seconds it counts
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEP, max_size=40), st.sampled_from([8, 15, 100]), st.lists(st.integers(0, 12)))
def test_predictions_equal_those_of_a_plain_list_of_blocks(
    steps: list[tuple[str, WorkerId, int, int, int, float]], blocks_max: int, asked: list[int]
):
    index, model, now = PredictedIndex(blocks_max), PlainPredictions(blocks_max), 0.0
    for number, (what, worker, request, length, capacity, ttl_s) in enumerate(steps):
        now += 0.5
        chain = CHAINS[request][:length]
        if what == "placed":
            index.placed(worker, RequestId(str(request)), chain, until_s=now + ttl_s, capacity=capacity)
            model.placed(worker, request, chain, now + ttl_s, capacity)
        elif what == "released":
            index.released(worker, RequestId(str(request)))
            model.released(worker, request)
        else:
            index.remove_worker(worker)
            model.held[worker].clear()
        for prompt in CHAINS:
            length = asked[number % len(asked)] if asked else 12
            assert index.hit_blocks(prompt[:length], now) == model.hit_blocks(prompt[:length], now)
        assert len(index) == sum(map(len, model.held.values())) <= blocks_max
    assert index.hit_blocks(CHAINS[0], now + 20.0) == {}
    assert len(index) == 0


def test_prompts_that_have_ended_leave_nothing_in_memory():
    index = PredictedIndex()

    def place(first: int, prompts: int) -> int:
        for number in range(first, first + prompts):
            chain = block_hashes_of([*range(8), *range(number, number + 24)], 1)
            index.placed(A, RequestId(str(number)), chain, until_s=number + 5.0, capacity=400)
            index.hit_blocks(chain, float(number))
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        few = place(1000, 100)
        assert place(2000, 1000) < few + 20_000  # A thousand prompts are a megabyte.
    finally:
        tracemalloc.stop()


def test_the_view_of_a_worker_follows_its_load():
    pool = Pool()
    pool.hits(ask("1"), 0.0)
    pool.view.assign(A, 7, 30)
    chosen = pool.chooser.choose(ask("1"), frozenset(), 0.0)
    assert chosen is not None
    assert [worker.in_flight_blocks for worker in chosen.candidates] == [30, 0]
    pool.view.release(A, 7)
    pool.view.heard(Heartbeat(A, 1, "decode", running=5), 0.1)
    chosen = pool.chooser.choose(ask("1"), frozenset(), 0.2)
    assert chosen is not None
    assert [(worker.in_flight_blocks, worker.running) for worker in chosen.candidates] == [(0, 5), (0, 0)]


def test_drift_needs_several_wrong_predictions_and_right_ones_end_it():
    truth = TruthCheck()

    def see(cached: int) -> None:
        truth.observe(A, told_tokens=64, predicted_tokens=64, cached_tokens=cached, prompt_tokens=64)

    for _ in range(OBSERVATIONS_MIN - 1):
        see(0)
    assert not truth.has_drifted(A)
    see(0)
    assert truth.has_drifted(A)
    for _ in range(30):
        see(63)  # The engine computes the last token in any case.
    assert not truth.has_drifted(A)
    assert not truth.has_drifted(B)


def test_whether_a_sibling_was_there_in_time_is_no_drift_but_what_nobody_told_of_is():
    truth = TruthCheck()

    def see(worker: WorkerId, told: int, predicted: int, cached: int) -> float:
        return truth.observe(
            worker, told_tokens=told, predicted_tokens=predicted, cached_tokens=cached, prompt_tokens=64
        )

    for cached in (16, 32, 48, 63):
        assert see(A, 16, 64, cached) == 0.0
    assert see(A, 16, 48, 0) == pytest.approx(0.25 / 5)  # Less than its events tell.
    assert see(B, 16, 32, 48) == 0.25  # More than anybody knew of.
    assert truth.drift(B) == 0.25
    truth.forget(B)
    assert truth.drift(B) is None


def snapshot(seq: int, hashes: list[int], *, is_complete: bool = True) -> KvSnapshot:
    return KvSnapshot(A, 1, seq, array.array("Q", hashes).tobytes(), is_complete)


def test_a_snapshot_that_was_cut_leaves_the_worker_approximate_and_events_still_count():
    index = PrefixIndex()
    feed = KvFeed(index, A)
    assert not feed.on_snapshot(snapshot(3, HASHES[:4], is_complete=False))
    assert feed.mode is FeedMode.APPROXIMATE
    assert not feed.on_events(KvEvents(A, 1, 4, [BlockStored(HASHES[4:6])]))
    assert index.hit_blocks(HASHES) == {A: 6}
    assert feed.on_events(KvEvents(A, 1, 6, [BlockStored(HASHES[6:7])]))
    assert not feed.on_snapshot(snapshot(6, HASHES[:7]))
    assert feed.mode is FeedMode.EXACT


def test_drift_asks_for_one_snapshot_and_the_mode_returns_with_the_truth():
    feed = KvFeed(PrefixIndex(), A)
    feed.on_snapshot(snapshot(0, []))
    assert feed.on_truth(has_drifted=True)
    assert not feed.on_truth(has_drifted=True)
    assert not feed.on_snapshot(snapshot(0, HASHES))
    assert feed.mode is FeedMode.APPROXIMATE
    assert not feed.on_truth(has_drifted=False)
    assert feed.mode is FeedMode.EXACT
