"""What a routing decision costs: hashing a prompt, finding its blocks among the workers, taking in KV events, deciding.

    python benchmarks/router_index.py [--quick] [--json FILE] [--dynamo-python PATH]

`PATH` is a Python that has `ai-dynamo-runtime`: its Rust index is then asked through its Python binding about the same data,
each case right after ours. `docs/benchmarks.md` explains the columns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

from index_data import __file__ as index_data_file
from index_data import chains, held_blocks, times_us
from measure import Progress, Row, machine, percentile, print_table, versions, write_json

from hocket.bus.block_hash import block_hashes
from hocket.bus.ids import RequestId, WorkerId
from hocket.bus.messages import BlockRemoved, BlockStored, Heartbeat, WorkerCard
from hocket.router.chooser import Ask, Chooser
from hocket.router.index import PrefixIndex
from hocket.router.policies import load_policy
from hocket.router.view import ClusterView

BLOCK_TOKENS = 16
CASES = [
    (workers, depth, max(1, 4096 // depth), kind)
    for workers in (16, 256, 1000)
    for depth in (16, 64, 256, 2048)
    for kind in ("equal", "stepped")
]
DECISIONS = [("least_loaded", 100), ("kv", 100), ("cost", 100), ("least_loaded", 1000), ("kv", 1000)]
LARGE = (16, 256, 2000, "stepped")  # more than the processor's caches hold
_DYNAMO_TIMEOUT_S = 120.0


def find(workers: int, depth: int, count: int, kind: str, finds: int) -> Row:
    """One index, filled and asked."""
    if workers > 16:
        count = min(count, 4)  # To fill it takes time, and nothing else changes.
    index, prompts, stored = PrefixIndex(), chains(count, depth), 0
    names = [WorkerId(f"w{number:04}") for number in range(workers)]
    for name in names:
        index.add_worker(name)
    events = [
        (name, [BlockStored(chain[: held_blocks(number, depth, kind)])])
        for number, name in enumerate(names)
        for chain in prompts
    ]
    began_s = time.perf_counter()
    for name, event in events:
        index.apply(name, event)
        stored += len(event[0].hashes)
    apply_s = time.perf_counter() - began_s
    times = times_us(index.hit_blocks, prompts, finds)
    return {
        "workers": workers, "depth": depth, "blocks": len(index), "kind": kind, "chains": count,
        "find_us": percentile(times, 0.5), "find_p99_us": percentile(times, 0.99),
        "apply_blocks_per_s": stored / apply_s, "found_blocks": sum(index.hit_blocks(prompts[0]).values()),
    }  # fmt: skip


def beside_dynamo(python: Path, row: Row, finds: int) -> Row:
    """The same case in the other interpreter. Raises RuntimeError when it finds something else."""
    case = {
        "workers": row["workers"],
        "depth": row["depth"],
        "count": row["chains"],
        "kind": row["kind"],
        "finds": finds,
    }
    done = subprocess.run(
        [str(python), index_data_file],
        input=json.dumps(case),
        capture_output=True,
        text=True,
        timeout=_DYNAMO_TIMEOUT_S,
    )
    if done.returncode:
        raise RuntimeError(f"{python} failed: {done.stderr[-500:]}")
    theirs = json.loads(done.stdout)
    if theirs["found_blocks"] != row["found_blocks"]:
        raise RuntimeError(f"Dynamo found {theirs['found_blocks']} blocks, we {row['found_blocks']}")
    return row | {"dynamo_find_us": theirs["find_us"], "dynamo_apply_blocks_per_s": theirs["apply_blocks_per_s"]}


def events(workers: int, blocks: int) -> Row:
    """One block a message, stored and removed: the dearest way to hear of them."""
    index, (chain,) = PrefixIndex(), chains(1, blocks)
    names = [WorkerId(f"w{number:04}") for number in range(workers)]
    for name in names:
        index.add_worker(name)
    half = blocks // 2
    began_s = time.perf_counter()
    for position, block in enumerate(chain):
        index.apply(names[position % workers], [BlockStored([block])])
        if position >= half:
            index.apply(names[(position - half) % workers], [BlockRemoved([chain[position - half]])])
    return {"what": f"block events, {workers} workers", "per_s": (blocks + half) / (time.perf_counter() - began_s)}


def memory(blocks: int, holders: int) -> Row:
    """What the index itself allocates, hashes included."""
    names = [WorkerId(f"w{number:04}") for number in range(holders)]
    tracemalloc.start()
    index = PrefixIndex()
    for name in names:
        index.add_worker(name)
    (chain,) = chains(1, blocks)
    for name in names:
        index.store(name, chain)
    del chain
    mib = tracemalloc.get_traced_memory()[0] / 2**20
    tracemalloc.stop()
    return {"what": f"memory, {holders} holders a block", "mib_per_million": mib * 1e6 / blocks}


def hashing(tokens: int) -> Row:
    """A prompt of `tokens` tokens in blocks of 16."""
    packed = os.urandom(4 * tokens)
    times = times_us(lambda _: block_hashes(packed, BLOCK_TOKENS), [[]], 200)
    return {
        "what": f"hash {tokens // 1024}k tokens",
        "p50_us": percentile(times, 0.5),
        "p99_us": percentile(times, 0.99),
    }


def decision(policy: str, workers: int, tokens: int, decisions: int) -> Row:
    """Prompts that share their first half with one another, each kept by four workers; no hash is reused."""
    view, index = ClusterView(suspect_s=1.5, dead_s=3.0), PrefixIndex()
    names = [WorkerId(f"w{number:04}") for number in range(workers)]
    for name in names:
        card = WorkerCard(name, "decode", 1, "m", "f", BLOCK_TOKENS, kv_blocks=40_000, slots=64, max_model_len=99_999)
        view.join(card, Heartbeat(name, 1, "decode", kv_blocks_free=40_000), 0.0)
        index.add_worker(name)
    rng, start = random.Random(1), os.urandom(2 * tokens)
    chooser = Chooser(view, index, load_policy(policy), local_prefill_tokens_max=512, rng=rng)
    prompts = [start + os.urandom(2 * tokens) for _ in range(20)]
    for prompt in prompts:
        for name in rng.sample(names, 4):
            index.store(name, block_hashes(prompt, BLOCK_TOKENS))
    times = []
    for number in range(decisions):
        packed = prompts[number % len(prompts)]
        began_ns = time.perf_counter_ns()
        ask = Ask(RequestId(str(number)), "m", tokens, 256, lambda size, packed=packed: block_hashes(packed, size))
        chosen = chooser.choose(ask, frozenset(), number / 50)
        assert chosen is not None
        chooser.placed(chosen, number / 50)
        view.assign(chosen.worker.worker_id, number, tokens // BLOCK_TOKENS)
        times.append((time.perf_counter_ns() - began_ns) / 1e3)
        view.release(chosen.worker.worker_id, number)
    return {
        "what": f"decide, {policy}, {workers} workers, {tokens // 1024}k tokens", "per_s": 1e6 * len(times) / sum(times),
        "p50_us": percentile(times, 0.5), "p99_us": percentile(times, 0.99),
    }  # fmt: skip


FIND_COLUMNS = {
    "workers": "workers", "depth": "depth", "kind": "held", "blocks": "blocks", "find_us": "find p50 us",
    "find_p99_us": "p99 us", "dynamo_find_us": "Dynamo p50 us", "apply_blocks_per_s": "stored blocks/s",
    "dynamo_apply_blocks_per_s": "Dynamo blocks/s",
}  # fmt: skip
OTHER_COLUMNS = {
    "what": "what", "p50_us": "p50 us", "p99_us": "p99 us", "per_s": "per second", "mib_per_million": "MiB per million blocks"
}  # fmt: skip


def main(argv: Iterable[str] | None = None) -> int:
    """Usage: python benchmarks/router_index.py"""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, one object each")
    parser.add_argument("--quick", action="store_true", help="16 and 1,000 workers at depth 256 only, fewer repeats")
    parser.add_argument("--dynamo-python", type=Path, metavar="PATH", help="a Python with ai-dynamo-runtime installed")
    arguments = parser.parse_args(None if argv is None else list(argv))
    finds = 300 if arguments.quick else 2000
    todo = [case for case in CASES if case[1] == 256 and case[0] != 256] if arguments.quick else [*CASES, LARGE]
    progress, found, others = Progress(len(todo) + 6), [], []
    for case in todo:
        progress.step("find {} workers, depth {}".format(*case))
        row = find(*case, finds)
        found.append(beside_dynamo(arguments.dynamo_python, row, finds) if arguments.dynamo_python else row)
    for tokens in (8192, 32768):
        progress.step("hash")
        others.append(hashing(tokens))
    progress.step("decide")
    others += [decision(policy, workers, 8192, finds) for policy, workers in DECISIONS]
    progress.step("events")
    others += [events(workers, 100_000) for workers in (16, 1000)]
    progress.step("memory")
    others += [memory(100_000 if arguments.quick else 1_000_000, holders) for holders in (1, 4)]
    progress.end()
    print(f"{machine()}; {versions('hocket', 'xxhash', 'msgspec')}")
    print_table("Find a prompt's blocks, and take in what workers stored", FIND_COLUMNS, found)
    print_table("The rest of a decision", OTHER_COLUMNS, others)
    about = {"machine": machine(), "versions": versions("hocket", "xxhash", "msgspec")}
    write_json(arguments.json, [row | about for row in [*found, *others]])
    return 0


if __name__ == "__main__":
    sys.exit(main())
