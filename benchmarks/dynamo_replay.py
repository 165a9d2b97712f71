"""The same trace and settings in Dynamo's own offline replay (its mocker) and in the lab, request by request.

Needs a Python with `ai-dynamo` (1.6.1 was compared) in an environment of its own:
    python -m venv dynamo && dynamo/bin/pip install --no-deps ai-dynamo ai-dynamo-runtime typing-extensions pydantic numpy
    python benchmarks/dynamo_replay.py --trace conversation_trace.jsonl --dynamo-python dynamo/bin/python [--workers 16]

Equal: engine formula, blocks of 64 tokens, 256 requests and 8,192 tokens a step, time stamps as they are, no delay
of messages. With `kv` the two routers choose for themselves, each by its own view of the load.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import mean

from measure import Row, machine, percentile, print_table, versions, write_json

from hocket.lab.measure import cached_tokens, tpot_s, ttft_s
from hocket.lab.replay import Replay, Request
from hocket.lab.scenario import Engine, Scenario
from hocket.lab.traces import read_trace

THEIRS = """
import json, sys
from dynamo._core import _normalize_mocker_config
from dynamo.replay.api import run_trace_replay
trace, workers, mode, blocks, out = sys.argv[1:]
sizes = dict(num_gpu_blocks=int(blocks), block_size=64, max_num_seqs=256, max_num_batched_tokens=8192)
report = run_trace_replay([trace], extra_engine_args=_normalize_mocker_config(dict(engine=sizes)), num_workers=int(workers),
                          router_mode=mode, trace_block_size=512, capture_per_request=True)
json.dump(report.per_request, open(out, "w"), default=str)
"""
MODES = {"round_robin": "round_robin", "kv": "kv_router"}
TIMEOUT_S = 600.0

Theirs = list[dict[str, float]]


def run_theirs(options: argparse.Namespace, policy: str) -> Theirs:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        arguments = [str(options.trace), str(options.workers), MODES[policy], str(options.kv_blocks), str(out)]
        command = [options.dynamo_python, "-c", THEIRS, *arguments]
        subprocess.run(command, check=True, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        records: Theirs = json.loads(out.read_text())
        return records


def run_ours(options: argparse.Namespace, policy: str) -> list[Request]:
    scenario = Scenario(
        decode=options.workers, policy=policy, engine=Engine(kv_blocks=options.kv_blocks), bus_s=0.0, queue_s=0.0
    )
    return Replay(read_trace(options.trace, as_stamped=True), scenario).run().requests


def compare(policy: str, ours: list[Request], theirs: Theirs) -> list[Row]:
    """One row for each side, and how many requests waited equally long for their first token."""
    our_ms, their_ms = [ttft_s(request) * 1e3 for request in ours], [record["ttft_ms"] for record in theirs]
    gaps = [gap * 1e3 for request in ours if (gap := tpot_s(request)) is not None]
    prompt_tokens = sum(request.turn.prompt_tokens for request in ours)
    sides = (
        ("lab", our_ms, mean(gaps), sum(cached_tokens(request) for request in ours)),
        (
            "Dynamo",
            their_ms,
            mean(record["itl_ms"] for record in theirs if record["itl_ms"]),
            sum(record["reused_input_tokens"] or 0 for record in theirs),
        ),
    )
    rows: list[Row] = [
        {
            "who": f"{who}, {policy}",
            "ttft_mean_ms": mean(waits),
            "ttft_p50_ms": percentile(waits, 0.5),
            "ttft_p99_ms": percentile(waits, 0.99),
            "itl_mean_ms": itl_ms,
            "hit_percent": 100 * hits / prompt_tokens,
        }
        for who, waits, itl_ms, hits in sides
    ]
    rows[0]["ttft_ratio"] = mean(our_ms) / mean(their_ms)
    rows[0]["equal_percent"] = 100 * _equal_share(ours, theirs)
    return rows


def _equal_share(ours: list[Request], theirs: Theirs) -> float:
    """Requests whose TTFT is equal to 1 ms. They are told apart by arrival and lengths."""
    waits: dict[tuple[int, int, int], list[float]] = defaultdict(list)
    for record in theirs:
        key = round(record["arrival_time_ms"]), int(record["input_length"]), int(record["output_length"])
        waits[key].append(record["ttft_ms"])
    equal = 0
    for request in ours:
        key = round(request.arrived_s * 1e3), request.turn.prompt_tokens, request.turn.output_tokens
        if waits[key]:
            equal += abs(waits[key].pop(0) - ttft_s(request) * 1e3) < 1.0
    return equal / len(ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True, metavar="PATH", help="Mooncake JSONL")
    parser.add_argument("--dynamo-python", required=True, metavar="PYTHON", help="of the environment with ai-dynamo")
    parser.add_argument("--workers", type=int, default=16, metavar="N", help="aggregated (16)")
    parser.add_argument("--kv-blocks", type=int, default=16384, metavar="N", help="of 64 tokens, each worker (16384)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, a list of objects")
    parser.add_argument("--quick", action="store_true", help="round robin only")
    options = parser.parse_args()
    rows: list[Row] = []
    for policy in ("round_robin",) if options.quick else MODES:
        rows += compare(policy, run_ours(options, policy), run_theirs(options, policy))
    print(f"{machine()}\n{versions('hocket')}")
    columns = {
        "who": f"{options.workers} workers",
        "ttft_mean_ms": "TTFT mean ms",
        "ttft_p50_ms": "p50",
        "ttft_p99_ms": "p99",
        "itl_mean_ms": "ITL mean ms",
        "hit_percent": "hit %",
        "ttft_ratio": "mean TTFT, ratio",
        "equal_percent": "equal to 1 ms, %",
    }
    print_table(options.trace.name, columns, rows)
    write_json(options.json, rows)


if __name__ == "__main__":
    main()
