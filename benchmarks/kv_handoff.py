#!/usr/bin/env python3
"""How fast KV goes from one process to another: our hand-off over UCX and TCP, plain sockets, and a copy as the limit.

    python benchmarks/kv_handoff.py             about two minutes
    python benchmarks/kv_handoff.py --quick     about ten seconds
    python benchmarks/kv_handoff.py --json rows.json

The hand-off is the whole of it: claim, grant, every chunk and layer, both sides' digests, landed. The methods take turns inside
one run, so that a busy machine is busy for all of them; the table shows medians. `copy` moves the same bytes inside one
process. `sockets` are blocking threads with scatter-gather, no protocol and no digests: what TCP can do here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

import msgspec
import numpy as np

from hocket.transport import (
    Chunk,
    Expectation,
    HandoffEndpoint,
    HandoffKey,
    HostKvPool,
    KvLayout,
    ReceiveEnd,
    SendEnd,
    SendOrder,
    SendReleased,
    open_transports,
)

EPOCH = 1
MIB = 1 << 20
IOV_MAX = 512
CONTIGUOUS_MIB = (1, 4, 16, 64, 256)
SCATTERED_KIB = (16, 32, 64)
TIMEOUT_S = 60.0


class Case(msgspec.Struct, frozen=True):
    """What is moved: in each layer every block, whose places on the two sides have nothing to do with each other."""

    name: str
    layers: int
    blocks: int
    block_bytes: int

    @property
    def kv_bytes(self) -> int:
        return self.layers * self.blocks * self.block_bytes

    def layout(self) -> KvLayout:
        names = tuple(f"layer.{layer}" for layer in range(self.layers))
        return KvLayout("benchmark", "", "float16", "float16", 16, names, (self.block_bytes,) * self.layers, 8, 128)

    def pool(self) -> HostKvPool:
        """Touched memory: the first touch of a page costs more than all that is measured here."""
        rows = [np.ones((self.blocks, self.block_bytes), np.uint8) for _ in range(self.layers)]
        return HostKvPool(self.layout(), rows)

    def block_ids(self, seed: int) -> tuple[int, ...]:
        return tuple(np.random.default_rng(seed).permutation(self.blocks).tolist())


class Go(msgspec.Struct, frozen=True):
    """Decode to prefill process, a JSON line: send once."""

    method: str
    address: str
    token: str = ""


class Sent(msgspec.Struct, frozen=True):
    """The answer to a `Go`: CPU seconds that it took."""

    cpu_s: float


@dataclass
class Row:
    """One case and method."""

    case: str
    method: str
    kv_mib: float
    ms: float = 0.0
    gb_per_s: float = 0.0
    cpu_s: float = 0.0  # of both processes, for one transfer
    rounds: list[float] = field(default_factory=list)  # milliseconds


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# The prefill process.


async def prefill(case: Case) -> None:
    """Do what stdin says, a `Go` a line, until it ends."""
    pool, block_ids = case.pool(), case.block_ids(1)
    endpoints: dict[str, HandoffEndpoint] = {}
    loop = asyncio.get_running_loop()
    print("ready", flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        go = msgspec.json.decode(line, type=Go)
        before = cpu_s()
        if go.method == "sockets":
            await loop.run_in_executor(None, send_by_socket, pool, block_ids, go.address)
        else:
            if go.method not in endpoints:
                transports = open_transports(go.method)
                endpoint = HandoffEndpoint(pool, transports, worker_name="prefill", epoch=EPOCH, listens=False)
                await endpoint.start()
                endpoints[go.method] = endpoint
            await send_by_handoff(endpoints[go.method], case, block_ids, go)
        print(msgspec.json.encode(Sent(cpu_s() - before)).decode(), flush=True)
    for endpoint in endpoints.values():
        await endpoint.aclose()


async def send_by_handoff(endpoint: HandoffEndpoint, case: Case, block_ids: tuple[int, ...], go: Go) -> None:
    ended: asyncio.Future[SendEnd] = asyncio.get_running_loop().create_future()

    def on_event(event: SendReleased | SendEnd) -> None:
        if isinstance(event, SendEnd):
            ended.set_result(event)

    key = HandoffKey(bytes.fromhex(go.token), 1, 1)
    fingerprint = case.layout().fingerprint()
    endpoint.open(SendOrder(key, (go.address,), EPOCH, fingerprint, case.blocks, TIMEOUT_S), on_event)
    endpoint.announce(key, Chunk(0, block_ids, is_last=True))
    for layer in range(case.layers):
        endpoint.layer_ready(key, layer)
    end = await ended
    if not end.is_landed:
        raise SystemExit(f"hand-off failed: {end.reason}")


def send_by_socket(pool: HostKvPool, block_ids: tuple[int, ...], address: str) -> None:
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for layer in range(len(pool.layout.layer_names)):
            views = [buffer.data for buffer in pool.buffers(layer, block_ids)]
            while views:
                drop(views, connection.sendmsg(views[:IOV_MAX]))
        connection.recv(1)


def receive_by_socket(pool: HostKvPool, block_ids: tuple[int, ...], server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        for layer in range(len(pool.layout.layer_names)):
            views = [buffer.data for buffer in pool.buffers(layer, block_ids)]
            while views:
                drop(views, connection.recvmsg_into(views[:IOV_MAX])[0])
        connection.send(b"!")


def drop(views: list[memoryview], moved_bytes: int) -> None:
    """Take what was moved from the front."""
    done = 0
    while done < len(views) and moved_bytes >= views[done].nbytes:
        moved_bytes -= views[done].nbytes
        done += 1
    del views[:done]
    if moved_bytes:
        views[0] = views[0][moved_bytes:]


# The decode process.


def start_prefill(case: Case) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--prefill", msgspec.json.encode(case).decode()]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


class Decode:
    """One case: this process receives, a child sends."""

    def __init__(self, case: Case, methods: list[str]) -> None:
        self.case = case
        self.methods = methods
        self.pool, self.source = case.pool(), case.pool()  # the latter for `copy` alone
        self.block_ids = case.block_ids(2)
        self.endpoints: dict[str, HandoffEndpoint] = {}

    async def run(self, rounds: int, progress: Progress) -> list[Row]:
        child = start_prefill(self.case)
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdout.readline()
            rows = {name: Row(self.case.name, name, self.case.kv_bytes / MIB) for name in self.methods}
            for number in range(rounds + 1):
                for name, row in rows.items():
                    elapsed_ms, spent_s = await self.once(name, child.stdin, child.stdout)
                    if number:  # The first connects, and touches what is not touched yet.
                        row.rounds.append(elapsed_ms)
                        row.cpu_s += spent_s / rounds
                    progress.step(f"{self.case.name} {name}")
            for row in rows.values():
                row.ms = statistics.median(row.rounds)
                row.gb_per_s = self.case.kv_bytes / row.ms / 1e6
            return list(rows.values())
        finally:
            child.stdin.close()
            child.wait(10)
            for endpoint in self.endpoints.values():
                await endpoint.aclose()

    async def once(self, name: str, go: IO[str], answers: IO[str]) -> tuple[float, float]:
        """Milliseconds and CPU seconds of one transfer."""
        if name == "copy":
            return self.copy()
        loop = asyncio.get_running_loop()
        token = os.urandom(16)
        landed: asyncio.Future[ReceiveEnd] = loop.create_future()
        with socket.create_server(("127.0.0.1", 0)) as server:
            if name == "sockets":
                address = f"127.0.0.1:{server.getsockname()[1]}"
                received = loop.run_in_executor(None, receive_by_socket, self.pool, self.block_ids, server)
            else:
                endpoint = await self.endpoint(name)
                (address,) = endpoint.addresses
                endpoint.expect(Expectation(token, 1, 0, self.block_ids, TIMEOUT_S), landed.set_result)
            before, started = cpu_s(), time.perf_counter()
            go.write(msgspec.json.encode(Go(name, address, token.hex())).decode() + "\n")
            go.flush()
            if name == "sockets":
                await received
            elif not (end := await landed).is_landed:
                raise SystemExit(f"hand-off failed: {end.reason}")
            elapsed_ms = 1e3 * (time.perf_counter() - started)
            spent_s = cpu_s() - before
        answer = await loop.run_in_executor(None, answers.readline)
        return elapsed_ms, spent_s + msgspec.json.decode(answer, type=Sent).cpu_s

    async def endpoint(self, name: str) -> HandoffEndpoint:
        if name not in self.endpoints:
            endpoint = HandoffEndpoint(self.pool, open_transports(name), worker_name="decode", epoch=EPOCH)
            await endpoint.start()
            self.endpoints[name] = endpoint
        return self.endpoints[name]

    def copy(self) -> tuple[float, float]:
        source_ids = self.case.block_ids(1)
        before, started = cpu_s(), time.perf_counter()
        for layer in range(self.case.layers):
            for to, origin in zip(self.block_ids, source_ids, strict=True):
                target = self.pool.buffers(layer, [to])[0]
                target[:] = self.source.buffers(layer, [origin])[0]
        return 1e3 * (time.perf_counter() - started), cpu_s() - before


async def idle_percent(scheme: str, seconds: float) -> float:
    """CPU of a process whose endpoint is connected and waits for a claim that does not come."""
    case = Case("idle", 1, 4, 4096)
    ends = [
        HandoffEndpoint(case.pool(), open_transports(scheme), worker_name=name, epoch=EPOCH, listens=name == "d")
        for name in ("d", "p")
    ]
    for end in ends:
        await end.start()
    key = HandoffKey(os.urandom(16), 1, 1)
    landed = asyncio.get_running_loop().create_future()
    ends[0].expect(Expectation(key.token, 1, 0, (0, 1, 2, 3), TIMEOUT_S), landed.set_result)
    order = SendOrder(key, ends[0].addresses, EPOCH, case.layout().fingerprint(), 4, TIMEOUT_S)
    ends[1].open(order, lambda _: None)
    ends[1].announce(key, Chunk(0, (0, 1, 2, 3), is_last=True))
    ends[1].layer_ready(key, 0)
    await landed
    await asyncio.sleep(0.3)
    before = cpu_s()
    await asyncio.sleep(seconds)
    percent = 100 * (cpu_s() - before) / seconds
    for end in reversed(ends):
        await end.aclose()
    return percent


class Progress:
    """A bar on stderr."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.done = 0

    def step(self, what: str) -> None:
        self.done += 1
        bar = "#" * (40 * self.done // self.steps)
        end = "\n" if self.done == self.steps else ""
        print(f"\r[{bar:<40}] {self.done}/{self.steps} {what:<32}", end=end, file=sys.stderr, flush=True)


def versions() -> str:
    found = []
    for name in ("ucxx-cu13", "ucxx-cu12", "libucx-cu13", "libucx-cu12", "numpy", "xxhash"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return f"Python {platform.python_version()}, {', '.join(found)}"


def machine() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}"


def cases(is_quick: bool) -> list[Case]:
    contiguous = [Case(f"{mib} MiB in one run", 1, 1, mib * MIB) for mib in CONTIGUOUS_MIB]
    scattered = [Case(f"32 x 2 x 64 blocks of {kib} KiB", 64, 64, kib << 10) for kib in SCATTERED_KIB]
    return [contiguous[2], scattered[0]] if is_quick else contiguous + scattered


def methods() -> list[str]:
    try:
        version("ucxx-cu13")
    except PackageNotFoundError:
        try:
            version("ucxx-cu12")
        except PackageNotFoundError:
            print("ucxx is not installed: left ucx out", file=sys.stderr)
            return ["tcp", "sockets", "copy"]
    return ["ucx", "tcp", "sockets", "copy"]


async def decode(is_quick: bool) -> list[dict[str, object]]:
    rounds, names, wanted = (3 if is_quick else 9), methods(), cases(is_quick)
    progress = Progress(len(wanted) * (rounds + 1) * len(names) + len(names) - 2)
    rows: list[Row] = []
    for case in wanted:
        rows += await Decode(case, names).run(rounds, progress)
    idle = {}
    for name in names[:-2]:
        idle[name] = await idle_percent(name, 2.0 if is_quick else 10.0)
        progress.step(f"idle {name}")
    print(f"{machine()}\n{versions()}\nmedian of {rounds} rounds, methods in turn\n")
    print(f"{'case':<30} {'method':<8} {'KV MiB':>8} {'ms':>9} {'GB/s':>7} {'CPU s':>8}")
    for row in rows:
        print(f"{row.case:<30} {row.method:<8} {row.kv_mib:8.0f} {row.ms:9.2f} {row.gb_per_s:7.2f} {row.cpu_s:8.3f}")
    for name, percent in idle.items():
        print(f"{'connected and idle':<30} {name:<8} {percent:.2f} % of a core (both ends in one process)")
    found: list[dict[str, object]] = [asdict(row) for row in rows]
    return found + [{"case": "idle", "method": name, "cpu_percent": percent} for name, percent in idle.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows there, a list of objects")
    parser.add_argument("--quick", action="store_true", help="two cases, three rounds")
    parser.add_argument("--prefill", metavar="CASE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prefill:
        asyncio.run(prefill(msgspec.json.decode(arguments.prefill, type=Case)))
    else:
        rows = asyncio.run(decode(arguments.quick))
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
