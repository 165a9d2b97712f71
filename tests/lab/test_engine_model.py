"""The engine model: its formulas, its blocks, and that skipping over steps changes nothing."""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.bus.messages import BlockRemoved, BlockStored
from hocket.lab.engine_model import EngineModel, Work
from hocket.lab.timing import MockerTiming, Profile, ProfileTiming, StepLoad, Timing, load_profile, profile_names

BLOCK = 4


@dataclass
class Ears:
    """Notes what the engine tells; KV for remote work comes `delay_s` after it has its blocks."""

    heap: list[tuple[float, int, Work]] = field(default_factory=list)
    firsts: dict[int, float] = field(default_factory=dict)
    ends: dict[int, float] = field(default_factory=dict)
    prefilled: list[Work] = field(default_factory=list)
    chunks: list[tuple[int, int]] = field(default_factory=list)
    delay_s: float = 0.05

    def on_allocated(self, work: Work, now: float) -> None:
        heapq.heappush(self.heap, (now + self.delay_s, work.key, work))

    def on_chunk(self, work: Work, tokens: int, start_s: float, end_s: float) -> None:
        assert end_s > start_s
        self.chunks.append((work.key, tokens))

    def on_first(self, work: Work, now: float) -> None:
        assert work.key not in self.firsts
        self.firsts[work.key] = now

    def on_done(self, work: Work, now: float) -> None:
        assert work.key not in self.ends
        self.ends[work.key] = now
        if work.kind == "prefill":
            self.prefilled.append(work)


def engine(
    timing: Timing | None = None, *, kv_blocks: int = 64, slots: int = 8, budget: int = 32, steps_max: int = 1 << 30
) -> tuple[EngineModel, Ears]:
    ears = Ears()
    model = EngineModel(
        timing or MockerTiming(kv_blocks * BLOCK),
        ears,
        kv_blocks=kv_blocks,
        block_tokens=BLOCK,
        slots=slots,
        max_batched_tokens=budget,
        steps_max=steps_max,
    )
    return model, ears


def work(
    key: int, prompt: int, output: int, *, kind: str = "local", chain_of: int | None = None, shared: int = 0
) -> Work:
    """A request whose first `shared` blocks are those of chain `chain_of`."""
    whole = (prompt + output) // BLOCK
    chain = [1000 * (chain_of or 0) + i if i < shared else 10**6 * (key + 1) + i for i in range(whole)]
    return Work(key, kind, prompt, output, chain)  # type: ignore[arg-type]


def play(model: EngineModel, ears: Ears, arrivals: list[tuple[float, Work]], *, sync_s: float = 0.0) -> None:
    """Until nothing is left to do."""
    todo = sorted(arrivals, key=lambda item: item[0])
    sync_at = sync_s
    while todo or ears.heap or model.next_s is not None:
        landing = ears.heap[0][0] if ears.heap else float("inf")
        arrival = todo[0][0] if todo else float("inf")
        step = model.next_s if model.next_s is not None else float("inf")
        now = min(landing, arrival, step)
        while sync_s and sync_at < now:
            model.sync(sync_at)
            sync_at += sync_s
        step = model.next_s if model.next_s is not None else float("inf")  # Equal but for rounding.
        now = min(landing, arrival, step)
        if step == now:
            model.finish_run()
        elif landing == now:
            model.landed(heapq.heappop(ears.heap)[2], now)
        else:
            model.submit(todo.pop(0)[1], now)
        for done in ears.prefilled:
            model.release(done, now)
        ears.prefilled = []


# ---- timing


def test_the_mockers_formula_gives_hand_computed_values():
    timing = MockerTiming(kv_tokens=1000)
    assert timing.step_s(StepLoad(1000, 0, 0, 0)) == pytest.approx(0.0321058589, rel=1e-9)
    assert timing.step_s(StepLoad(0, 0, 3, 500)) == pytest.approx(0.02631, rel=1e-9)
    assert timing.step_s(StepLoad(1000, 0, 3, 500)) == pytest.approx(0.0321058589 + 0.02631, rel=1e-9)
    assert MockerTiming(1000, speedup=10).step_s(StepLoad(0, 0, 3, 500)) == pytest.approx(0.002631, rel=1e-9)


def test_a_profile_repeats_what_was_measured():
    timing = ProfileTiming(load_profile("h200-llama-8b"))
    for batch, itl_ms in ((1, 5.2), (32, 8.8), (64, 12.4)):
        assert timing.step_s(StepLoad(0, 0, batch, batch * 3064)) == pytest.approx(itl_ms / 1e3, rel=0.01)
    sixteen_prompts_s = sum(
        timing.step_s(StepLoad(8000, 8000 * 1500, 0, 0)) for _ in range(6)
    )  # 48,000 tokens, each attending to 1,500 others on average.
    assert 48_000 / sixteen_prompts_s == pytest.approx(40_400, rel=0.01)
    timing = ProfileTiming(load_profile("h200-llama-70b-fp8"))
    for batch, itl_ms in ((1, 21.2), (32, 33.3)):
        assert timing.step_s(StepLoad(0, 0, batch, batch * 3064)) == pytest.approx(itl_ms / 1e3, rel=0.01)
    assert timing.step_s(StepLoad(3000, 3000 * 1500, 0, 0)) == pytest.approx(0.362, rel=0.03)


def timings() -> list[Timing]:
    return [MockerTiming(5000), *(ProfileTiming(load_profile(name)) for name in profile_names())]


@pytest.mark.parametrize("timing", timings())
@given(requests=st.integers(1, 40), kv_tokens=st.integers(1, 3000), steps=st.integers(1, 40))
@settings(max_examples=30)
def test_a_runs_duration_is_the_sum_of_its_steps(timing: Timing, requests: int, kv_tokens: int, steps: int):
    walked = [timing.step_s(StepLoad(0, 0, requests, kv_tokens + i * requests)) for i in range(steps)]
    run = timing.decode_run(requests, kv_tokens)
    assert run.run_s(steps) == pytest.approx(sum(walked), rel=1e-9)
    within = sum(walked[:-1]) + walked[-1] / 2
    assert run.steps_until(within, steps) == steps
    assert run.steps_done(within, steps) == steps - 1


# ---- scheduling


def test_a_request_alone_takes_its_chunks_and_then_a_step_a_token():
    model, ears = engine(budget=32)
    play(model, ears, [(1.0, work(0, 70, 3))])
    timing = MockerTiming(64 * BLOCK)
    chunks_s = sum(timing.step_s(StepLoad(tokens, 0, 0, 0)) for tokens in (32, 32, 6))
    tokens_s = sum(timing.step_s(StepLoad(0, 0, 1, kv)) for kv in (71, 72))
    assert ears.firsts[0] == pytest.approx(1.0 + chunks_s)
    assert ears.ends[0] == pytest.approx(1.0 + chunks_s + tokens_s)
    assert model.steps == 5
    assert model.busy_s == pytest.approx(chunks_s + tokens_s)


def test_decoding_is_slowed_by_a_prompt_in_the_same_batch():
    model, ears = engine()
    play(model, ears, [(0.0, work(0, 8, 20)), (0.1, work(1, 16, 1))])
    alone, ears_alone = engine()
    play(alone, ears_alone, [(0.0, work(0, 8, 20))])
    timing = MockerTiming(64 * BLOCK)
    assert ears.ends[0] - ears_alone.ends[0] == pytest.approx(timing.step_s(StepLoad(16, 0, 0, 0)))


def test_a_shared_prefix_is_computed_once():
    model, ears = engine()
    first, second = work(0, 40, 1, chain_of=7, shared=10), work(1, 40, 1, chain_of=7, shared=10)
    play(model, ears, [(0.0, first), (5.0, second)])
    assert (first.cached_tokens, second.cached_tokens) == (
        0,
        36,
    )  # The last block holds the token that must be computed.


def test_remote_work_computes_one_token_of_its_prompt():
    model, ears = engine()
    play(model, ears, [(0.0, work(0, 40, 2, kind="remote"))])
    timing = MockerTiming(64 * BLOCK)
    assert ears.firsts[0] == pytest.approx(ears.delay_s + timing.step_s(StepLoad(0, 0, 1, 40)))


def test_a_prefill_workers_chunks_add_up_to_the_prompt():
    model, ears = engine(budget=16)
    play(model, ears, [(0.0, work(0, 70, 1, kind="prefill"))])
    assert ears.chunks == [(0, 16)] * 4 + [(0, 6)]
    assert model.pool.free_blocks == 64


def test_the_youngest_is_preempted_when_blocks_run_out_and_still_ends():
    model, ears = engine(kv_blocks=12)
    old, young = work(0, 16, 24), work(1, 16, 24)
    play(model, ears, [(0.0, old), (0.001, young)])
    assert old.preemptions == 0
    assert young.preemptions > 0
    assert ears.ends[0] < ears.ends[1]
    assert old.made == young.made == 24
    assert model.pool.free_blocks == 12
    assert sum(model.gaps.values()) == 2 * 23


# ---- conservation and equality


@st.composite
def loads(draw: st.DrawFn) -> list[tuple[float, Work]]:
    rng = random.Random(draw(st.integers(0, 10**9)))
    arrivals = []
    for key in range(draw(st.integers(1, 14))):
        prompt, output = rng.randint(1, 60), rng.randint(1, 50)
        kind = rng.choice(["local", "local", "remote", "prefill"])
        shared = rng.randint(0, prompt // BLOCK)
        arrivals.append(
            (rng.random() * 1.5, work(key, prompt, output, kind=kind, chain_of=rng.randint(1, 2), shared=shared))
        )
    return arrivals


def copy(arrivals: list[tuple[float, Work]]) -> list[tuple[float, Work]]:
    return [(at, Work(w.key, w.kind, w.prompt_tokens, w.output_tokens, w.chain)) for at, w in arrivals]


@given(arrivals=loads(), kv_blocks=st.integers(28, 80), slots=st.integers(1, 8), budget=st.integers(9, 64))
@settings(max_examples=150, deadline=None)
def test_skipping_over_steps_changes_nothing(
    arrivals: list[tuple[float, Work]], kv_blocks: int, slots: int, budget: int
):
    """The same load walked step by step, in runs, and in runs that are looked at now and then."""
    outcomes = []
    for steps_max, sync_s in ((1, 0.0), (1 << 30, 0.0), (1 << 30, 0.0137)):
        model, ears = engine(kv_blocks=kv_blocks, slots=slots, budget=budget, steps_max=steps_max)
        works = copy(arrivals)
        play(model, ears, works, sync_s=sync_s)
        assert set(ears.ends) == {w.key for _, w in works}
        assert model.pool.free_blocks == kv_blocks, "blocks were lost"
        assert not model.waiting
        assert not model.running
        events = model.take_events()
        stored = [h for e in events if isinstance(e, BlockStored) for h in e.hashes]
        removed = [h for e in events if isinstance(e, BlockRemoved) for h in e.hashes]
        counts = [(w.key, w.made, w.cached_tokens, w.preemptions) for _, w in works]
        outcomes.append((ears.firsts, ears.ends, counts, stored, removed, model.steps, model.busy_s, model.preemptions))
    walked = outcomes[0]
    for firsts, ends, counts, stored, removed, steps, busy_s, preemptions in outcomes[1:]:
        assert firsts == pytest.approx(walked[0])
        assert ends == pytest.approx(walked[1])
        assert (counts, steps, preemptions) == (walked[2], walked[5], walked[7])
        assert stored == walked[3]
        assert removed == walked[4]
        assert busy_s == pytest.approx(walked[6])


@given(prompts=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
def test_the_prefix_cache_is_a_least_recently_used_one(prompts: list[tuple[int, int]]):
    """One request at a time, each a start of one of three texts, against a plain LRU list of 14 blocks."""
    model, ears = engine(kv_blocks=14)
    lru: OrderedDict[int, None] = OrderedDict()
    for key, (text, blocks) in enumerate(prompts):
        request = work(key, blocks * BLOCK + 1, 1, chain_of=text, shared=blocks)
        hits = next((i for i, block in enumerate(request.chain) if block not in lru), blocks)
        held = request.chain[:hits]
        for block in held:
            del lru[block]
        # What it needs beyond its hits: free blocks first, then the least recently used.
        while len(lru) + hits + (blocks + 1 - hits) > 14:
            lru.popitem(last=False)
        for block in reversed(request.chain[:blocks]):
            lru[block] = None
        play(model, ears, [(10.0 * key, request)])
        assert request.cached_tokens == hits * BLOCK


def test_a_profile_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(
        ValueError, match="no profile 'h300'; there are h200-gpt-oss-120b, h200-llama-70b-fp8, h200-llama-8b"
    ):
        load_profile("h300")


def test_every_shipped_profile_says_where_its_figures_come_from():
    for name in profile_names():
        profile: Profile = load_profile(name)
        assert profile.name == name
        assert any(note.startswith("Measured") for note in profile.notes)
