"""How many GPUs, and whether to disaggregate."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hocket.lab.measure import Summary
from hocket.lab.plan import Plan, Planner, smallest
from hocket.lab.scenario import Engine, Scenario, Slo
from hocket.lab.synthetic import synthetic
from hocket.lab.timing import HBM_BYTES_PER_US, ProfileError, load_profile, tensor_parallel

PROFILE = Engine(profile="h200-llama-70b-fp8")


def plan(text: str, slo: Slo, engine: Engine = PROFILE, good_share: float = 0.9) -> tuple[Plan, list[Summary]]:
    planner = Planner(synthetic(text), Scenario(decode=1, engine=engine, slo=slo), good_share=good_share)
    return planner.plan(), planner.tried()


@given(need=st.integers(1, 2000), most=st.integers(1, 1024))
def test_the_smallest_count_is_found(need: int, most: int):
    assert smallest(lambda count: min(1.0, count / need), 1.0, most) == (need if need <= most else None)


def test_the_search_ends_where_more_workers_bring_nothing():
    asked: list[int] = []

    def goodput(count: int) -> float:
        asked.append(count)
        return 0.6 if count >= 8 else count / 16

    assert smallest(goodput, 0.9) is None
    assert max(asked) == 16


def test_a_tight_gap_between_tokens_and_long_prompts_call_for_a_split():
    """Prompts of 3,000 tokens stall everybody's tokens for a third of a second on a worker that does both."""
    answer, tried = plan("synthetic:poisson,requests=300,rate=4,prompt=3000,output=150", Slo(ttft_s=2.0, itl_s=0.028))
    assert answer.apart is not None
    assert answer.together is None or answer.together.gpus > answer.apart.gpus
    assert answer.verdict().startswith("Disaggregate: ")
    smaller = [s for s in tried if s.scenario.prefill and s.gpus < answer.apart.gpus]
    assert smaller
    assert all(s.goodput < 0.9 for s in smaller)


def test_with_loose_limits_a_split_only_costs():
    answer, _ = plan("synthetic:poisson,requests=200,rate=1,prompt=500,output=200", Slo(ttft_s=5.0, itl_s=0.2))
    assert answer.together is not None
    assert answer.together.gpus == 1
    assert answer.verdict().startswith("Do not disaggregate: 1 workers that do both (1 GPU)")


def test_limits_that_no_engine_can_keep_are_told():
    answer, _ = plan("synthetic:poisson,requests=50,rate=1,prompt=500,output=20", Slo(itl_s=0.001))
    assert (answer.together, answer.apart) == (None, None)
    assert answer.verdict().startswith("No pool keeps 90% of the requests within the limits")


def test_tensor_parallelism_divides_work_and_memory_and_adds_messages():
    one = load_profile("h200-llama-70b-fp8")
    four = tensor_parallel(one, 4)
    assert (four.gpus, tensor_parallel(one, 1)) == (4, one)
    assert one.coefficients.step_us / 4 < four.coefficients.step_us < one.coefficients.step_us
    assert one.coefficients.prefill_token_us / 4 < four.coefficients.prefill_token_us
    assert four.coefficients.decode_kv_token_us == pytest.approx(one.coefficients.decode_kv_token_us / 4)
    assert four.kv_tokens > 4 * one.kv_tokens  # The weights are there once and not four times.


def test_a_profile_of_several_gpus_is_not_divided_again():
    with pytest.raises(ProfileError, match="of 4 GPUs already"):
        tensor_parallel(tensor_parallel(load_profile("h200-llama-8b"), 4), 2)


def test_of_a_mixture_of_experts_only_what_one_token_reads_divides_in_the_fixed_part_of_a_step():
    one = load_profile("h200-llama-8b")
    some = tensor_parallel(msgspec.structs.replace(one, step_bytes=one.weight_bytes // 4), 2)
    all_of_it = tensor_parallel(one, 2)
    left_us = 0.75 * one.weight_bytes / HBM_BYTES_PER_US / 2
    assert some.coefficients.step_us == pytest.approx(all_of_it.coefficients.step_us + left_us)
    assert some.kv_tokens == all_of_it.kv_tokens


def test_the_mockers_formula_has_no_tensor_parallelism():
    with pytest.raises(ProfileError, match="name a profile"):
        Engine(tp=2).resolved()
