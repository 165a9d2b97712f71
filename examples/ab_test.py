"""A routing policy of one's own: two policies side by side, a conversation always with the same one.

hocket serve --policy "examples/ab_test.py:AbTest?share=0.2"

`hocket policy canary` does this for any two policies at run time; here it is as code to start from.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import replace

from hocket.router.policies import Choice, Outcome, RequestView, WorkerView, load_policy


class AbTest:
    """`share` of the conversations by policy `b`, the others by `a`; both learn from everything that ends."""

    def __init__(self, share: float = 0.1, a: str = "kv", b: str = "cost") -> None:
        self._share = share
        self._policies = {"a": load_policy(a), "b": load_policy(b)}

    def pick(self, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random) -> Choice:
        key = request.session_id or request.request_id
        arm = "b" if zlib.crc32(key.encode()) < self._share * 2**32 else "a"
        choice = self._policies[arm].pick(request, workers, now, rng)
        return replace(choice, why=f"{arm}: {choice.why}")

    def observe(self, outcome: Outcome, now: float) -> None:
        for policy in self._policies.values():
            if hasattr(policy, "observe"):
                policy.observe(outcome, now)
