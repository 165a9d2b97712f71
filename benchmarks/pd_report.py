"""What the points of `gpu_pd.py` say together: tokens a second and GPU at equal ITL, as rows and as curves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from measure import Row

COLUMNS = {
    "system": "system",
    "budget": "chunk",
    "load": "load",
    "tokens_per_s_gpu": "tokens/s/GPU",
    "itl_mean_ms": "ITL mean ms",
    "itl_p50_ms": "p50",
    "itl_p99_ms": "p99",
    "ttft_p50_ms": "TTFT p50 ms",
    "ttft_p99_ms": "p99",
    "kv_gb_per_s": "KV GB/s",
    "gpu0_busy_pct": "GPU0 %",
    "gpu1_busy_pct": "GPU1 %",
    "cpu_router": "router cores",
    "cpu_nats": "bus cores",
    "errors": "errors",
}
EQUAL_COLUMNS = {
    "loads": "ISL/OSL",
    "itl": "at equal",
    "limit_ms": "ms",
    "pd": "pd tokens/s/GPU",
    "against": "against",
    "other": "its tokens/s/GPU",
    "other_budget": "chunk",
    "ratio": "ratio",
}
ITLS = {"itl_mean_ms": "mean ITL", "itl_p99_ms": "p99 ITL"}


def best_at(points: Sequence[Row], itl: str, limit_ms: float) -> float | None:
    """The most tokens/s/GPU with an ITL of at most `limit_ms`: of the points, and of the lines between neighbours."""
    curve = sorted((float(row[itl] or 0), float(row["tokens_per_s_gpu"] or 0)) for row in points if row[itl])
    best = max((tokens for at, tokens in curve if at <= limit_ms), default=None)
    for (at, tokens), (next_at, next_tokens) in zip(curve, curve[1:], strict=False):
        if at <= limit_ms < next_at:
            on_line = tokens + (next_tokens - tokens) * (limit_ms - at) / (next_at - at)
            best = on_line if best is None else max(best, on_line)
    return best


def equal_itl(points: Sequence[Row]) -> list[Row]:
    """At each point of `pd`: what each other system reaches with the same ITL. Each chunk budget is a curve; the best counts."""
    rows: list[Row] = []
    for loads in dict.fromkeys(row["loads"] for row in points):
        of_loads = [row for row in points if row["loads"] == loads]
        ours = [row for row in of_loads if row["system"] == "pd"]
        others = dict.fromkeys(row["system"] for row in of_loads if row["system"] != "pd")
        for itl, title in ITLS.items():
            for limit_ms in sorted(float(row[itl] or 0) for row in ours if row[itl]):
                mine = best_at(ours, itl, limit_ms)
                for system in others:
                    budget, best = _best_budget([row for row in of_loads if row["system"] == system], itl, limit_ms)
                    ratio = mine / best if mine and best else None
                    rows.append(
                        {"loads": loads, "itl": title, "limit_ms": limit_ms, "pd": mine, "against": system, "other": best,
                         "other_budget": budget if best else "none reaches it", "ratio": ratio}
                    )  # fmt: skip
    return rows


def _best_budget(points: Sequence[Row], itl: str, limit_ms: float) -> tuple[object, float | None]:
    """The chunk budget whose curve has the most tokens/s/GPU, and how many."""
    budgets = dict.fromkeys(row["budget"] for row in points)
    found = {budget: best_at([row for row in points if row["budget"] == budget], itl, limit_ms) for budget in budgets}
    return max(found.items(), key=lambda item: item[1] or 0.0)


def draw(points: Sequence[Row], file: Path, title: str) -> bool:
    """Curves of each system, a picture a load; crosses: open loop. False where matplotlib is not installed."""
    try:
        import matplotlib as mpl  # Optional: the rows say the same.
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot

    counts = Counter((row["loads"], row["system"], row["budget"]) for row in points)
    loads = list(dict.fromkeys(load for (load, _, _), count in counts.items() if count > 1)) or [points[0]["loads"]]
    figure, grid = pyplot.subplots(len(loads), 3, figsize=(15, 4.2 * len(loads)), squeeze=False)
    axes = {"itl_mean_ms": "mean ITL, ms", "itl_p99_ms": "p99 ITL, ms", "ttft_p50_ms": "TTFT p50, ms"}
    for line, load in zip(grid, loads, strict=True):
        for axis, (key, label) in zip(line, axes.items(), strict=True):
            of_load = [row for row in points if row["loads"] == load and row[key]]
            for system, budget in dict.fromkeys((row["system"], row["budget"]) for row in of_load):
                own = [row for row in of_load if (row["system"], row["budget"]) == (system, budget)]
                curve = [row for row in own if not str(row["load"]).endswith("/s")]
                curve.sort(key=lambda row: int(str(row["load"]).split()[0]))
                name = f"{system} {budget}" if budget else str(system)
                (drawn,) = axis.plot([r[key] for r in curve], [r["tokens_per_s_gpu"] for r in curve], "o-", label=name)
                open_loop = [row for row in own if row not in curve]
                xs, ys = [r[key] for r in open_loop], [r["tokens_per_s_gpu"] for r in open_loop]
                axis.plot(xs, ys, "x", color=drawn.get_color())
            axis.set(xlabel=label, ylabel="tokens/s per GPU", title=f"ISL/OSL {load}")
            axis.set_ylim(bottom=0)
            axis.grid(visible=True, alpha=0.3)
        line[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(file, dpi=90)
    return True
