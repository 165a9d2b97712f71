"""`hocket lab`: the flags of its commands. What a command needs is imported when it runs: `--help` must be fast."""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .chaos_cli import add_chaos_commands

Parser = TypeVar("Parser", bound=argparse.ArgumentParser)

if TYPE_CHECKING:
    from .measure import Summary
    from .scenario import Engine, Scenario, Slo
    from .traces import Trace


def add_commands(commands: argparse._SubParsersAction[Parser]) -> None:
    """`hocket lab COMMAND`."""
    lab = commands.add_parser(
        "lab", help="simulate a pool on virtual time", description="Simulate a pool on virtual time."
    )
    actions = lab.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=type(lab))
    run = _command(actions, "run", "replay a trace and compare policies, pools, links and thresholds", _run)
    _add_trace(run)
    _add_pool(run)
    _add_engine(run)
    _add_output(run)
    add_chaos_commands(actions)

    plan = _command(actions, "plan", "how many GPUs a trace needs under an SLO, and whether to disaggregate", _plan)
    _add_trace(plan)
    _add_router(plan)
    _add_engine(plan)
    share = "share of the requests that must keep the SLO (default: 0.9)"
    plan.add_argument("--good", type=_positive, default=0.9, metavar="SHARE", help=share)
    _add_output(plan)

    fit = _command(actions, "fit", "make a profile from an engine's step log", _fit)
    _add_fit(fit)


def _command(
    actions: argparse._SubParsersAction[Parser], name: str, summary: str, act: Callable[[argparse.Namespace], int]
) -> Parser:
    parser = actions.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(run=act)
    return parser


# ---- flags


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def duration_s(text: str) -> float:
    """`2s`, `50ms` or plain seconds. Raises ValueError."""
    if text.endswith("ms"):
        return _positive(text[:-2]) / 1e3
    return _positive(text.removesuffix("s"))


def slo(text: str) -> dict[str, float]:
    """`ttft=2s,itl=50ms`, either may be left out. Raises ValueError."""
    limits = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name.strip() not in ("ttft", "itl"):
            raise ValueError
        limits[name.strip() + "_s"] = duration_s(value.strip())
    return limits


def _add_trace(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("trace")
    group.add_argument(
        "--trace", required=True, metavar="PATH",
        help="Mooncake or aiperf JSONL, Azure or vidur CSV; or synthetic:KIND,name=value,...",
    )  # fmt: skip
    group.add_argument("--requests", type=_count, default=0, metavar="N", help="only the first N (default: all)")
    copies = "so many of it side by side, with prefixes of their own (default: 1)"
    group.add_argument("--copies", type=_count, default=1, metavar="N", help=copies)
    group.add_argument("--speedup", type=_positive, default=1.0, metavar="X", help="arrival rate times X (default: 1)")
    group.add_argument("--resize", type=_positive, default=1.0, metavar="X", help="lengths times X (default: 1)")
    group.add_argument("--as-stamped", action="store_true", help="leave equal time stamps equal (default: spread them)")
    closed = "a turn that goes on from an earlier one waits for its answer (default: the trace's clock alone)"
    group.add_argument("--closed-loop", action="store_true", help=closed)
    clients = "N clients that each send their next request when an answer ends (default: the trace's clock)"
    group.add_argument("--concurrency", type=_count, default=0, metavar="N", help=clients)


def _add_pool(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pool (flags marked + may be repeated: every combination is run)")
    group.add_argument(
        "--workers", type=_count, action="append", metavar="N", help="+ workers that do both (default: 16)"
    )
    group.add_argument(
        "--prefill", type=_count, action="append", metavar="X", help="+ prefill workers; one --decode each"
    )
    group.add_argument(
        "--decode", type=_count, action="append", metavar="Y", help="+ decode workers; one --prefill each"
    )
    _add_router(parser)


def _add_router(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("router and links (+ may be repeated by hocket lab run)")
    policy = "+ round_robin, least_loaded, kv, module:Class or file.py:Class (default: those three; plan: kv)"
    group.add_argument("--policy", action="append", metavar="NAME", help=policy)
    link = "+ GB/s of each GPU's link, in and out (default: 64)"
    group.add_argument("--link-gb-per-s", type=_positive, action="append", metavar="GB", help=link)
    local = "+ at most so many uncached prompt tokens are computed by the decode worker itself (default: 16)"
    group.add_argument("--local-prefill-tokens-max", type=_count, action="append", metavar="N", help=local)
    slots = "jobs that a prefill worker pulls at once (default: 8)"
    group.add_argument("--prefill-slots", type=_count, default=8, metavar="N", help=slots)
    lane = "ms that a prefill job waits for the worker the policy names (default: no lanes)"
    group.add_argument("--lane-wait-ms", type=_positive, default=None, metavar="MS", help=lane)
    routers = "routers, each with its own view and an equal share of the requests (default: 1)"
    group.add_argument("--routers", type=_count, default=1, metavar="N", help=routers)
    limits = "what a good request keeps, e.g. ttft=2s,itl=50ms (default: nothing)"
    group.add_argument("--slo", type=slo, default={}, metavar="LIMITS", help=limits)
    group.add_argument(
        "--seed", type=_count, default=0, metavar="N", help="of the router's random choices (default: 0)"
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    profile = (
        "mocker (Dynamo's formula), h200-llama-8b, h200-llama-70b-fp8, or a file of hocket lab fit (default: mocker)"
    )
    group.add_argument("--profile", default="mocker", metavar="NAME", help=profile)
    group.add_argument(
        "--prefill-profile", default="", metavar="NAME", help="of prefill workers (default: as --profile)"
    )
    group.add_argument(
        "--tp", type=_count, default=1, metavar="N", help="GPUs of one worker, profiles only (default: 1)"
    )
    group.add_argument(
        "--prefill-tp", type=_count, default=0, metavar="N", help="of a prefill worker (default: as --tp)"
    )
    group.add_argument("--block-tokens", type=_count, default=64, metavar="N", help="tokens a KV block (default: 64)")
    group.add_argument(
        "--kv-blocks", type=_count, default=0, metavar="N", help="KV blocks a worker (default: the profile's)"
    )
    group.add_argument(
        "--slots", type=_count, default=0, metavar="N", help="requests in a batch (default: the profile's)"
    )
    budget = "tokens in a step (default: the profile's)"
    group.add_argument("--max-batched-tokens", type=_count, default=0, metavar="N", help=budget)
    group.add_argument(
        "--engine-speedup", type=_positive, default=1.0, metavar="X", help="engines X times as fast (default: 1)"
    )


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("log", metavar="STEPLOG", help="JSON lines, one engine step each (docs/lab.md)")
    parser.add_argument("--out", required=True, metavar="FILE.json", help="where the profile goes")
    facts = parser.add_argument_group("what the log does not say")
    facts.add_argument("--gpus", type=_count, default=1, metavar="N", help="GPUs of the engine (default: 1)")
    facts.add_argument(
        "--kv-bytes-per-token", type=_count, required=True, metavar="B", help="KV of one token, in bytes"
    )
    facts.add_argument("--kv-tokens", type=_count, required=True, metavar="N", help="tokens whose KV fits")
    facts.add_argument("--layers", type=_count, required=True, metavar="N", help="layers of the model")
    facts.add_argument("--hidden", type=_count, required=True, metavar="N", help="width of the model")
    facts.add_argument("--weight-gb", type=_positive, required=True, metavar="GB", help="weights of the model, in GB")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", default="", metavar="FILE", help="write every figure there, too (default: no)")
    group.add_argument("--html", default="", metavar="FILE", help="write a report with plots there, too (default: no)")
    group.add_argument("--jobs", type=_count, default=0, metavar="N", help="runs at once (default: one a core)")
    group.add_argument("--quiet", action="store_true", help="no progress bar (default: one, on a terminal)")


# ---- commands


def _trace(options: argparse.Namespace) -> Trace:
    from .synthetic import PREFIX, synthetic
    from .traces import read_trace

    is_made = options.trace.startswith(PREFIX)
    trace = synthetic(options.trace) if is_made else read_trace(Path(options.trace), as_stamped=options.as_stamped)
    trace = trace.copies(options.copies) if options.copies > 1 else trace
    trace = trace.first(options.requests) if options.requests else trace
    trace = trace.faster(options.speedup) if options.speedup != 1.0 else trace
    trace = trace.resized(options.resize) if options.resize != 1.0 else trace
    return trace.closed() if options.closed_loop else trace


def _engine(options: argparse.Namespace, profile: str, tp: int) -> Engine:
    from .scenario import Engine

    return Engine(
        profile=profile,
        tp=tp,
        block_tokens=options.block_tokens,
        kv_blocks=options.kv_blocks,
        slots=options.slots,
        max_batched_tokens=options.max_batched_tokens,
        speedup=options.engine_speedup,
    )


def _slo(options: argparse.Namespace) -> Slo:
    from .scenario import Slo

    return Slo(**options.slo)


def _scenarios(options: argparse.Namespace) -> list[Scenario]:
    """Every combination of the flags that were repeated."""
    from .scenario import Scenario

    pools = [(0, workers) for workers in options.workers or ()]
    prefill, decode = options.prefill or [], options.decode or []
    if len(prefill) != len(decode):
        raise ValueError("--prefill and --decode belong together: give as many of one as of the other")
    pools += zip(prefill, decode, strict=True)
    if not all(decode for _, decode in pools):
        raise ValueError("a pool needs at least one worker that decodes")
    return [
        Scenario(
            decode=y,
            prefill=x,
            policy=policy,
            engine=_engine(options, options.profile, options.tp),
            prefill_engine=_engine(
                options, options.prefill_profile or options.profile, options.prefill_tp or options.tp
            ),
            prefill_slots=options.prefill_slots,
            link_gb_per_s=link,
            lane_wait_s=options.lane_wait_ms / 1e3 if options.lane_wait_ms else None,
            local_prefill_tokens_max=local,
            routers=max(options.routers, 1),
            concurrency=options.concurrency,
            slo=_slo(options),
            seed=options.seed,
        )
        for (x, y), policy, link, local in itertools.product(
            pools or [(0, 16)],
            options.policy or ("round_robin", "least_loaded", "kv"),
            options.link_gb_per_s or (64.0,),
            options.local_prefill_tokens_max or (16,),
        )
    ]


def _run(options: argparse.Namespace) -> int:
    from ..router.policies.base import PolicyError, load_policy
    from .run import run_all, table, write_json
    from .timing import ProfileError
    from .traces import TraceError

    try:
        _check_plots(options)
        trace = _trace(options)
        scenarios = _scenarios(options)
        for scenario in scenarios:
            load_policy(scenario.policy)
            scenario.engine.resolved()
            (scenario.prefill_engine or scenario.engine).resolved()
    except (TraceError, PolicyError, ProfileError, ValueError) as error:
        print(f"hocket lab: {error}", file=sys.stderr)
        return 2
    with _Bar(is_shown=not options.quiet and sys.stderr.isatty()) as bar:
        summaries = run_all(trace, scenarios, jobs=options.jobs, progress=bar)
    print(f"{trace.name}: {len(trace.turns)} requests, engine {options.profile}")
    print(table(summaries))
    if options.json:
        write_json(Path(options.json), summaries)
    return _report(options, f"{trace.name} on a simulated pool", summaries) if options.html else 0


def _plan(options: argparse.Namespace) -> int:
    from ..router.policies.base import PolicyError, load_policy
    from .plan import Planner, rows_of
    from .run import table, write_json
    from .timing import ProfileError
    from .traces import TraceError

    options.workers, options.prefill, options.decode = [1], [], []
    options.policy = options.policy or ["kv"]
    try:
        _check_plots(options)
        trace = _trace(options)
        (base, *others) = _scenarios(options)
        if others or not options.slo:
            raise ValueError("plan needs --slo, and one policy, link and threshold")
        load_policy(base.policy)
        base.engine.resolved()
    except (TraceError, PolicyError, ProfileError, ValueError) as error:
        print(f"hocket lab: {error}", file=sys.stderr)
        return 2
    is_shown = not options.quiet and sys.stderr.isatty()
    planner = Planner(
        trace, base, good_share=options.good, tell=lambda text: print(text, file=sys.stderr) if is_shown else None
    )
    plan = planner.plan()
    print(plan.verdict())
    print(table(rows_of(plan)))
    if options.json:
        write_json(Path(options.json), planner.tried())
    return _report(options, f"{trace.name}: {plan.verdict()}", planner.tried()) if options.html else 0


def _fit(options: argparse.Namespace) -> int:
    import msgspec

    from .fit import FitError, fit, read_step_log
    from .timing import Profile

    try:
        found = fit(read_step_log(Path(options.log)))
    except FitError as error:
        print(f"hocket lab: {error}", file=sys.stderr)
        return 2
    out = Path(options.out)
    error_text = f"relative error {found.error_p50:.1%} in the middle, {found.error_p90:.1%} at the 90th percentile"
    profile = Profile(
        name=out.stem,
        gpus=options.gpus,
        coefficients=found.coefficients,
        kv_bytes_per_token=options.kv_bytes_per_token,
        kv_tokens=options.kv_tokens,
        layers=options.layers,
        hidden=options.hidden,
        weight_bytes=round(options.weight_gb * 1e9),
        notes=(f"Measured: {found.steps} engine steps; {error_text}.",),
    )
    out.write_bytes(msgspec.json.format(msgspec.json.encode(profile)))
    print(f"{out}: {found.steps} steps, {error_text}")
    for name, value in msgspec.structs.asdict(found.coefficients).items():
        print(f"  {name.ljust(20)} {value:.6g}")
    return 0


def _check_plots(options: argparse.Namespace) -> None:
    """Before anything is simulated for a report that cannot be drawn. Raises ValueError."""
    if options.html and find_spec("matplotlib") is None:
        raise ValueError("--html needs matplotlib: pip install 'hocket[lab]'")


def _report(options: argparse.Namespace, title: str, summaries: list[Summary]) -> int:
    from .report import write_report

    try:
        write_report(Path(options.html), title, shlex.join(["hocket", *sys.argv[1:]]), summaries)
    except OSError as error:
        print(f"hocket lab: {error}", file=sys.stderr)
        return 1
    print(f"report: {options.html}")
    return 0


class _Bar:
    """A progress bar on stderr."""

    def __init__(self, *, is_shown: bool) -> None:
        self._is_shown = is_shown

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_shown:
            print("\r" + " " * 78 + "\r", end="", file=sys.stderr, flush=True)

    def __call__(self, ended: int, total: int) -> None:
        if self._is_shown:
            share = ended / max(total, 1)
            bar = "#" * round(share * 40)
            print(f"\r[{bar:<40}] {share:4.0%}  {ended:,} of {total:,}", end="", file=sys.stderr, flush=True)
