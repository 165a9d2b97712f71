#!/usr/bin/env python3
"""How fast KV goes from one process to another: our hand-off, NIXL, plain sockets, and one copy as the limit.

    python benchmarks/kv_handoff.py [--quick] [--json FILE] [--nixl-site DIR]
    python benchmarks/kv_handoff.py --device cuda       two processes on one GPU, under an MPS daemon of their own
    python benchmarks/kv_handoff.py --device peers      a GPU for each

`ms` is from "all layers are ready" in the prefill process to "landed and verified" in the decode process. The claim was
granted and the chunk announced before, as in a worker, where computing a prompt takes longer than that; in `with claim`
they come after the layers. The methods take turns in the same two processes; what is shown are medians. The bytes of each
method are compared once for each case. Ours has digests on both sides; NIXL (WRITE, prepared descriptors, the receiver
notified) and sockets have none. `memcpy` is one pass over the same blocks by one thread of one process; on a GPU
`one process` gathers, copies and scatters in 16 MiB pieces on three streams, on two GPUs `peer copy` is one copy of torch's
between them. docs/benchmarks.md says more.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import msgspec
from handoff_cases import MIB, Case, contiguous, gpu_cases, layer_by_layer, scattered
from handoff_mps import mps_daemon
from handoff_pair import MethodFailed, Pair
from handoff_roles import Setup, run_role
from measure import Progress, Row, machine, print_table, versions, write_json

SCHEMES = ("cuda_ipc", "ucx", "cma", "tcp")
ALONE = ("memcpy", "one process", "peer copy")
WITHOUT_CLAIM = ("sockets", *ALONE)
CONTIGUOUS_MIB = (1, 4, 16, 64, 256, 1024)
SCATTERED_KIB = (16, 32, 64)
IDLE_S = 5.0
UNOPENED_MAX = 2
PACKAGES = (
    "ucxx-cu13",
    "ucxx-cu12",
    "libucx-cu13",
    "libucx-cu12",
    "nixl-cu13",
    "nixl-cu12",
    "torch",
    "numpy",
    "xxhash",
)
COLUMNS = {
    "case": "case",
    "method": "method",
    "gb_per_s": "GB/s",
    "ms": "ms",
    "claim_ms": "with claim ms",
    "cpu_ms": "CPU ms",
    "of_limit": "of the copy",
    "of_nixl": "x NIXL",
    "note": "",
}


@dataclass
class Plan:
    """What is run."""

    device: str
    cases: list[Case]
    methods: list[str]
    rounds: int
    idle_s: float
    nixl_site: str | None
    deadline: float


@dataclass
class Measured:
    """One case and method."""

    seconds: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})  # by: claimed ahead
    cpu_s: list[float] = field(default_factory=list)
    link: str = ""
    note: str = ""

    def row(self, case: Case, method: str) -> Row:
        row: Row = {"case": case.name, "method": method, "kv_mib": case.kv_bytes / MIB, "note": self.note or self.link}
        if self.seconds[True]:
            row["ms"] = 1e3 * statistics.median(self.seconds[True])
            row["ms_min"] = 1e3 * min(self.seconds[True])
            if not case.layer_ms:
                row["gb_per_s"] = case.kv_bytes / statistics.median(self.seconds[True]) / 1e9
            row["cpu_ms"] = 1e3 * statistics.median(self.cpu_s)
        if self.seconds[False]:
            row["claim_ms"] = 1e3 * statistics.median(self.seconds[False])
        return row


class Runner:
    """Runs a plan; a method that fails costs its own row and a new pair of processes."""

    def __init__(self, plan: Plan, progress: Progress, show: Callable[[list[Row]], None]) -> None:
        self._plan, self._progress, self._show = plan, progress, show
        interpret = {"TRITON_INTERPRET": "1"} if plan.device == "interpreted" else {}
        self._environment = {**os.environ, **interpret}
        self._pair: Pair | None = None
        self._opened: set[str] = set()
        self._unopened: dict[str, int] = {}  # method -> cases that it could not be opened for

    async def run(self) -> list[Row]:
        rows: list[Row] = []
        try:
            for case in self._plan.cases:
                if time.monotonic() > self._plan.deadline:
                    rows.append({"case": case.name, "method": "", "note": "skipped: no time left"})
                    continue
                found = await self._case(case)
                rows += found
                self._show(found)
            rows += (idle := await self._idle())
            self._show(idle)
        finally:
            if self._pair:
                await self._pair.stop()
        return rows

    async def _case(self, case: Case) -> list[Row]:
        methods = case_methods(case, self._plan)
        measured = {method: Measured() for method in methods}
        rounds = min(self._plan.rounds, 5) if case.kv_bytes > 256 * MIB else self._plan.rounds
        for number in range(rounds + 1):
            for method, one in measured.items():
                self._progress.step(f"{case.name} {method}")
                is_hopeless = self._unopened.get(method, 0) >= UNOPENED_MAX
                if one.note or is_hopeless or time.monotonic() > self._plan.deadline:
                    one.note = one.note or ("failed before" if is_hopeless else "no time left")
                    continue
                try:
                    await self._turn(case, method, one, is_first=not number)
                except MethodFailed as error:
                    one.note = f"failed: {error}"
                    self._tell_failure(case, method, error)
                    if method not in self._opened:
                        self._unopened[method] = self._unopened.get(method, 0) + 1
                    await self._drop_pair()
        return compared([one.row(case, method) for method, one in measured.items()])

    async def _turn(self, case: Case, method: str, one: Measured, *, is_first: bool) -> None:
        """One transfer ahead of which everything was said, and one with the claim in it."""
        pair = await self._ready(case, method)
        is_alone = method in ALONE
        if is_first:  # Connects, compiles, touches what is not touched yet.
            await pair.spoil()
            await pair.once(method, ahead=True, is_alone=is_alone)
            if wrong := await pair.wrong_blocks():
                raise MethodFailed(f"{wrong} blocks are wrong")
            return
        for ahead in (True,) if method in WITHOUT_CLAIM or case.layer_ms else (True, False):
            transfer = await pair.once(method, ahead=ahead, is_alone=is_alone)
            one.seconds[ahead].append(transfer.seconds)
            one.link = transfer.link
            if ahead:
                one.cpu_s.append(transfer.cpu_s)

    async def _ready(self, case: Case, method: str) -> Pair:
        """The pair with this case and method open."""
        if self._pair is None:
            plan = self._plan
            setup = Setup("prefill", plan.device, max(case.kv_bytes for case in plan.cases), plan.nixl_site)
            self._pair = Pair(setup, __file__, self._environment)
            self._opened = set()
            await self._pair.start()
        if case.name not in self._opened:
            await self._pair.both("case", case=case)
            self._opened = {case.name}
        if method not in self._opened:
            await self._pair.open(method, is_alone=method in ALONE)
            self._opened.add(method)
        return self._pair

    def _tell_failure(self, case: Case, method: str, error: MethodFailed) -> None:
        self._progress.end()
        tails = self._pair.log_tails() if self._pair else ""
        print(f"{case.name}, {method}: {error}\n{tails}", file=sys.stderr, flush=True)

    async def _drop_pair(self) -> None:
        if self._pair:
            await self._pair.stop(grace_s=1.0)
        self._pair = None

    async def _idle(self) -> list[Row]:
        """CPU of both processes while they are connected and nothing comes, each method in a pair of its own."""
        rows: list[Row] = []
        case = contiguous(1)
        for method in self._plan.methods:
            is_over = time.monotonic() > self._plan.deadline
            if method in (*ALONE, "sockets", *self._unopened) or not self._plan.idle_s or is_over:
                continue
            self._progress.step(f"idle {method}")
            try:
                await self._drop_pair()
                pair = await self._ready(case, method)
                await pair.once(method, ahead=True, is_alone=False)
                await asyncio.sleep(0.5)
                seconds = self._plan.idle_s
                spent_s = sum(answer.cpu_s for answer in await pair.both("idle", method=method, seconds=seconds))
                rows.append({"case": "connected and idle", "method": method, "cpu_percent": 100 * spent_s / seconds})
            except MethodFailed as error:
                rows.append({"case": "connected and idle", "method": method, "note": f"failed: {error}"})
        return rows


def case_methods(case: Case, plan: Plan) -> list[str]:
    """NIXL first: ours sets UCX's variables in its process when it starts."""
    return [method for method in plan.methods if method in SCHEMES] if case.layer_ms else plan.methods


def compared(rows: list[Row]) -> list[Row]:
    """With each row's speed in terms of the copy and of NIXL."""
    speeds = {row["method"]: row.get("gb_per_s") for row in rows}
    for row in rows:
        speed = row.get("gb_per_s")
        for column, bases in {"of_limit": ALONE, "of_nixl": ("nixl",)}.items():
            base = next((speeds[name] for name in bases if speeds.get(name)), None)
            if isinstance(speed, float) and isinstance(base, float) and row["method"] not in bases:
                row[column] = f"{100 * speed / base:.0f} %" if column == "of_limit" else round(speed / base, 2)
    return rows


def host_methods(nixl_site: str | None) -> list[str]:
    """What runs here, NIXL first."""
    installed = {point.name for point in entry_points(group="hocket.transports")}
    schemes = [scheme for scheme in SCHEMES if scheme in installed and scheme != "cuda_ipc"]
    if find_spec("ucxx") is None and "ucx" in schemes:
        schemes.remove("ucx")
        print("ucxx is not installed: left ucx out", file=sys.stderr)
    has_nixl = nixl_site or any(find_spec(name) for name in ("nixl_cu13", "nixl_cu12"))
    if not has_nixl:
        print("no NIXL here (--nixl-site): left it out", file=sys.stderr)
    return [*(["nixl"] if has_nixl else []), *schemes, "sockets", "memcpy"]


def make_plan(arguments: argparse.Namespace) -> Plan:
    quick, device = arguments.quick, arguments.device
    if device == "host":
        cases = [*map(contiguous, CONTIGUOUS_MIB), *map(scattered, SCATTERED_KIB), layer_by_layer(2.5)]
        methods = host_methods(arguments.nixl_site)
        if quick:
            cases = [contiguous(16), scattered(16)]
    else:
        limit = "peer copy" if device == "peers" else "one process"
        cases, methods = gpu_cases(device, quick=quick), ["nixl", "cuda_ipc", "ucx", limit]
    if arguments.methods:
        methods = [method for method in methods if method in arguments.methods.split(",")]
    if arguments.cases:
        cases = [case for case in cases if any(part in case.name for part in arguments.cases.split(","))]
    return Plan(
        device,
        cases,
        methods,
        rounds=arguments.rounds or (3 if quick else 7),
        idle_s=0.0 if arguments.no_idle else 2.0 if quick else IDLE_S,
        nixl_site=arguments.nixl_site,
        deadline=time.monotonic() + arguments.budget_s,
    )


def show(rows: list[Row]) -> None:
    """As they come: a run that is cut off has shown what it had."""
    for row in rows:
        cells = (
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
        )
        print("  ".join(cells), flush=True)


def run(plan: Plan, json_file: Path | None, *, shows_rows: bool) -> None:
    progress = Progress(
        sum((plan.rounds + 1) * len(case_methods(case, plan)) for case in plan.cases) + len(plan.methods)
    )
    kept: list[Row] = []

    def on_rows(rows: list[Row]) -> None:
        kept.extend(rows)
        write_json(json_file, kept)
        if shows_rows:
            progress.end()
            show(rows)

    rows = asyncio.run(Runner(plan, progress, on_rows).run())
    progress.end()
    load = os.getloadavg()[0]
    print(f"{machine()}, load {load:.1f} at the end\n{versions(*PACKAGES)}")
    print(f"medians of {plan.rounds} rounds (5 of 1 GiB), methods in turn; CPU of both processes, for one transfer")
    print_table("KV from process to process", COLUMNS, [row for row in rows if "cpu_percent" not in row])
    idle = [row for row in rows if "cpu_percent" in row]
    if idle:
        title = f"CPU while connected and idle for {plan.idle_s:.0f} s"
        print_table(title, {"method": "method", "cpu_percent": "% of a core, both processes"}, idle)
    write_json(json_file, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, a list of objects")
    parser.add_argument("--quick", action="store_true", help="two cases, three rounds: 20 s")
    parser.add_argument(
        "--device", choices=("host", "cuda", "peers", "interpreted"), default="host", help="where the KV lies"
    )
    parser.add_argument("--nixl-site", metavar="DIR", help="folder with nixl_cu12 or nixl_cu13 (default: installed)")
    parser.add_argument("--methods", metavar="NAMES", help="only these, with commas")
    parser.add_argument("--cases", metavar="PARTS", help="only cases whose name has one of these in it, with commas")
    parser.add_argument("--rounds", type=int, metavar="COUNT", help="instead of 7 (--quick: 3)")
    parser.add_argument("--budget-s", type=float, default=600.0, metavar="SECONDS", help="begin nothing after it (600)")
    parser.add_argument("--no-idle", action="store_true", help="leave the idle CPU out")
    parser.add_argument("--show-rows", action="store_true", help="print each case's rows when it is done")
    parser.add_argument("--role", metavar="SETUP", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        run_role(msgspec.json.decode(arguments.role, type=Setup))
        return
    plan = make_plan(arguments)
    if arguments.device == "cuda":
        with mps_daemon():
            run(plan, arguments.json, shows_rows=True)
    else:
        run(plan, arguments.json, shows_rows=arguments.show_rows or arguments.device == "peers")


if __name__ == "__main__":
    main()
