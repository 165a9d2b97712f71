"""Prompts and caches for `router_index.py`: the same in every interpreter, with nothing but the standard library.

Run by another interpreter (`--dynamo-python`) it measures Dynamo's index, through its Python binding, on those: a case as
JSON on stdin, the figures as JSON on stdout.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable


def chains(count: int, depth: int) -> list[list[int]]:
    """`count` prompts of `depth` block hashes each."""
    rng = random.Random(1)
    return [[rng.getrandbits(63) for _ in range(depth)] for _ in range(count)]


def held_blocks(worker: int, depth: int, kind: str) -> int:
    """How many leading blocks of every prompt `worker` holds: all, or as many sixteenths as its turn says."""
    return depth if kind == "equal" else depth * (worker % 16 + 1) // 16


def times_us(call: Callable[[list[int]], object], prompts: list[list[int]], finds: int) -> list[float]:
    """Each call's time; the prompts take turns."""
    times = []
    for number in range(finds):
        prompt = prompts[number % len(prompts)]
        began_ns = time.perf_counter_ns()
        call(prompt)
        times.append((time.perf_counter_ns() - began_ns) / 1e3)
    return times


def _dynamo(workers: int, depth: int, count: int, kind: str, finds: int) -> dict[str, float]:
    from dynamo._core import RadixTree  # Only in that interpreter.

    tree, prompts, event_id, events = RadixTree(), chains(count, depth), 0, []
    for worker in range(workers):
        for chain in prompts:
            blocks = [{"block_hash": h, "tokens_hash": h} for h in chain[: held_blocks(worker, depth, kind)]]
            event_id += 1
            stored = {"event_id": event_id, "data": {"stored": {"parent_hash": None, "blocks": blocks}}, "dp_rank": 0}
            events.append((worker, json.dumps(stored).encode(), len(blocks)))
    began_s = time.perf_counter()
    for worker, event, _ in events:
        tree.apply_event(worker, event)
    apply_s = time.perf_counter() - began_s
    scores = tree.find_matches(prompts[0]).scores
    return {
        "find_us": sorted(times_us(tree.find_matches, prompts, finds))[finds // 2],
        "apply_blocks_per_s": sum(blocks for _, _, blocks in events) / apply_s,
        "found_blocks": sum(scores.values()),
    }


if __name__ == "__main__":
    print(json.dumps(_dynamo(**json.load(sys.stdin))))
