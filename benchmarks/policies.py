"""Every built-in policy on four workloads in the lab: waits, gaps and hits in virtual time; and on a slice for a small cache.

    python benchmarks/policies.py --traces FOLDER [--quick] [--json FILE] [--policy NAME ...] [--workload NAME ...]

`FOLDER` holds Mooncake's `conversation_trace.jsonl` and `synthetic_trace.jsonl` and `aiperf_agentic_120s_seed42.jsonl`
(docs/lab.md says where they come from). Pools overloaded or full amplify the smallest difference, so each workload is played
several times (other slices, other seeds, slightly other rates) and the means are shown, with the standard error of the
difference to `cost` on the same plays. Engines follow Dynamo's published formula; nothing depends on the machine.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev

import msgspec
from measure import Progress, Row, machine, print_table, versions, write_json

from hocket.lab.measure import Summary
from hocket.lab.run import run_one
from hocket.lab.scenario import Engine, Scenario
from hocket.lab.synthetic import synthetic
from hocket.lab.traces import Trace, read_trace

POLICIES = (
    "random", "round_robin", "least_loaded", "power_of_two", "session_affinity", "prefix_affinity", "kv?hit_weight=1",
    "kv", "lmetric", "mix", "cost",
)  # fmt: skip
FOUR = Scenario(decode=4, policy="", timeout_s=3600.0)
SMALL = Engine(block_tokens=16, kv_blocks=2400)
SMALL_PROMPT_TOKENS_MAX = 14_336
STARTS = (0, 4000, 8000, 2000, 6000, 10_000)
"""Where the slices of the conversation trace begin."""
PACES = (1.0, 0.95, 0.9, 1.05, 0.85, 1.1, 0.975, 1.025)


@dataclass(frozen=True)
class Workload:
    """Its name, what it is, how one of its plays is made, how many there are."""

    name: str
    title: str
    play: Callable[[Path, int], Trace]
    plays: int
    scenario: Scenario = FOUR


def part(trace: Trace, first: int, count: int) -> Trace:
    return replace(trace, turns=trace.turns[first : first + count]).shifted()


def conversation(folder: Path, play: int) -> Trace:
    return part(read_trace(folder / "conversation_trace.jsonl"), STARTS[play], 1500).faster(3.0)


def documents(folder: Path, play: int) -> Trace:
    return part(read_trace(folder / "synthetic_trace.jsonl"), (0, 1300, 2600, 650, 1950)[play], 1300).faster(2.0)


def agents(folder: Path, play: int) -> Trace:
    return read_trace(folder / "aiperf_agentic_120s_seed42.jsonl").closed().faster(PACES[play])


def multiturn(_: Path, play: int) -> Trace:
    return synthetic(f"synthetic:multiturn,requests=1600,rate=2,turns=8,prompt=2000,spread=0.5,seed={play + 10}")


def small_slice(folder: Path, play: int) -> Trace:
    trace = read_trace(folder / "conversation_trace.jsonl")
    short = tuple(turn for turn in trace.turns if turn.prompt_tokens <= SMALL_PROMPT_TOKENS_MAX)
    return replace(trace, turns=short[:7000]).resized(1 / 32).faster(20.0)


def split(folder: Path, play: int) -> Trace:
    return part(read_trace(folder / "conversation_trace.jsonl"), STARTS[play], 1500).faster(2.0)


WORKLOADS = (
    Workload("conversation", "Mooncake conversation, 1,500 requests at 3x its rate, 4 workers", conversation, len(STARTS)),
    Workload("synthetic", "Mooncake synthetic, 1,300 requests at 2x its rate, 4 workers", documents, 5),
    Workload("agentic", "aiperf agentic, closed loop, 4 workers", agents, len(PACES)),
    Workload("multi-turn", "8 turns of 2,000 tokens, 2 conversations/s, 4 workers", multiturn, 10),
    Workload(
        "slice", "Mooncake conversation, prompts up to 14,336 tokens, lengths / 32, 4 workers of 2,400 blocks x 16 tokens",
        small_slice, 1, Scenario(decode=4, policy="", engine=SMALL),
    ),
    Workload(
        "split", "Mooncake conversation, 1,500 requests at 2x its rate, 4 prefill and 2 decode workers", split, len(STARTS),
        Scenario(decode=2, prefill=4, policy="", lane_wait_s=0.2, timeout_s=3600.0),
    ),
)  # fmt: skip

Job = tuple[Path, str, int, str]


def run_job(job: Job) -> Summary:
    """In a process of its own."""
    folder, name, play, policy = job
    workload = next(one for one in WORKLOADS if one.name == name)
    scenario = msgspec.structs.replace(workload.scenario, policy=policy, seed=play)
    return run_one(workload.play(folder, play), scenario)


def run_all(jobs: Sequence[Job]) -> dict[Job, Summary]:
    """On every core, with a bar."""
    progress, found = Progress(len(jobs)), {}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        futures = {pool.submit(run_job, job): job for job in jobs}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            progress.step(" ".join(map(str, futures[future][1:])))
    progress.end()
    return found


def row(name: str, policy: str, plays: Sequence[Summary], rivals: Sequence[Summary]) -> Row:
    """The means of its plays. `rivals` are the plays of `cost`."""
    hits, ideal = [play.hit_rate for play in plays], [play.ideal_hit_rate for play in plays]
    gaps = [own.ttft_s.mean / other.ttft_s.mean - 1 for own, other in zip(plays, rivals, strict=True)]
    tails = [own.ttft_s.p99 / other.ttft_s.p99 - 1 for own, other in zip(plays, rivals, strict=True)]
    return {
        "workload": name,
        "policy": policy,
        "plays": len(plays),
        "ttft_mean_ms": 1e3 * mean(play.ttft_s.mean for play in plays),
        "ttft_p99_ms": 1e3 * mean(play.ttft_s.p99 for play in plays),
        "mean_over_cost_percent": 100 * mean(gaps),
        "mean_over_cost_error": 100 * stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None,
        "p99_over_cost_percent": 100 * mean(tails),
        "p99_over_cost_error": 100 * stdev(tails) / len(tails) ** 0.5 if len(tails) > 1 else None,
        "itl_mean_ms": 1e3 * mean(play.itl_s.mean for play in plays),
        "itl_p99_ms": 1e3 * mean(play.itl_s.p99 for play in plays),
        "hit_percent": 100 * mean(hits),
        "hit_of_ideal_percent": 100 * sum(hits) / sum(ideal),
        "failed": sum(play.failed for play in plays),
    }


COLUMNS = {
    "policy": "policy",
    "ttft_mean_ms": "TTFT mean ms",
    "mean_over_cost_percent": "over cost %",
    "mean_over_cost_error": "+-",
    "ttft_p99_ms": "TTFT p99 ms",
    "p99_over_cost_percent": "over cost %",
    "p99_over_cost_error": "+-",
    "itl_mean_ms": "ITL mean ms",
    "itl_p99_ms": "p99",
    "hit_percent": "hit %",
    "hit_of_ideal_percent": "of ideal %",
    "failed": "failed",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, metavar="FOLDER", help="of the three trace files")
    parser.add_argument(
        "--policy", action="append", metavar="NAME", help="only these, and cost (default: all built-in)"
    )
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument("--workload", action="append", choices=names, help="only these (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, a list of objects")
    parser.add_argument("--quick", action="store_true", help="one play of each workload")
    options = parser.parse_args()
    policies = list(dict.fromkeys((*(options.policy or POLICIES), "cost")))
    workloads = [one for one in WORKLOADS if not options.workload or one.name in options.workload]
    plays = {one.name: range(1 if options.quick else one.plays) for one in workloads}
    jobs = [
        (options.traces, one.name, play, policy) for one in workloads for play in plays[one.name] for policy in policies
    ]
    found = run_all(jobs)
    print(f"{machine()}\n{versions('hocket')}")
    rows: list[Row] = []
    for one in workloads:
        of = {
            policy: [found[options.traces, one.name, play, policy] for play in plays[one.name]] for policy in policies
        }
        part_rows = [row(one.name, policy, of[policy], of["cost"]) for policy in policies]
        print_table(f"{one.title} ({len(plays[one.name])} plays)", COLUMNS, part_rows)
        rows += part_rows
    write_json(options.json, rows)


if __name__ == "__main__":
    main()
