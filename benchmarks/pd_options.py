"""The command line of `gpu_pd.py`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from pd_models import SHAPES

from hocket.lab.traces import Trace, TraceError, read_trace

Ints = list[int]


def _words(text: str) -> list[str]:
    return [item for item in text.split(",") if item]


def _ints(text: str) -> Ints:
    return [int(item) for item in text.split(",") if item]


def _load(text: str) -> tuple[int, int, list[tuple[int, float]]]:
    """Of "ISL/OSL" or "ISL/OSL@4+8+2/s": ISL, OSL, and (in flight, requests/s) of each point."""
    lengths, _, points = text.partition("@")
    isl, osl = map(int, lengths.split("/"))
    items = [item for item in points.split("+") if item]
    return isl, osl, [(0, float(item[:-2])) if item.endswith("/s") else (int(item), 0.0) for item in items]


def _loads(text: str) -> list[tuple[int, int, list[tuple[int, float]]]]:
    try:
        return [_load(item) for item in _words(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ISL/OSL[@N+N+R/s], with commas") from None


def _trace(text: str) -> Trace:
    try:
        return read_trace(Path(text)).shifted()
    except (OSError, TraceError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _floats(text: str) -> list[float]:
    return [float(item) for item in text.split(",") if item]


def parse(description: str | None) -> argparse.Namespace:
    """What the command line says. Exits with a message for what cannot be."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="llama-8b", help="sizes of the model")
    add("--model", type=Path, help="a model's folder instead; it needs a tokenizer.json")
    add("--random-weights", action="store_true", help="weights whose answers depend on KV (torch makes them)")
    add(
        "--systems",
        default="pd,aggregated",
        type=_words,
        help="pd, aggregated, vllm, vllm-tp, vllm-nixl; empty: only report what --add has",
    )
    add("--together", action="store_true", help="start all systems at once: each GPU holds one engine of each")
    add("--gpus", default="", help="default: all; one is shared by prefill and decode")
    add("--prefill", type=int, help="how many of them prefill (default: half)")
    add(
        "--loads",
        type=_loads,
        default="3000/150,500/500,8000/1000",
        metavar="ISL/OSL[@N+N+R/s]",
        help="tokens; after @ requests in flight, or a second, of this one",
    )
    add(
        "--concurrency",
        type=_ints,
        default=[2, 4, 8, 16, 32, 64],
        help="requests in flight over all GPUs, a point each",
    )
    add("--rates", type=_floats, default=[], help="Poisson, requests/s")
    add("--trace", type=_trace, help="also requests of a trace's lengths at its times, a file that `hocket lab` reads")
    add("--trace-speeds", type=_floats, default=[1.0], help="so many times as fast, a point each")
    add("--trace-warm-s", type=float, default=20.0)
    add("--trace-window-s", type=float, default=60.0)
    add("--budgets", type=_ints, default=[8192, 2048, 512], help="tokens of a step of the aggregated engines")
    add("--swept", type=int, help="so many of the loads with every budget, the others and the trace with the first one")
    add("--prefill-chunk", type=int, default=8192, help="tokens of a step of prefill engines")
    add("--check", type=_ints, default=[64, 1000, 3000], help="ISL of the prompts that are answered alone")
    add("--warm-s", type=float, default=10.0)
    add("--window-s", type=float, default=30.0)
    add("--time-s", type=float, default=3600.0, help="no point begins that would end after that")
    add("--start-s", type=float, default=500.0, help="a system must be ready by then")
    add("--kv-gib", type=float, default=30.0, help="KV cache of an engine")
    add("--memory-share", type=float, default=0.9, help="of a GPU that one engine may take")
    add("--slots", type=int, default=128, help="requests at once of an engine that decodes")
    add("--prefill-slots", type=int, default=4)
    add("--max-model-len", type=int, default=16384)
    add(
        "--graph-sizes",
        type=_ints,
        default=[1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128],
        help="CUDA graphs; empty: vLLM's own",
    )
    add("--transports", default="ucx,tcp")
    add("--staging-mib", type=int, default=512)
    add("--verify-kv", action="store_true", help="digest the KV in the blocks where it landed, too")
    add("--dtype", default="auto", help="float32 tells a wrong token from another rounding")
    add(
        "--batch-invariant", action="store_true", help="vLLM's kernels that round alike in every batch: slow, for texts"
    )
    add("--engine-args", type=json.loads, default={}, metavar="JSON", help="more arguments of every engine")
    add("--mps", action="store_true", help="an MPS daemon of their own for engines that share a GPU")
    add("--eager", action="store_true", help="no CUDA graphs")
    add("--cpu", action="store_true", help="vLLM's CPU build, one engine a core")
    add("--quick", action="store_true", help="one small load, short windows")
    add("--json", type=Path)
    add(
        "--add",
        type=Path,
        nargs="*",
        default=[],
        metavar="FILE",
        help="JSON of earlier runs that the tables include, too",
    )
    add("--png", type=Path, help="the curves")
    add("--folder", type=Path, help="keep configs and logs here")
    return _complete(parser.parse_args())


def _complete(options: argparse.Namespace) -> argparse.Namespace:
    """What follows from the other options."""
    if options.quick:
        options.loads, options.concurrency, options.budgets = _loads("200/20"), [1, 4], options.budgets[:1]
        options.check, options.warm_s, options.window_s = [64, 300], 3.0, 8.0
    options.gpus = _words(options.gpus) or _all_gpus(options.cpu or not options.systems)
    options.prefill = options.prefill or max(1, len(options.gpus) // 2)
    if "num_local_experts" in SHAPES[options.shape]:
        os.environ["SPREAD_DUMMY_WEIGHTS"] = "1"
    if options.batch_invariant:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    return options


def _all_gpus(is_cpu: bool) -> list[str]:
    if is_cpu:
        return ["", ""]
    found = [str(index) for index in range(64) if Path(f"/dev/nvidia{index}").exists()]
    if not found:
        raise SystemExit("there is no GPU; --cpu runs without one")
    return found
