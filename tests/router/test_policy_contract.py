"""What every policy owes, whatever it prefers; a new one adds its line here."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from policy_views import prefill, request, worker

from hocket.bus.ids import RequestId, WorkerId
from hocket.router.metrics import RouterMetrics
from hocket.router.policies import Outcome, PolicyError, RequestView, WorkerView, load_policy
from hocket.router.policies.cost import CostPolicy
from hocket.router.policies.fit import LiveFit
from hocket.router.policies.spread import SKEW_FACTOR, SKEW_REQUESTS

SEEKING = ["kv", "kv?temperature=0.3", "lmetric", "mix", "prefix_affinity", "session_affinity", "cost"]
POLICIES = ["round_robin", "random", "least_loaded", "power_of_two", *SEEKING]

counts = st.integers(0, 10**6)


@st.composite
def situations(draw: st.DrawFn) -> tuple[RequestView, list[WorkerView]]:
    def view(number: int) -> WorkerView:
        return worker(
            f"w{number}", slots=draw(counts), kv_blocks=draw(counts), hit_blocks=draw(st.integers(0, 100)),
            in_flight=draw(counts), in_flight_blocks=draw(counts), running=draw(counts), waiting=draw(counts),
            kv_blocks_free=draw(counts), can_prefill_locally=draw(st.booleans()), local_prefill_tokens=draw(counts),
        )  # fmt: skip

    workers = [view(number) for number in range(draw(st.integers(1, 5)))]
    queues = draw(st.lists(counts, max_size=3))
    prefills = tuple(prefill(f"p{n}", queued_tokens=tokens, hit_blocks=n) for n, tokens in enumerate(queues))
    asked = request(
        prompt_tokens=draw(st.integers(1, 200_000)), prefill=prefills, prefill_workers=len(prefills),
        session_id=draw(st.sampled_from(["", "s"])), tenant=draw(st.sampled_from(["", "t"])),
    )  # fmt: skip
    return asked, workers


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=60, deadline=None)
@given(situation=situations(), seed=st.integers(0, 99))
def test_it_chooses_one_of_the_offered_and_equal_inputs_give_equal_choices(
    name: str, situation: tuple[RequestView, list[WorkerView]], seed: int
):
    asked, workers = situation
    choices = [load_policy(name).pick(asked, workers, 0.0, random.Random(seed)) for _ in range(2)]
    assert choices[0] == choices[1]
    assert choices[0].worker_id in {one.worker_id for one in workers}
    assert choices[0].why
    assert choices[0].lane in {None, *(one.worker_id for one in asked.prefill)}


@pytest.mark.parametrize("name", SEEKING)
@pytest.mark.parametrize("count", [2, 5, 16])
def test_a_cache_that_everybody_wants_does_not_get_everybody(name: str, count: int):
    policy, rng, held = load_policy(name), random.Random(1), [0] * count
    for number in range(300):
        workers = [worker(f"w{i:02}", in_flight=load, hit_blocks=100 if i == 0 else 0) for i, load in enumerate(held)]
        mean = sum(held) / count
        asked = request(request_id=RequestId(str(number)), session_id=str(number))
        chosen = policy.pick(asked, workers, float(number), rng).worker_id
        place = int(chosen[1:])
        assert held[place] <= SKEW_FACTOR * mean + SKEW_REQUESTS
        held[place] += 1
    assert min(held) > 0  # Nobody starves.


@pytest.mark.parametrize("name", [name for name in SEEKING if name != "session_affinity"])
def test_who_seeks_caches_goes_to_the_one_that_has_it(name: str):
    workers = [worker(f"w{i}", hit_blocks=90 if i == 2 else 0) for i in range(4)]
    chosen = [load_policy(name).pick(request(), workers, 0.0, random.Random(seed)).worker_id for seed in range(10)]
    assert chosen.count(WorkerId("w2")) >= 8


def test_a_session_stays_when_another_worker_leaves():
    policy, rng = load_policy("session_affinity"), random.Random(1)
    workers = [worker(f"w{i}") for i in range(5)]
    for session in map(str, range(40)):
        home = policy.pick(request(session_id=session), workers, 0.0, rng).worker_id
        for gone in workers:
            if gone.worker_id != home:
                left = [one for one in workers if one is not gone]
                assert policy.pick(request(session_id=session), left, 0.0, rng).worker_id == home


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("kv?temprature=1", "no option 'temprature'; options: hit_weight, temperature"),
        ("kv?temperature=warm", "temperature=warm"),
        ("kv?temperature=-1", "must not be negative"),
        ("round_robin?x=1", "options: none"),
        ("cost?ttft_slo_s=-2", "must not be negative"),
        ("mix?prefix=0&load=0&queue=0&kv=0", "above 0"),
    ],
)
def test_an_option_that_is_wrong_is_named(name: str, word: str):
    with pytest.raises(PolicyError, match=word.replace("?", r"\?")):
        load_policy(name)


def test_options_reach_the_policy():
    near, far = worker("a", hit_blocks=10, in_flight_blocks=100), worker("b")
    for weight, expected in ((1, "b"), (20, "a")):
        assert (
            load_policy(f"kv?hit_weight={weight}").pick(request(), [near, far], 0.0, random.Random()).worker_id
            == expected
        )


def test_a_live_fit_finds_the_weights():
    rng, fit = random.Random(3), LiveFit((0.5, 0.5), least=0.01)
    for _ in range(500):
        x = rng.uniform(0, 10)
        fit.observe((1.0, x), 0.2 + 0.03 * x)
    assert fit.weights == pytest.approx((0.2, 0.03), rel=0.02)
    assert fit.median_error is not None
    assert fit.median_error < 0.01


def outcome(asked: RequestView, policy: CostPolicy, workers: list[WorkerView], ttft_s: float) -> Outcome:
    choice = policy.pick(asked, workers, 0.0, random.Random(1))
    assert choice.plan
    return Outcome(
        asked.request_id, choice.worker_id, choice.plan, None, asked.prompt_tokens, 0, 0, ttft_s, 0.01, 100, 0
    )  # fmt: skip


def test_cost_learns_how_fast_the_engines_are():
    policy, rng = CostPolicy(), random.Random(5)
    for number in range(400):
        tokens = rng.randint(100, 8000)
        asked = request(request_id=RequestId(str(number)), prompt_tokens=tokens)
        policy.observe(outcome(asked, policy, [worker("a")], 0.01 + tokens / 1000 * 0.05), 0.0)
    predicted = policy.pick(request(prompt_tokens=4000), [worker("a")], 0.0, rng).ttft_s
    assert predicted == pytest.approx(0.21, rel=0.1)
    assert policy.local.median_error is not None
    assert policy.local.median_error < 0.1


def test_cost_computes_a_long_prompt_where_nobody_decodes_and_a_cached_one_at_home():
    policy, rng = CostPolicy(), random.Random(5)
    busy = worker("a", running=30)
    asked = request(prompt_tokens=8000, prefill_workers=1, prefill=(prefill("p"),))
    assert policy.pick(asked, [busy], 0.0, rng).plan == "remote"
    assert policy.pick(asked, [replace(busy, hit_blocks=498)], 0.0, rng).plan == "local"
    swamped = replace(asked, prefill=(prefill("p", queued_tokens=2_000_000),))
    assert policy.pick(swamped, [worker("a")], 0.0, rng).plan == "local"


def test_cost_names_the_prefill_worker_that_has_the_prefix():
    policy = CostPolicy()
    prefills = (prefill("p"), prefill("q", hit_blocks=400), prefill("r"))
    asked = request(prompt_tokens=8000, prefill_workers=3, prefill=prefills)
    choice = policy.pick(asked, [worker("a", running=30)], 0.0, random.Random(1))
    assert (choice.plan, choice.lane) == ("remote", "q")


def test_what_breaks_a_limit_is_avoided():
    slow, fast = worker("a", hit_blocks=90, local_prefill_tokens=40_000), worker("b")
    for name in ("cost?ttft_slo_s=0.5&work_weight=20", "cost?ttft_slo_s=0.5"):
        assert load_policy(name).pick(request(), [slow, fast], 0.0, random.Random(1)).worker_id == "b"


def test_without_a_session_the_first_block_has_a_home_whatever_the_tenant():
    policy, rng = load_policy("session_affinity"), random.Random(1)
    workers = [worker(f"w{i}") for i in range(5)]

    def home(**changes: object) -> str:
        return policy.pick(request(session_id="", **changes), workers, 0.0, rng).worker_id

    homes = {first_block: home(first_block=first_block, tenant="t") for first_block in range(1, 30)}
    assert set(homes.values()) == {f"w{i}" for i in range(5)}
    assert all(home(first_block=first_block) == where for first_block, where in homes.items())
    assert len({home(tenant="t") for _ in range(10)}) == 1  # Shorter than a block.


def test_a_fit_is_not_led_astray_by_one_absurd_value():
    rng, fit = random.Random(3), LiveFit((0.5, 0.5, 0.5), least=0.01)
    for number in range(600):
        x = rng.uniform(0, 10)
        fit.observe((1.0, x, 0.0), 500.0 if number % 50 == 7 else 0.2 + 0.03 * x)
    assert fit.weights == pytest.approx((0.2, 0.03, 0.5), rel=0.1)  # The last was never seen: it keeps its prior.


def test_cost_knows_how_far_a_worker_has_come():
    policy, rng, busy = CostPolicy(), random.Random(1), worker("a")
    policy.pick(request(prompt_tokens=100_000), [busy], 0.0, rng)
    busy = worker("a", local_prefill_tokens=100_000)  # The router counts all of it until the first token.
    waits = [policy.pick(request(prompt_tokens=16), [busy], now, rng).ttft_s for now in (0.1, 2.0, 60.0)]
    assert waits[0] is not None
    assert waits[1] is not None
    assert waits[2] is not None
    assert waits[0] > waits[1] > waits[2]
    assert waits[2] < 0.1


def test_cost_counts_what_others_have_placed_since():
    policy, rng = CostPolicy(), random.Random(1)
    policy.pick(request(prompt_tokens=1600), [worker("a")], 0.0, rng)
    swamped = worker("a", local_prefill_tokens=101_600)
    assert policy.pick(request(), [swamped, worker("b")], 1.0, rng).worker_id == "b"


def test_cost_learns_that_a_worker_without_room_keeps_waiting():
    policy, full = CostPolicy(), worker("a", waiting=3, kv_blocks_free=10)
    for number in range(60):
        asked = request(request_id=RequestId(str(number)))
        policy.observe(outcome(asked, policy, [full], 12.0), 0.0)
    choice = policy.pick(request(), [replace(full, hit_blocks=90), worker("b", running=20)], 0.0, random.Random(1))
    assert choice.worker_id == "b"


def test_cost_learns_what_the_link_costs():
    policy, rng = CostPolicy(work_weight=0.0), random.Random(5)
    lazy = {"can_prefill_locally": False}
    for number in range(400):
        blocks, known, sent = rng.randint(30, 500), rng.random(), rng.random()
        asked = request(
            request_id=RequestId(str(number)), prompt_tokens=16 * blocks, prefill=(prefill("p", hit_blocks=int(blocks * known)),),
            prefill_workers=1,
        )  # fmt: skip
        ttft_s = 0.02 + 16 * blocks / 1000 * (0.05 * (1 - known) + 0.3 * sent)
        near = worker("a", hit_blocks=int(blocks * (1 - sent)), **lazy)
        policy.observe(outcome(asked, policy, [near], ttft_s), 0.0)
    assert policy.remote.weights[-1] == pytest.approx(0.3, rel=0.1)
    assert policy.remote.weights[1] == pytest.approx(0.05, rel=0.3)
    asked = request(prompt_tokens=8000, prefill=(prefill("p"),), prefill_workers=1)
    workers = [worker("a", **lazy), worker("b", hit_blocks=400, running=8, **lazy)]
    assert policy.pick(asked, workers, 0.0, rng).worker_id == "b"


def test_a_router_shows_how_well_policies_predict():
    metrics = RouterMetrics()
    for predicted_s, seen_s in ((1.0, 2.0), (None, 1.0), (1.0, None), (1.0, 1.0), (3.0, 1.0)):
        metrics.predictions.add("ttft", predicted_s, seen_s)
    assert metrics.registry.get_sample_value("hocket_prediction_error_ratio", {"of": "ttft"}) == 0.5
    assert metrics.registry.get_sample_value("hocket_prediction_error_ratio", {"of": "itl"}) is None
