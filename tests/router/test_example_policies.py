"""The policies in examples/: short, loadable as users load them, and right."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from policy_views import request, worker

from hocket.router.policies import load_policy

EXAMPLES = Path(__file__).parents[2] / "examples"


def pick(name: str, workers: list, **changes: object) -> str:
    return load_policy(f"{EXAMPLES}/{name}").pick(request(**changes), workers, 0.0, random.Random(1)).worker_id


@pytest.mark.parametrize("name", ["tenant_pinning.py", "cost_aware.py", "ab_test.py", "prefix_affinity.py"])
def test_a_policy_is_less_than_40_lines(name: str):
    assert len((EXAMPLES / name).read_text().splitlines()) < 40


def test_a_tenant_with_workers_of_its_own_gets_them_and_nobody_else_does():
    workers = [
        worker("decode-0", running=9),
        worker("decode-1", running=8),
        worker("decode-2"),
        worker("decode-3", running=20),
    ]
    assert pick("tenant_pinning.py:TenantPinning", workers, tenant="acme") == "decode-1"
    assert pick("tenant_pinning.py:TenantPinning", workers, tenant="initech") == "decode-2"
    assert pick("tenant_pinning.py:TenantPinning", workers, tenant="") == "decode-3"
    assert pick("tenant_pinning.py:TenantPinning", workers[:2], tenant="") == "decode-1"


def test_the_cheap_worker_is_taken_while_it_is_quick_enough():
    spot, reserved = worker("spot-0", running=30), worker("reserved-0")
    assert pick("cost_aware.py:CostAware", [reserved, spot]) == "spot-0"
    slow = worker("spot-0", local_prefill_tokens=50_000)
    assert pick("cost_aware.py:CostAware", [reserved, slow]) == "reserved-0"
    swamped = worker("reserved-0", local_prefill_tokens=60_000)
    assert pick("cost_aware.py:CostAware", [swamped, slow]) == "spot-0"


def test_a_share_of_the_conversations_goes_to_the_other_policy_and_stays_there():
    policy = load_policy(f"{EXAMPLES}/ab_test.py:AbTest?share=0.25&a=round_robin&b=least_loaded")
    workers, rng = [worker("x"), worker("y")], random.Random(1)
    arms = {}
    for turn in range(3):
        for session in map(str, range(400)):
            arm = policy.pick(request(session_id=session), workers, 0.0, rng).why.partition(":")[0]
            assert arms.setdefault(session, arm) == arm, turn
    assert 60 < list(arms.values()).count("b") < 140
