"""One HTML page for a comparison: what was asked, the answer in a sentence, plots, every figure. Needs matplotlib."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .measure import Curve, Summary
from .run import COLUMNS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colour-blind safe (Okabe and Ito), readable on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B5B5B", "#8B4513")
LEGEND_MAX = 12

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 1080px; margin: 2.5em auto; padding: 0 1em }
h1 { font-size: 1.5em; margin-bottom: .2em } h2 { font-size: 1.1em; margin: 2em 0 .4em }
p.sub { color: #666; margin-top: 0 } p.answer { font-size: 1.1em; border-left: 4px solid #0072B2; padding-left: .8em }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 1em }
svg { width: 100%; height: auto }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
td, th { padding: .25em .7em; text-align: right; white-space: nowrap } td:first-child, th:first-child { text-align: left }
tr { border-bottom: 1px solid #e5e5e5 } th { color: #666; font-weight: 600 } tr.best { background: #eef6fb }
code { background: #f4f4f4; padding: .1em .3em }
"""


def write_report(path: Path, title: str, command: str, summaries: Sequence[Summary]) -> None:
    """Raises OSError."""
    best = best_of(summaries)
    rows = "".join(_row(summary, is_best=summary is best) for summary in summaries)
    head = "".join(f"<th>{html.escape(name)}</th>" for name, _ in COLUMNS)
    plots = "".join(f"<figure>{_plot(draw, summaries)}</figure>" for draw in _DRAWINGS)
    first = summaries[0]
    page = f"""<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>
<h1>{html.escape(title)}</h1>
<p class="sub">{first.requests:,} requests over {first.duration_s:,.0f} s of simulated time; engine
{html.escape(first.scenario.engine.profile)}, blocks of {first.scenario.engine.block_tokens} tokens</p>
<p class="answer">{html.escape(verdict(summaries))}</p>
<div class="plots">{plots}</div>
<h2>Every run</h2><div class="scroll"><table><tr>{head}</tr>{rows}</table></div>
<h2>How to read it</h2>
<p>TTFT: from a request's arrival at the router to its first token. ITL: the gaps between tokens, every token counted.
Good: the share of requests that kept the limits ({html.escape(_limits(first))}); a request's ITL is the mean of its gaps.
Hit: prompt tokens that were in the prefix cache of whoever computed the prompt; ideal: one endless cache.
KV GB: moved from prefill to decode workers. The same command gives the same figures.</p>
<p><code>{html.escape(command)}</code></p>
"""
    path.write_text(page)


def best_of(summaries: Sequence[Summary]) -> Summary:
    """Most good requests a second and GPU; then the shortest wait for the first token."""
    return max(summaries, key=lambda s: (round(s.good_per_s / s.gpus, 3), -s.ttft_s.mean))


def verdict(summaries: Sequence[Summary]) -> str:
    """The comparison in a sentence."""
    best = best_of(summaries)
    if len(summaries) == 1:
        return (
            f"{best.label}: TTFT {best.ttft_s.mean:.3f} s mean, {best.ttft_s.p99:.2f} s p99; {best.goodput:.1%} good."
        )
    others = [summary for summary in summaries if summary is not best]
    next_best = best_of(others)
    return (
        f"{best.label} serves {best.good_per_s / best.gpus:.3f} good requests a second and GPU with a mean TTFT of "
        f"{best.ttft_s.mean:.3f} s; next comes {next_best.label} with {next_best.good_per_s / next_best.gpus:.3f} "
        f"and {next_best.ttft_s.mean:.3f} s."
    )


def _limits(summary: Summary) -> str:
    slo = summary.scenario.slo
    limits = [f"TTFT <= {slo.ttft_s:g} s"] * (slo.ttft_s < float("inf"))
    limits += [f"ITL <= {slo.itl_s * 1e3:g} ms"] * (slo.itl_s < float("inf"))
    return ", ".join(limits) or "none were given"


def _row(summary: Summary, *, is_best: bool) -> str:
    cells = "".join(f"<td>{html.escape(cell(summary))}</td>" for _, cell in COLUMNS)
    return f"<tr{' class=best' if is_best else ''}>{cells}</tr>"


def _plot(draw: Callable[[Axes, Sequence[Summary]], None], summaries: Sequence[Summary]) -> str:
    """The drawing as SVG text."""
    figure = _new_figure()
    axes = figure.add_subplot()
    draw(axes, summaries)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, alpha=0.25)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2]


def _new_figure() -> Figure:
    import matplotlib  # Optional, and it takes half a second.
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "hocket"  # Else the ids in it differ from run to run.
    return Figure(figsize=(6.4, 4.0), layout="constrained")


def _lines(axes: Axes, summaries: Sequence[Summary], curve: Callable[[Summary], Curve]) -> None:
    for number, summary in enumerate(summaries[:LEGEND_MAX]):
        x, share = curve(summary)
        axes.plot(x, np.asarray(share) * 100, label=summary.label, color=COLOURS[number % len(COLOURS)], lw=1.8)
    axes.set_ylabel("% of requests")
    axes.set_ylim(0, 101)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _draw_ttft(axes: Axes, summaries: Sequence[Summary]) -> None:
    _lines(axes, summaries, lambda summary: summary.ttft_curve)
    axes.set_xscale("log")
    axes.set_xlabel("time to first token, at most (s)")
    axes.set_title("How long users wait for the first token", loc="left")
    _limit(axes, summaries[0].scenario.slo.ttft_s)


def _draw_itl(axes: Axes, summaries: Sequence[Summary]) -> None:
    _lines(axes, summaries, lambda summary: ([x * 1e3 for x in summary.tpot_curve[0]], summary.tpot_curve[1]))
    axes.set_xscale("log")
    axes.set_xlabel("mean gap between tokens, at most (ms)")
    axes.set_title("How fast answers flow", loc="left")
    _limit(axes, summaries[0].scenario.slo.itl_s * 1e3)


def _limit(axes: Axes, at: float) -> None:
    if at < float("inf"):
        axes.axvline(at, color="#999", ls="--", lw=1)


def _bars(axes: Axes, summaries: Sequence[Summary], value: Callable[[Summary], float]) -> None:
    shown = list(summaries[:LEGEND_MAX])[::-1]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(shown))][::-1]
    bars = axes.barh([summary.label for summary in shown], [value(summary) for summary in shown], color=colours)
    axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    axes.tick_params(axis="y", labelsize=8)


def _draw_goodput(axes: Axes, summaries: Sequence[Summary]) -> None:
    _bars(axes, summaries, lambda summary: summary.good_per_s / summary.gpus)
    axes.set_xlabel("requests a second and GPU")
    axes.set_title("Good requests", loc="left")


def _draw_hits(axes: Axes, summaries: Sequence[Summary]) -> None:
    _bars(axes, summaries, lambda summary: summary.hit_rate * 100)
    ideal = summaries[0].ideal_hit_rate * 100
    axes.axvline(ideal, color="#999", ls="--", lw=1)
    axes.set_xlabel(f"% of prompt tokens (dashed: one endless cache, {ideal:.1f} %)")
    axes.set_title("Prompt tokens found in a cache", loc="left")


def _draw_in_flight(axes: Axes, summaries: Sequence[Summary]) -> None:
    for number, summary in enumerate(summaries[:LEGEND_MAX]):
        axes.plot(*summary.in_flight_curve, label=summary.label, color=COLOURS[number % len(COLOURS)], lw=1.2)
    axes.set_xlabel("simulated time (s)")
    axes.set_ylabel("requests")
    axes.set_title("Requests in the pool", loc="left")
    axes.legend(frameon=False, fontsize=8)


def _draw_spread(axes: Axes, summaries: Sequence[Summary]) -> None:
    """Each worker's busy share, sorted: how evenly the work was spread."""
    for number, summary in enumerate(summaries[:LEGEND_MAX]):
        shares = sorted((share * 100 for share in summary.busy_workers), reverse=True)
        axes.plot(
            range(1, len(shares) + 1), shares, marker=".", label=summary.label, color=COLOURS[number % len(COLOURS)]
        )
    axes.set_ylim(0, 105)
    axes.set_xlabel("workers, the busiest first")
    axes.set_ylabel("% of the time computing")
    axes.set_title("How evenly workers are used", loc="left")
    axes.legend(frameon=False, fontsize=8)


_DRAWINGS = (_draw_ttft, _draw_itl, _draw_goodput, _draw_hits, _draw_in_flight, _draw_spread)
