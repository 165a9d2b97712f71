"""Policies that return to where something is: a prompt's prefix, or a conversation."""

from __future__ import annotations

import random
from collections.abc import Sequence

import xxhash

from .base import Choice, PolicyError, RequestView, WorkerView
from .spread import cheapest, unherded


class PrefixAffinity:
    """The longest hit, if it is worth it; else the least loaded.

    Worth it: at least `hit_share_min` of the prompt, and not more than `wait_tokens_max` prompt tokens longer to wait than at
    the worker where the wait is shortest (llm-d's affinity filter: hit at least 0.8 unless the TTFT is worse by so much).
    """

    def __init__(self, hit_share_min: float = 0.3, wait_tokens_max: int = 8192) -> None:
        if not 0 <= hit_share_min <= 1 or wait_tokens_max < 0:
            raise PolicyError("hit_share_min is 0 to 1, wait_tokens_max not negative")
        self._hit_share_min = hit_share_min
        self._wait_tokens_max = wait_tokens_max

    def pick(self, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random) -> Choice:
        fair = unherded(workers)
        waits = {worker.worker_id: _tokens_before_first(request, worker) for worker in fair}
        quick = [w for w in fair if waits[w.worker_id] <= min(waits.values()) + self._wait_tokens_max]
        best = cheapest([-float(worker.hit_blocks * worker.block_tokens) for worker in quick], quick, rng)
        hit_tokens = best.hit_blocks * best.block_tokens
        if hit_tokens and hit_tokens >= self._hit_share_min * request.prompt_tokens:
            return Choice(best.worker_id, why=f"prefix hit {hit_tokens} of {request.prompt_tokens} tokens")
        worker = cheapest([worker.load / max(worker.slots, 1) for worker in fair], fair, rng)
        return Choice(worker.worker_id, why=f"no hit worth it, {worker.load} of {worker.slots} slots taken")


class SessionAffinity:
    """Each conversation at one worker, by rendezvous hashing (Thaler and Ravishankar 1998): who leaves moves its own alone.

    Without a session id the prompt's first block stands for it: system prompt, or system prompt and first words. A prompt
    that is shorter than a block goes by tenant; without one, the least loaded worker takes it.
    """

    def pick(self, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random) -> Choice:
        fair = unherded(workers)
        first_block = f"{request.first_block:016x}" if request.first_block else ""
        key = request.session_id or first_block or request.tenant
        if not key:
            worker = cheapest([worker.load / max(worker.slots, 1) for worker in fair], fair, rng)
            return Choice(worker.worker_id, why=f"no session, {worker.load} of {worker.slots} slots taken")
        worker = max(fair, key=lambda worker: xxhash.xxh3_64_intdigest(f"{worker.worker_id}\0{key}".encode()))
        what = "session" if request.session_id else "first block" if first_block else "tenant"
        return Choice(worker.worker_id, why=f"home of the {what}, {worker.load} running")


def _tokens_before_first(request: RequestView, worker: WorkerView) -> int:
    """Prompt tokens that the worker computes before this request's first token."""
    return request.prompt_tokens - worker.hit_blocks * worker.block_tokens + worker.local_prefill_tokens
