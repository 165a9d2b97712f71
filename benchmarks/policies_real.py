"""Every policy on a pool of real processes, beside what the lab says of the same requests: is the order the same?

    python benchmarks/policies_real.py --trace conversation_trace.jsonl [--quick] [--json FILE]

A nats-server, a router and four `sim` workers that compute prompts and make tokens; the simulated engine sleeps as long as a
real one would compute, so that two cores are enough. Requests come over HTTP at the workload's times, whatever the answers
take. Between two runs the policy is switched as `hocket policy set` does it and every prompt gets other tokens, so that no
run finds anything of another in a cache. A round runs every policy once. A run in which even the client was late is done
again. `docs/policies.md` says what came of it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import random
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean

import msgspec
import numpy as np
from local_pool import SERVED_NAME, Pool, running_pool, sim_worker
from measure import Cell, Progress, Row, machine, median_row, percentile, print_table, versions, write_json
from replay_load import Client, Served, conversations, prompts_of

from hocket.bus.base import Bus
from hocket.bus.server import EmbeddedServer
from hocket.cluster.ask_routers import ask_all, pool_bus
from hocket.cluster.model import resolve_model
from hocket.cluster.policy import change, set_primary
from hocket.lab.run import run_one
from hocket.lab.scenario import Engine, Scenario
from hocket.lab.synthetic import synthetic
from hocket.lab.timing import Coefficients, Profile
from hocket.lab.traces import Trace, read_trace
from hocket.router.control_messages import AskPolicies, PolicyStatus
from hocket.workers.engines.sim.vocabulary import sim_vocabulary

POLICIES = (
    *("random", "round_robin", "least_loaded", "power_of_two", "session_affinity"),
    *("prefix_affinity", "kv", "lmetric", "mix", "cost"),
)
QUICK = ("random", "round_robin", "kv", "cost")
WORKERS = 4
BLOCK_TOKENS, KV_BLOCKS, SLOTS, CHUNK_TOKENS = 16, 1200, 64, 256
PREFILL_MS, ITL_MS = 0.25, 5.0  # of one prompt token, of one decode step
LAYERS = 1
LENGTH_SCALE = 1 / 32  # Mooncake's blocks of 512 tokens become 16
LAB_SEEDS = 5
SHAKE_S = 0.005  # how exactly real clients keep their times
LATE_MAX_S = 0.02  # a client that is later than that at p99 did not get its share of the machine
REPEATS_SHARE = 6  # of all runs, one in so many may be done again
ROUNDS = 3
POOL = "policies"


@dataclass(frozen=True)
class Workload:
    """One column of load: the trace, at which `random` is past its limit."""

    name: str
    trace: Trace


@dataclass
class Seen:
    """One policy on one workload: a list has one entry for each round (lab: for each seed)."""

    ttft_s: list[float] = field(default_factory=list)  # means
    hit_rate: list[float] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    lab_ttft_s: list[float] = field(default_factory=list)
    lab_hit_rate: list[float] = field(default_factory=list)
    lab_row: Row = field(default_factory=dict)


Found = dict[tuple[str, str], Seen]
"""By workload and policy."""


def workloads(path: Path, *, is_quick: bool) -> list[Workload]:
    """Both, scaled in length and time."""
    sample = conversations(read_trace(path), 80 if is_quick else 32).resized(LENGTH_SCALE)
    rate = 40.0
    sample = sample.faster(sample.turns[-1].arrival_s * rate / len(sample.turns))
    turns = 150 if is_quick else 350
    multiturn = synthetic(f"synthetic:multiturn,requests={turns},rate=16,prompt=160,output=16,turns=5,think=0.35")
    return [Workload("conversation", sample), Workload("multi-turn", multiturn)]


def renamed(trace: Trace, salt: str) -> Trace:
    """The same with sessions of other names: which worker a name belongs to is luck, and one draw of it says little."""
    named = [replace(turn, session=turn.session and f"{salt}/{turn.session}") for turn in trace.turns]
    return replace(trace, turns=tuple(named))


def shaken(trace: Trace, seed: int) -> Trace:
    """The same with times as inexact as real clients': a few large prompts that go elsewhere change a hit rate by 2 %."""
    rng = random.Random(seed)
    turns = [replace(turn, arrival_s=turn.arrival_s + rng.random() * SHAKE_S) for turn in trace.turns]
    return replace(trace, turns=tuple(turns))


# ---- the lab


def lab_engine(folder: Path) -> Engine:
    """The simulated engine's sizes and timing, as the lab takes them."""
    costs = Coefficients(0.0, PREFILL_MS * 1e3, 0.0, 0.0, 0.0, decode_step_us=ITL_MS * 1e3)
    sizes = {"kv_tokens": KV_BLOCKS * BLOCK_TOKENS, "layers": LAYERS, "hidden": 1, "weight_bytes": 0}
    profile = folder / "sim.json"
    profile.write_bytes(
        msgspec.json.encode(Profile(name="sim", gpus=1, coefficients=costs, kv_bytes_per_token=8, **sizes))
    )
    return Engine(
        profile=str(profile),
        block_tokens=BLOCK_TOKENS,
        kv_blocks=KV_BLOCKS,
        slots=SLOTS,
        max_batched_tokens=CHUNK_TOKENS,
    )


def predict(workload: Workload, policy: str, engine: Engine, seen: Seen) -> None:
    """What the lab says, once for each seed: chance decides between equals, so one run is one of many."""
    runs = [
        run_one(
            renamed(shaken(workload.trace, seed), f"seed-{seed}"),
            Scenario(decode=WORKERS, policy=policy, engine=engine, seed=seed),
        )
        for seed in range(LAB_SEEDS)
    ]
    seen.lab_ttft_s = [run.ttft_s.mean for run in runs]
    seen.lab_hit_rate = [run.hit_rate for run in runs]
    seen.lab_row = {
        "lab_mean_ms": fmean(seen.lab_ttft_s) * 1e3,
        "lab_p50_ms": fmean(run.ttft_s.p50 for run in runs) * 1e3,
        "lab_p99_ms": fmean(run.ttft_s.p99 for run in runs) * 1e3,
        "lab_itl_p50_ms": fmean(run.tpot_s.p50 for run in runs) * 1e3,
        "lab_itl_p99_ms": fmean(run.tpot_s.p99 for run in runs) * 1e3,
        "lab_hit": fmean(seen.lab_hit_rate) * 100,
    }


# ---- real processes


class Bench:
    """Runs one workload under one policy after the other."""

    def __init__(self, bus: Bus, pool: Pool, vocabulary: range, *, repeats_max: int) -> None:
        self._repeats_max = repeats_max
        self._bus = bus
        self._client = Client(pool.port, SERVED_NAME)
        self._vocabulary = vocabulary
        self._runs = 0
        self.repeats = 0

    async def measure(self, workload: Workload, policy: str, seen: Seen) -> None:
        """One run that was not disturbed, as far as there are repeats left. Raises RuntimeError."""
        served, hit_rate = await self._run(workload, policy)
        while (
            percentile([one.late_s for one in served], 0.99) or 0.0
        ) > LATE_MAX_S and self.repeats < self._repeats_max:
            self.repeats += 1
            served, hit_rate = await self._run(workload, policy)
        seen.ttft_s.append(fmean(one.ttft_s for one in served))
        seen.hit_rate.append(hit_rate)
        seen.rows.append(row_of(served, hit_rate))

    async def _run(self, workload: Workload, policy: str) -> tuple[list[Served], float]:
        """What the clients saw, and the hit rate that the engines reported.

        Raises RuntimeError when a request failed or another policy took part.
        """
        self._runs += 1
        trace = renamed(workload.trace, f"run-{self._runs}")
        prompts = prompts_of(trace, f"run {self._runs}", self._vocabulary, planes=LAYERS)
        changed = await change(self._bus, POOL, set_primary(policy, {}))
        gc.collect()
        served = await self._client.replay(trace, prompts)
        (status,) = await ask_all(self._bus, POOL, AskPolicies(), PolicyStatus, count=1)
        (arm,) = status.arms
        if (status.version, arm.requests) != (changed.document.version, len(served)) or arm.errors or arm.replaced:
            raise RuntimeError(f"{policy} on {workload.name}: not all of it was decided by it: {status}")
        return served, arm.cached_tokens / arm.cached_of_tokens


async def measure_all(todo: Sequence[Workload], policies: Sequence[str], rounds: int) -> tuple[Found, int]:
    """Every policy once a round, so that a disturbance of the machine falls on all of them alike; and the runs done again."""
    found = {(workload.name, policy): Seen() for workload in todo for policy in policies}
    cells = [(workload, policy, found[workload.name, policy]) for workload in todo for policy in policies]
    progress = Progress(len(cells) * (rounds + 1))
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hocket-bench-")))
        engine = lab_engine(folder)
        for workload, policy, seen in cells:
            progress.step(f"lab {workload.name} {policy}")
            predict(workload, policy, engine, seen)
        gc.freeze()
        bench = await running_bench(stack, folder, repeats_max=len(cells) * rounds // REPEATS_SHARE)
        for number in range(rounds):
            for workload, policy, seen in cells:
                progress.step(f"{number + 1}/{rounds} {workload.name} {policy}")
                await bench.measure(workload, policy, seen)
    progress.end()
    return found, bench.repeats


async def running_bench(stack: contextlib.AsyncExitStack, folder: Path, *, repeats_max: int) -> Bench:
    """The processes, which end with the stack."""
    model = resolve_model("demo")
    speed = {"sim-prefill-ms-per-token": PREFILL_MS, "sim-itl-ms": ITL_MS, "sim-layers": LAYERS}
    sizes = {"block-tokens": BLOCK_TOKENS, "kv-blocks": KV_BLOCKS, "slots": SLOTS, "chunk-tokens": CHUNK_TOKENS}
    workers = {f"decode-{number}": sim_worker("decode", {**speed, **sizes}) for number in range(WORKERS)}
    server = await stack.enter_async_context(EmbeddedServer(folder / "nats"))
    pool = stack.enter_context(
        running_pool(POOL, server.url, model, folder, workers=workers, router={"policy": "random"}, is_pinned=False)
    )
    bus = await stack.enter_async_context(pool_bus(server.url))
    return Bench(bus, pool, sim_vocabulary(str(model), 0), repeats_max=repeats_max)


# ---- what came of it


def row_of(served: Sequence[Served], hit_rate: float) -> Row:
    """One run in figures."""
    waits = [one.ttft_s * 1e3 for one in served]
    gaps = [one.tpot_s * 1e3 for one in served if one.tpot_s is not None]
    return {
        "mean_ms": fmean(waits),
        "p50_ms": percentile(waits, 0.5),
        "p99_ms": percentile(waits, 0.99),
        "itl_p50_ms": percentile(gaps, 0.5),
        "itl_p99_ms": percentile(gaps, 0.99),
        "hit": hit_rate * 100,
        "late_p99_ms": percentile([one.late_s * 1e3 for one in served], 0.99),
    }


def line_of(workload: Workload, policy: str, seen: Seen) -> Row:
    """The medians of the rounds, beside the lab's means."""
    return {
        "workload": workload.name,
        "policy": policy,
        **median_row(seen.rows),
        **seen.lab_row,
        "rounds_ms": " ".join(f"{mean_s * 1e3:.0f}" for mean_s in seen.ttft_s),
        "rounds_hit": " ".join(f"{rate * 100:.1f}" for rate in seen.hit_rate),
    }


@dataclass
class Order:
    """How the order of the policies in the lab compares with the real one."""

    agree: list[str] = field(default_factory=list)  # pairs that both decide, alike
    differ: list[str] = field(default_factory=list)  # pairs that both decide, otherwise
    ties: list[str] = field(default_factory=list)  # pairs that differ by less than the noise, here or there
    spearman: float = 1.0


def order_of(real: dict[str, list[float]], lab: dict[str, list[float]]) -> Order:
    """A pair is decided when each value of one lies below each value of the other (three rounds: 5 % by chance)."""
    order = Order()
    for one, other in combinations(real, 2):
        signs = [_sign(values[one], values[other]) for values in (real, lab)]
        pair = f"{one} and {other}"
        (order.ties if not all(signs) else order.agree if signs[0] == signs[1] else order.differ).append(pair)
    ranks = [np.argsort(np.argsort([fmean(values) for values in each.values()])) for each in (real, lab)]
    order.spearman = float(np.corrcoef(*ranks)[0, 1])
    return order


def _sign(one: Sequence[float], other: Sequence[float]) -> int:
    return (min(one) > max(other)) - (max(one) < min(other))


COLUMNS = {
    "policy": "policy",
    "mean_ms": "TTFT mean ms",
    "lab_mean_ms": "lab",
    "p50_ms": "p50",
    "lab_p50_ms": "lab",
    "p99_ms": "p99",
    "lab_p99_ms": "lab",
    "itl_p50_ms": "ITL p50 ms",
    "lab_itl_p50_ms": "lab",
    "itl_p99_ms": "p99",
    "lab_itl_p99_ms": "lab",
    "hit": "hit %",
    "lab_hit": "lab",
    "rounds_ms": "TTFT mean of each round",
    "late_p99_ms": "sent late p99 ms",
}


def report(workload: Workload, policies: Sequence[str], found: Found) -> list[Row]:
    """The table of one workload and whether the order is confirmed, on stdout."""
    each = {policy: found[workload.name, policy] for policy in policies}
    rows = [line_of(workload, policy, seen) for policy, seen in each.items()]
    turns = workload.trace.turns
    ideal = workload.trace.ideal_hit_tokens(BLOCK_TOKENS) / sum(turn.prompt_tokens for turn in turns)
    length = fmean(turn.prompt_tokens for turn in turns)
    print_table(
        f"{workload.name}: {len(turns)} requests, mean prompt {length:.0f} tokens, ideal hit {ideal:.1%}",
        COLUMNS,
        rows,
    )
    for what, real, lab in (
        ("mean TTFT", {p: s.ttft_s for p, s in each.items()}, {p: s.lab_ttft_s for p, s in each.items()}),
        ("hit rate", {p: s.hit_rate for p, s in each.items()}, {p: s.lab_hit_rate for p, s in each.items()}),
    ):
        order = order_of(real, lab)
        verdict = "NOT confirmed: " + "; ".join(order.differ) if order.differ else "confirmed"
        print(
            f"order by {what}: {verdict} ({len(order.agree)} pairs alike, {len(order.differ)} otherwise, "
            f"{len(order.ties)} within the noise; rank correlation {order.spearman:.2f})"
        )
    return rows


def main(argv: Iterable[str] | None = None) -> int:
    """Usage: python benchmarks/policies_real.py --trace FILE"""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, required=True, help="Mooncake's conversation_trace.jsonl")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, one object each")
    parser.add_argument("--quick", action="store_true", help="four policies, fewer than half as many requests")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"so many rounds (default: {ROUNDS})")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the workload whose name contains this")
    parser.add_argument("--policy", action="append", metavar="NAME", help="only these, or your own; may be repeated")
    options = parser.parse_args(None if argv is None else list(argv))
    todo = [each for each in workloads(options.trace, is_quick=options.quick) if options.only in each.name]
    policies = tuple(options.policy or (QUICK if options.quick else POLICIES))
    found, repeats = asyncio.run(measure_all(todo, policies, options.rounds))
    about: dict[str, Cell] = {
        "machine": machine(),
        "versions": versions("hocket", "nats-py", "uvloop"),
        "rounds": options.rounds,
    }
    print(f"{about['machine']}; {about['versions']}; {options.rounds} rounds, {repeats} runs repeated")
    rows = [row for workload in todo for row in report(workload, policies, found)]
    write_json(options.json, [row | about for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
