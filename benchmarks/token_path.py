"""What the control plane costs: CPU of router, nats-server and workers per token and per request, and the latency they add.

    python benchmarks/token_path.py [--quick] [--json FILE]

Everything is real but the model: processes, NATS with its durable work queue, HTTP, chat template, tokenizer, policy, KV
hand-off over TCP, detokenizing. The engine is the verifying simulator at 0 or 20 ms a step, so nothing but our own code
takes CPU, and answers are compared with what the simulator must say. `docs/benchmarks.md` explains the columns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
from frame_source import answer_tokens
from load_client import Load, Window, messages
from local_pool import REST_CORE, SERVED_NAME, Pool, pin, running_pool, sim_worker
from measure import Cell, Progress, Row, machine, median_row, print_table, rss_mib, versions, write_json

from hocket.bus import subjects
from hocket.bus.ids import RouterId
from hocket.bus.messages import SamplingParams
from hocket.bus.server import EmbeddedServer
from hocket.cluster.model import resolve_model
from hocket.router.text.model_text import ModelText
from hocket.workers.engines.sim.kv import expected_tokens
from hocket.workers.engines.sim.vocabulary import sim_vocabulary

ITL_MS = 20.0
SIM_LAYERS = 1  # one KV message for a prompt: kv_handoff.py measures the data plane
TEMPLATE_TOKENS = 15  # what the chat template adds to a prompt's words (load_client.messages)
KV_BLOCKS = 40_000  # more than every load here holds
SLOTS = {"decode": 1024, "prefill": 32}  # each prefill slot is an open pull at the server
FRAME_TOKENS_PER_S = 300_000  # more than the router delivers one by one: it must fall behind and merge tokens
_HERE = Path(__file__).parent
_CLIENT = _HERE / "load_client.py"
_CLIENT_TIMEOUT_S = 150.0
_ROLES = ("router", "nats", "prefill", "decode", "client")


def _sims(itl_ms: float) -> dict[str, list[str]]:
    """Simulated workers that take `itl_ms` for a step and no time for a prompt."""
    speed = {"sim-itl-ms": itl_ms, "sim-prefill-ms-per-token": 0, "sim-layers": SIM_LAYERS, "kv-blocks": KV_BLOCKS}
    return {role: sim_worker(role, {**speed, "slots": slots}) for role, slots in SLOTS.items()}


POOLS = {
    "paced": _sims(ITL_MS),
    "fast": _sims(0.0),
    "frames": {"decode": [str(_HERE / "frame_source.py"), str(FRAME_TOKENS_PER_S), str(KV_BLOCKS)]},
}
"""The workers of each pool; a pool is named in a case."""


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One row: a kind of load, and the bars it is held against."""

    table: str  # "paced" | "saturated" | "requests" | "memory"
    pool: str
    connections: int
    isl: int
    max_tokens: int
    warm_s: float = 0.5
    window_s: float = 2.5
    tap_s: float = 0.0
    stagger_s: float = 0.0
    bars: dict[str, str] = {}  # column -> what it should be

    @property
    def name(self) -> str:
        return f"{self.table} {self.connections} ISL {self.isl} {self.pool}"


def cases(window_s: float) -> list[Case]:
    """Every row of the tables, in their order."""
    return [
        *(_paced(streams, window_s, bars) for streams, bars in ((64, {"router_us": "<= 30"}), (256, {}))),
        _saturated(64, 4000, "fast", window_s),
        _saturated(256, 2000, "fast", window_s),
        _saturated(64, 8000, "frames", window_s),
        _saturated(256, 4000, "frames", window_s, {"router_us": "<= 4"}),
        _requests(1, 32, window_s, {}),
        _requests(16, 32, window_s, {"router_ms": "<= 1.0", "per_s": ">= 500"}),
        _requests(64, 32, window_s, {"router_ms": "<= 1.0"}),
        _requests(1, 1024, window_s, {}),
        _requests(16, 1024, window_s, {"router_ms": "<= 1.8"}),
        _requests(64, 1024, window_s, {"router_ms": "<= 1.8"}),
    ]


def _paced(streams: int, window_s: float, bars: dict[str, str]) -> Case:
    stagger_s, warm_s, tap_s = 0.01, 0.5, 1.0  # 100 starts a second: well below what the machine can start
    tokens = (streams * stagger_s + warm_s + window_s + tap_s + 1.0) * 1000 / ITL_MS
    return Case(
        table="paced", pool="paced", connections=streams, isl=32, max_tokens=int(tokens), warm_s=warm_s, window_s=window_s,
        tap_s=tap_s, stagger_s=stagger_s, bars=bars,
    )  # fmt: skip


def _saturated(streams: int, tokens: int, pool: str, window_s: float, bars: dict[str, str] | None = None) -> Case:
    return Case(
        table="saturated", pool=pool, connections=streams, isl=32, max_tokens=tokens, window_s=window_s, bars=bars or {}
    )


def _requests(connections: int, isl: int, window_s: float, bars: dict[str, str]) -> Case:
    return Case(
        table="requests", pool="fast", connections=connections, isl=isl, max_tokens=8, window_s=window_s, bars=bars
    )


class Bench:
    """Runs cases, each against its pool."""

    def __init__(self, server: EmbeddedServer, pools: dict[str, Pool], model: Path) -> None:
        self._server = server
        self._pools = pools
        self._text = ModelText.load(model)
        self._vocabulary = sim_vocabulary(str(model), 0)
        self._next_prompt = 1
        self.answers_checked = 0

    async def measure(self, case: Case) -> Row:
        """One window of one case. Raises RuntimeError when an answer is wrong or a request failed."""
        pool = self._pools[case.pool]
        load = Load(
            kind="requests" if case.table == "requests" else "streams",
            port=pool.port,
            model=SERVED_NAME,
            connections=case.connections,
            prompt_words=case.isl - TEMPLATE_TOKENS,
            first_prompt=self._next_prompt,
            max_tokens=case.max_tokens,
            pids={**pool.pids, "nats": self._server.pid},
            warm_s=case.warm_s,
            window_s=case.window_s,
            stagger_s=case.stagger_s,
            tap_url=self._server.url if case.tap_s else "",
            tap_subject=subjects.tokens(RouterId("any")).replace("any", "*"),
            tap_s=case.tap_s,
        )
        self._next_prompt += 100_000
        window = await asyncio.to_thread(_run_client, load)
        await self._check(load, case, window.answers)
        return row_of(case, window)

    async def _check(self, load: Load, case: Case, answers: dict[int, str]) -> None:
        for number, text in answers.items():
            prompt = self._text.render_chat(messages(number, load.prompt_words))
            (token_ids,) = await self._text.encode([prompt], add_special_tokens=False)
            if len(token_ids) != case.isl:
                raise RuntimeError(f"prompt {number} has {len(token_ids)} tokens, not {case.isl}")
            if case.pool == "frames":
                made = answer_tokens(token_ids, load.max_tokens)
            else:
                sampling = SamplingParams(max_tokens=load.max_tokens, temperature=0.0)
                made = expected_tokens(token_ids, sampling, planes=SIM_LAYERS, vocabulary=self._vocabulary)
            # A character that the last token leaves unfinished is shown by one side and not by the other.
            if text.rstrip("\ufffd") != (wanted := self._text.decode(made)).rstrip("\ufffd"):
                raise RuntimeError(f"{case.name}: wrong answer to prompt {number}: {text[:80]!r}, not {wanted[:80]!r}")
            self.answers_checked += 1

    async def memory(self, streams: int) -> Row:
        """The router's resident memory before and after this many streams at once."""
        before_mib = rss_mib(self._pools["fast"].pids["router"])
        await self.measure(
            Case(table="memory", pool="fast", connections=streams, isl=32, max_tokens=200, warm_s=0.0, window_s=0.05)
        )
        return {
            "table": "memory",
            "streams": streams,
            "before_mib": before_mib,
            "after_mib": rss_mib(self._pools["fast"].pids["router"]),
        }


def _run_client(load: Load) -> Window:
    done = subprocess.run(
        [sys.executable, str(_CLIENT)], input=msgspec.json.encode(load), capture_output=True, timeout=_CLIENT_TIMEOUT_S
    )
    if done.returncode:
        raise RuntimeError(f"the load client failed: {done.stderr.decode()[-1000:]}")
    return msgspec.json.decode(done.stdout, type=Window)


def row_of(case: Case, window: Window) -> Row:
    """A window in the units of the tables: us per token for streams, ms per request for short requests."""
    row: Row = {
        "table": case.table,
        "pool": case.pool,
        "connections": case.connections,
        "isl": case.isl,
        "osl": case.max_tokens,
    }
    row["window_s"] = window.window_s
    if case.table == "requests":
        row["per_s"] = window.requests / window.window_s
        row.update({f"{role}_ms": _per(window.cpu_s.get(role), window.requests, 1e3) for role in _ROLES})
    else:
        row["per_s"] = window.tokens / window.window_s
        row.update({f"{role}_us": _per(window.cpu_s.get(role), window.tokens, 1e6) for role in _ROLES})
        row["tokens_per_event"] = window.tokens / max(window.events, 1)
    if case.pool != "frames":  # which holds the first token until every stream is there
        row.update({f"ttft_{rank}_ms": value for rank, value in window.ttft_ms.items()})
    for name, spread in (("gap", window.gap_ms), ("read", window.tap_to_read_ms)):
        row.update({f"{name}_{rank}_ms": value for rank, value in spread.items()})
    return row


def _per(cpu_s: float | None, count: float, scale: float) -> float | None:
    return None if cpu_s is None or not count else cpu_s / count * scale


STREAM_COLUMNS = {
    "pool": "tokens from",
    "connections": "streams",
    "per_s": "tokens/s",
    "router_us": "router us/token",
    "nats_us": "nats us/token",
    "prefill_us": "prefill us/token",
    "decode_us": "decode us/token",
    "client_us": "client us/token",
    "tokens_per_event": "tokens/event",
    "ttft_p50_ms": "TTFT p50 ms",
    "ttft_p99_ms": "p99 ms",
}
PACED_COLUMNS = {
    **STREAM_COLUMNS,
    "gap_p50_ms": "gap p50 ms",
    "gap_p99_ms": "p99 ms",
    "read_p50_ms": "bus->client p50 ms",
    "read_p99_ms": "p99 ms",
    "bars": "bars",
}
REQUEST_COLUMNS = {
    "isl": "ISL",
    "connections": "conns",
    "per_s": "requests/s",
    "router_ms": "router ms/req",
    "nats_ms": "nats ms/req",
    "prefill_ms": "prefill ms/req",
    "decode_ms": "decode ms/req",
    "client_ms": "client ms/req",
    "ttft_p50_ms": "TTFT p50 ms",
    "ttft_p99_ms": "p99 ms",
    "bars": "bars",
}
TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "paced": (f"Streams at {ITL_MS:.0f} ms a token (the engine's own TTFT: {2.5 * ITL_MS:.0f} ms, 2.5 steps)", PACED_COLUMNS),
    "saturated": ("Streams as fast as possible", {**STREAM_COLUMNS, "bars": "bars"}),
    "requests": (
        "Requests of 8 tokens, nothing cached, remote prefill, engine at 0 ms: the whole TTFT is ours",
        REQUEST_COLUMNS,
    ),
    "memory": ("Resident memory of the router", {"streams": "streams", "before_mib": "before MiB", "after_mib": "after MiB"}),
}  # fmt: skip


def bars_of(case: Case, row: Row) -> str:
    """The bars beside the figures: which column should be what, and whether it is."""
    shown = []
    for column, bar in case.bars.items():
        value, (sign, limit) = row.get(column), bar.split()
        is_met = isinstance(value, float) and (value <= float(limit) if sign == "<=" else value >= float(limit))
        shown.append(f"{column.replace('_', ' ')} {bar}: {'met' if is_met else 'MISSED'}")
    return ", ".join(shown)


async def measure_all(bench: Bench, todo: list[Case], rounds: int, *, with_memory: bool) -> list[Row]:
    """Every case once a round, so that a disturbance of the machine falls on all of them alike; medians."""
    windows: dict[str, list[Row]] = {case.name: [] for case in todo}
    progress = Progress(rounds * len(todo) + 1)
    progress.step("memory")
    memory = [await bench.memory(512)] if with_memory else []
    for round_index in range(rounds):
        for case in todo:
            progress.step(f"{round_index + 1}/{rounds} {case.name}")
            windows[case.name].append(await bench.measure(case))
    progress.end()
    rows = []
    for case in todo:
        row = median_row(windows[case.name])
        rows.append(row | {"bars": bars_of(case, row), "windows": len(windows[case.name])})
    return [*rows, *memory]


async def run(arguments: argparse.Namespace) -> None:
    """Start everything, measure, print."""
    pin(os.getpid(), REST_CORE)  # What is started from here inherits it; the router is moved to its own core.
    model = resolve_model("demo")
    todo = [case for case in cases(1.0 if arguments.quick else 2.0) if arguments.only in case.name]
    with tempfile.TemporaryDirectory(prefix="hocket-bench-") as folder:
        async with EmbeddedServer(Path(folder) / "nats") as server:

            def pool(name: str, workers: dict[str, list[str]]) -> AbstractContextManager[Pool]:
                is_profiled = arguments.profile is not None and name == arguments.profile[0]
                return running_pool(
                    name, server.url, model, Path(folder), workers=workers,
                    router={"local-prefill-tokens-max": 0, "policy": "kv"},
                    profile=(arguments.profile[1], Path(arguments.profile[2])) if is_profiled else None,
                )  # fmt: skip

            with contextlib.ExitStack() as stack:
                pools = {name: stack.enter_context(pool(name, workers)) for name, workers in POOLS.items()}
                bench = Bench(server, pools, model)
                rows = await measure_all(
                    bench, todo, 1 if arguments.quick else 3, with_memory=arguments.only in "memory"
                )
    about: dict[str, Cell] = {
        "machine": machine(),
        "versions": versions("hocket", "nats-py", "uvicorn", "uvloop", "starlette"),
    }
    report(rows, about, bench.answers_checked)
    write_json(arguments.json, [row | about for row in rows])


def report(rows: list[Row], about: Row, answers_checked: int) -> None:
    """The tables on stdout."""
    print(f"{about['machine']}; {about['versions']}; {answers_checked} answers compared, all right")
    for name, (title, columns) in TABLES.items():
        if found := [row for row in rows if row["table"] == name]:
            print_table(title, columns, found)


def main(argv: Iterable[str] | None = None) -> int:
    """Usage: python benchmarks/token_path.py"""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, one object each")
    parser.add_argument("--quick", action="store_true", help="one window of 1 s for each row instead of three of 2 s")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only rows whose name contains this, like 'paced 64'"
    )
    profile = (
        "run a process (router, prefill, decode) of a pool (paced, fast, frames) under cProfile, which writes to FILE"
    )
    parser.add_argument("--profile", nargs=3, metavar=("POOL", "ROLE", "FILE"), help=profile)
    asyncio.run(run(parser.parse_args(None if argv is None else list(argv))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
