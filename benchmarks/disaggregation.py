"""Llama-70B FP8, 3,000 tokens in and 150 out: tokens/s per GPU at equal ITL, aggregated against disaggregated.

The set-up of NVIDIA's published claim for Dynamo (+30 % on one node of 8 GPUs, more than 2x on two), on the measured profile
of an H200 and on virtual time; tensor parallelism is arithmetic (`hocket.lab.timing.tensor_parallel`). For each pool the
number of clients is swept; a limit on the mean gap between tokens then picks the best point, TTFT up to 3 s on average.

    python benchmarks/disaggregation.py [--profile NAME] [--quick] [--json FILE] [--plot FILE.svg] [--chunk-tokens 8192]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from measure import Progress, Row, machine, print_table, versions, write_json

from hocket.lab.run import run_one
from hocket.lab.scenario import Engine, Scenario
from hocket.lab.synthetic import synthetic

LIMITS_MS = (10, 12, 15, 20, 25, 30, 40, 50)
CLIENTS = (2, 4, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256)


@dataclass(frozen=True)
class Pool:
    """Workers and the GPUs of each."""

    name: str
    decode: int
    decode_gpus: int
    prefill: int = 0
    prefill_gpus: int = 1

    @property
    def gpus(self) -> int:
        return self.decode * self.decode_gpus + self.prefill * self.prefill_gpus


POOLS = (
    Pool("2 x TP4", 2, 4),
    Pool("4 x TP2", 4, 2),
    Pool("8 x TP1", 8, 1),
    Pool("4P TP1 + 1D TP4 (NVIDIA's)", 1, 4, 4),
    Pool("6P TP1 + 1D TP2", 1, 2, 6),
    Pool("5P TP1 + 3D TP1", 3, 1, 5),
    Pool("1P TP4 + 1D TP4", 1, 4, 1, 4),
    Pool("2 x TP8", 2, 8),
    Pool("4 x TP4", 4, 4),
    Pool("8P TP1 + 1D TP8 (NVIDIA's)", 1, 8, 8),
    Pool("12P TP1 + 1D TP4", 1, 4, 12),
)


def point(pool: Pool, clients: int, options: argparse.Namespace) -> Row:
    """One pool under `clients` clients, each of which sends its next request when an answer ends."""

    def engine(gpus: int) -> Engine:
        return Engine(profile=options.profile, tp=gpus, max_batched_tokens=options.chunk_tokens)

    requests = max(100 if options.quick else 300, clients * 6)
    trace = synthetic(f"synthetic:poisson,requests={requests},rate=1000,prompt=3000,output=150")
    scenario = Scenario(
        decode=pool.decode,
        prefill=pool.prefill,
        policy="least_loaded",
        engine=engine(pool.decode_gpus),
        prefill_engine=engine(pool.prefill_gpus),
        link_gb_per_s=options.link_gb_per_s,
        concurrency=clients,
    )
    summary = run_one(trace, scenario)
    return {
        "pool": pool.name,
        "gpus": pool.gpus,
        "clients": clients,
        "itl_ms": summary.tpot_s.mean * 1e3,
        "itl_p99_ms": summary.itl_s.p99 * 1e3,
        "ttft_s": summary.ttft_s.mean,
        "tokens_per_s_gpu": summary.output_tokens_per_s_gpu,
    }


def best(points: list[Row], limit_ms: float, ttft_s: float) -> float | None:
    """The most tokens/s per GPU within both limits, between two points by linear interpolation of the ITL."""
    reached: float | None = None
    before: Row | None = None
    for row in points:
        if not (isinstance(row["itl_ms"], float) and isinstance(row["tokens_per_s_gpu"], float)):
            raise TypeError("a point without its figures")
        if isinstance(row["ttft_s"], float) and row["ttft_s"] > ttft_s:
            break
        if row["itl_ms"] <= limit_ms:
            reached = max(reached or 0.0, row["tokens_per_s_gpu"])
        elif before is not None and isinstance(before["itl_ms"], float) and before["itl_ms"] <= limit_ms:
            share = (limit_ms - before["itl_ms"]) / (row["itl_ms"] - before["itl_ms"])
            from_rate = before["tokens_per_s_gpu"]
            if isinstance(from_rate, float):
                reached = max(reached or 0.0, from_rate + share * (row["tokens_per_s_gpu"] - from_rate))
        before = row
    return reached


def plot(file: Path, points: list[Row], ttft_s: float) -> None:
    """Throughput over ITL, one line a pool; needs matplotlib."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "hocket"
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, gpus, title in zip(panels, (8, 16), ("8 GPUs, one node", "16 GPUs, two nodes"), strict=True):
        for pool in (pool for pool in POOLS if pool.gpus == gpus):
            rows = [row for row in points if row["pool"] == pool.name and float(row["ttft_s"] or 0) <= ttft_s]
            x, y = [float(row["itl_ms"] or 0) for row in rows], [float(row["tokens_per_s_gpu"] or 0) for row in rows]
            axes.plot(x, y, marker=".", ls="-" if pool.prefill else "--", label=pool.name)
        axes.set(xscale="log", xlabel="mean gap between tokens (ms)", title=title, xlim=(7, 60), ylim=(0, 310))
        axes.set_xticks([8, 10, 15, 20, 30, 50], ["8", "10", "15", "20", "30", "50"])
        axes.minorticks_off()
        axes.grid(visible=True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("output tokens/s per GPU")
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every point there, a list of objects")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="throughput over ITL; needs matplotlib")
    parser.add_argument("--profile", default="h200-llama-70b-fp8", help="of one GPU (h200-llama-70b-fp8)")
    parser.add_argument("--quick", action="store_true", help="fewer clients and requests: 10 s")
    parser.add_argument("--ttft-s", type=float, default=3.0, help="mean TTFT that may not be passed (3)")
    parser.add_argument("--chunk-tokens", type=int, default=8192, help="tokens in a step (8192)")
    parser.add_argument("--link-gb-per-s", type=float, default=50.0, help="of each GPU (50: one 400 Gbit/s port)")
    options = parser.parse_args()
    clients = CLIENTS[1::3] if options.quick else CLIENTS
    progress = Progress(len(POOLS) * len(clients))
    points: list[Row] = []
    rows: list[Row] = []
    for pool in POOLS:
        mine = []
        for count in clients:
            progress.step(f"{pool.name}, {count} clients")
            mine.append(point(pool, count, options))
        points += mine
        rows.append(
            {"pool": pool.name, "gpus": pool.gpus} | {str(ms): best(mine, ms, options.ttft_s) for ms in LIMITS_MS}
        )
    progress.end()
    print(f"{machine()}\n{versions('hocket')}; virtual time: the machine does not matter")
    columns = {"pool": "output tokens/s per GPU at a mean ITL of at most", "gpus": "GPUs"}
    print_table(
        f"{options.profile}, 3,000 in, 150 out, mean TTFT at most {options.ttft_s:g} s",
        columns | {str(ms): f"{ms} ms" for ms in LIMITS_MS},
        rows,
    )
    write_json(options.json, points)
    if options.plot:
        plot(options.plot, points, options.ttft_s)


if __name__ == "__main__":
    main()
