#!/usr/bin/env python3
"""One prefill and one decode engine of real vLLM on one GPU or two: is every token right, and what does the hand-off cost.

    python benchmarks/gpu_pair.py --shape llama-8b [--json FILE]       dummy weights
    python benchmarks/gpu_pair.py --model FOLDER [--isl 64,1000]

The engines are those of the workers (`VllmEngine`, CUDA graphs on), each in a process of its own; on one GPU they share it
through an MPS daemon that is started for the run. The same prompts are answered by the decode engine alone (aggregated) and
with the prefill engine's KV; `--verify` has the KV digested once more from the blocks that it landed in.
`exposed` is from the prefill engine's own token to the landing of its KV: below 0 the KV was there first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
from measure import Row, machine, print_table, versions, write_json

from hocket.bus.messages import SamplingParams
from hocket.transport.base import HandoffKey
from hocket.workers.config import WorkerConfig
from hocket.workers.engines.base import DecodeTask, EngineInfo, PrefillTask, StepOutput
from hocket.workers.engines.vllm.engine import VllmEngine

START_S = 420.0
TASK_S = 60.0
EPOCHS = {"prefill": 11, "decode": 22}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, object]] = {
    "llama-8b": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 16384,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
    },
    "ministral-small": {  # Two windows and a full layer in turn: three KV groups.
        "architectures": ["MistralForCausalLM"],
        "model_type": "ministral",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32000,
        "max_position_embeddings": 8192,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 4,
        "torch_dtype": "bfloat16",
    },
}
COLUMNS = {
    "isl": "ISL",
    "equal": "equal answers",
    "max_logprob_diff": "logprob diff",
    "landed": "landed",
    "remote_ttft_ms": "TTFT remote ms",
    "local_ttft_ms": "TTFT aggregated ms",
    "exposed_ms": "exposed ms",
    "itl_ms": "ITL ms",
    "kv_mb": "KV MB",
}


class Ask(msgspec.Struct, tag=True):
    """To an engine's process: answer one prompt."""

    number: int
    seed: int
    isl: int
    osl: int
    token: bytes | None = None
    decode: EngineInfo | None = None  # where the prefill engine sends to
    logprobs: int | None = None


class Said(msgspec.Struct):
    """From an engine's process. Times are of the machine's monotonic clock."""

    number: int
    info: EngineInfo | None = None
    error: str = ""
    started_s: float = 0.0
    ended_s: float = 0.0
    step_s: list[float] = []
    tokens: list[int] = []
    logprobs: list[float] = []
    computed_tokens: int | None = None
    kv_bytes: int = 0
    kv_blocks_free: int = 0
    received: dict[str, int] = {}


def prompt_of(seed: int, isl: int, vocabulary: int) -> list[int]:
    source = random.Random(f"{seed} {isl}")
    return [source.randrange(vocabulary // 10, vocabulary) for _ in range(isl)]


def facts_of(folder: Path) -> tuple[int, bool]:
    """(vocabulary, whether the weights are made up)."""
    vocabulary = int(json.loads((folder / "config.json").read_text())["vocab_size"])
    return vocabulary, not list(folder.glob("*.safetensors"))


# ---- an engine's process


async def run_engine(options: argparse.Namespace) -> None:
    role, (vocabulary, is_dummy) = options.role, facts_of(Path(options.model))
    extra: dict[str, object] = {"skip_tokenizer_init": True, "gpu_memory_utilization": options.share}
    if is_dummy:
        extra["load_format"] = "dummy"
    config = WorkerConfig(
        role=role,
        model=options.model,
        transports=options.transports,
        block_tokens=16,
        slots=32,
        kv_gib=options.kv_gib,
        max_model_len=options.max_model_len,
        chunk_tokens=options.chunk_tokens,
        verify_kv=options.verify,
        engine_args=extra,
    )
    engine = VllmEngine(config, worker_id=role, epoch=EPOCHS[role])
    out = sys.stdout.buffer
    decoder = msgspec.json.Decoder(Ask)

    def say(said: Said) -> None:
        out.write(msgspec.json.encode(said) + b"\n")
        out.flush()

    async def answer(ask: Ask) -> None:
        said = Said(ask.number)
        try:
            await answer_to(engine, ask, prompt_of(ask.seed, ask.isl, vocabulary), said)
        except Exception as error:  # The process's edge: the parent decides.
            said.error = f"{type(error).__name__}: {error}"
        said.ended_s = time.monotonic()
        said.kv_blocks_free, said.received = engine.load().kv_blocks_free, engine.received
        say(said)

    try:
        say(Said(0, info=await engine.start()))
        reader = asyncio.StreamReader(limit=1 << 26)
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        async with asyncio.TaskGroup() as tasks:
            while line := await reader.readline():
                tasks.create_task(answer(decoder.decode(line)))
    finally:
        await engine.aclose()


async def answer_to(engine: VllmEngine, ask: Ask, prompt: list[int], said: Said) -> None:
    if not ask.osl:  # A pause between measurements: forget every prefix.
        while not await engine.clear_prefix_cache():  # noqa: ASYNC110  # vLLM says no word when blocks come free.
            await asyncio.sleep(0.02)
        return
    said.started_s = time.monotonic()
    if ask.decode:
        key = HandoffKey(ask.token or b"", 1, 1)
        to = (ask.decode.handoff_addresses, EPOCHS["decode"], ask.decode.fingerprint)
        task = PrefillTask(str(ask.number), key, prompt, *to, TASK_S, decode_block_tokens=ask.decode.block_tokens)
        outcome = await engine.prefill(task)
        said.kv_bytes, said.computed_tokens = outcome.kv_bytes, outcome.computed_tokens
        return
    sampling = SamplingParams(max_tokens=ask.osl, temperature=0.0, ignore_eos=True, logprobs=ask.logprobs)

    def on_step(step: StepOutput) -> None:
        said.step_s.append(time.monotonic())
        said.tokens.extend(step.token_ids)
        said.logprobs.extend(entry.logprob for entry in step.logprobs)
        if step.computed_tokens is not None:
            said.computed_tokens = step.computed_tokens

    await engine.decode(DecodeTask(str(ask.number), 1, prompt, sampling, ask.token, TASK_S), on_step)


# ---- the parent


class Engine:
    """One engine's process, from its parent."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._waiting: dict[int, asyncio.Future[Said]] = {0: asyncio.get_running_loop().create_future()}
        self._number = 0
        self._reader = asyncio.get_running_loop().create_task(self._read())

    async def _read(self) -> None:
        assert self._process.stdout
        decoder = msgspec.json.Decoder(Said)
        while line := await self._process.stdout.readline():
            if line.startswith(b"{"):  # vLLM prints to stdout, too.
                said = decoder.decode(line)
                self._waiting.pop(said.number).set_result(said)
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(RuntimeError("the engine's process ended"))

    async def started(self) -> EngineInfo:
        async with asyncio.timeout(START_S):
            info = (await self._waiting[0]).info
        assert info
        return info

    async def ask(self, **fields: object) -> Said:
        self._number += 1
        ask = Ask(self._number, **fields)  # type: ignore[arg-type]  # written out by the callers below
        future = self._waiting[self._number] = asyncio.get_running_loop().create_future()
        assert self._process.stdin
        self._process.stdin.write(msgspec.json.encode(ask) + b"\n")
        async with asyncio.timeout(TASK_S + 20):
            said = await future
        if said.error:
            raise RuntimeError(said.error)
        return said

    async def aclose(self) -> None:
        if self._process.returncode is None:
            assert self._process.stdin
            self._process.stdin.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(20):
                    await self._process.wait()
        if self._process.returncode is None:
            self._process.kill()
        self._reader.cancel()


class Pair:
    def __init__(self, prefill: Engine, decode: Engine, info: EngineInfo, osl: int) -> None:
        self.prefill, self.decode, self.info, self.osl = prefill, decode, info, osl
        self._seed = 0

    async def clear(self) -> None:
        for engine in (self.prefill, self.decode):
            await engine.ask(seed=0, isl=1, osl=0)

    async def hand_off(self, seed: int, isl: int, logprobs: int | None = None) -> tuple[Said, Said]:
        token = os.urandom(16)
        async with asyncio.TaskGroup() as tasks:
            decode = tasks.create_task(
                self.decode.ask(seed=seed, isl=isl, osl=self.osl, token=token, logprobs=logprobs)
            )
            prefill = tasks.create_task(self.prefill.ask(seed=seed, isl=isl, osl=1, token=token, decode=self.info))
        return prefill.result(), decode.result()

    async def case(self, isl: int, tries: int) -> Row:
        """Each prompt aggregated, then handed off; both caches are empty each time."""
        remote, local, exposed, itl, equal, diff, kv_bytes = [], [], [], [], 0, 0.0, 0
        landed = 0
        for turn in range(tries):
            seed = isl * 100 + turn
            await self.clear()
            alone = await self.decode.ask(seed=seed, isl=isl, osl=self.osl, logprobs=1)
            await self.clear()
            prefill, decode = await self.hand_off(seed, isl, logprobs=1)
            equal += decode.tokens == alone.tokens
            landed += bool(decode.computed_tokens is not None and decode.computed_tokens <= 64 < isl or isl <= 64)
            same = next(
                (i for i, pair in enumerate(zip(decode.tokens, alone.tokens, strict=False)) if pair[0] != pair[1]),
                self.osl,
            )
            pairs = list(zip(decode.logprobs, alone.logprobs, strict=False))[:same]
            diff = max([diff, *(abs(mine - theirs) for mine, theirs in pairs)])
            kv_bytes = prefill.kv_bytes
            if turn or tries == 1:  # The first of a length compiles and warms up.
                remote.append(decode.step_s[0] - min(decode.started_s, prefill.started_s))
                local.append(alone.step_s[0] - alone.started_s)
                exposed.append(prefill.ended_s - prefill.started_s)
                itl += [b - a for a, b in zip(decode.step_s[1:], decode.step_s[2:], strict=False)]
        return {
            "isl": isl,
            "equal": f"{equal} of {tries}",
            "max_logprob_diff": diff,
            "landed": f"{landed} of {tries}",
            "remote_ttft_ms": statistics.median(remote) * 1e3,
            "local_ttft_ms": statistics.median(local) * 1e3,
            "prefill_ms": statistics.median(exposed) * 1e3,
            "exposed_ms": (statistics.median(remote) - statistics.median(exposed)) * 1e3,
            "itl_ms": statistics.median(itl) * 1e3 if itl else None,
            "kv_mb": kv_bytes / 1e6,
        }

    async def load(self, isl: int, requests: int, concurrency: int) -> Row:
        """Many at once, twice the same prompts: the second answer must be the first."""
        answers: dict[int, list[int]] = {}
        gate = asyncio.Semaphore(concurrency)
        started_s = time.monotonic()
        itl: list[float] = []

        async def one(seed: int) -> None:
            async with gate:
                _, decode = await self.hand_off(seed, isl)
                answers[seed] = decode.tokens
                itl.extend(b - a for a, b in zip(decode.step_s, decode.step_s[1:], strict=False))

        await self.clear()
        async with asyncio.TaskGroup() as tasks:
            for seed in range(requests):
                tasks.create_task(one(1_000_000 + seed))
        took_s = time.monotonic() - started_s
        await self.clear()  # Only possible when every block is free again.
        last = await self.decode.ask(seed=1, isl=16, osl=1)
        return {
            "isl": isl,
            "requests": requests,
            "at_once": concurrency,
            "tokens_per_s": requests * self.osl / took_s,
            "itl_ms": statistics.median(itl) * 1e3,
            "received": json.dumps(last.received),
        }


@contextlib.contextmanager
def shared_gpu(devices: list[str]) -> Iterator[dict[str, str]]:
    """The environment of the engines: on one GPU, that of an MPS daemon of our own."""
    if len(set(devices)) > 1:
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        places = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
        for place in places.values():
            Path(place).mkdir()
        try:
            subprocess.run(["nvidia-cuda-mps-control", "-d"], env=os.environ | places, check=True, timeout=20)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"no MPS daemon, the engines take turns: {error}", file=sys.stderr)
            yield {}
            return
        try:
            yield places
        finally:
            subprocess.run(
                ["nvidia-cuda-mps-control"], input=b"quit\n", env=os.environ | places, check=False, timeout=20
            )


@contextlib.asynccontextmanager
async def started_pair(options: argparse.Namespace, environment: dict[str, str]) -> AsyncIterator[Pair]:
    devices = options.devices.split(",")
    engines = []
    try:
        for role, device in zip(("prefill", "decode"), (devices[0], devices[-1]), strict=True):
            command = [sys.executable, __file__, *sys.argv[1:], "--role", role, "--model", options.model]
            variables = os.environ | environment | {"CUDA_VISIBLE_DEVICES": device}
            process = await asyncio.create_subprocess_exec(
                *command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, limit=1 << 26
            )
            engines.append(Engine(process))
        infos = [await engine.started() for engine in engines]
        assert infos[0].fingerprint == infos[1].fingerprint, infos
        print(f"{infos[1].description}: {infos[1].kv_blocks} blocks, {infos[1].handoff_addresses}", flush=True)
        yield Pair(engines[0], engines[1], infos[1], options.osl)
    finally:
        for engine in engines:
            await engine.aclose()


async def measure(options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    started_s = time.monotonic()
    with shared_gpu(options.devices.split(",")) as environment:
        async with started_pair(options, environment) as pair:
            print(f"engines up after {time.monotonic() - started_s:.0f} s", flush=True)
            for isl in options.isl:
                rows.append(await pair.case(isl, options.tries))
                print(json.dumps(rows[-1]), flush=True)
            if options.requests:
                rows.append(await pair.load(options.isl[-1], options.requests, 8))
                print(json.dumps(rows[-1]), flush=True)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-8b", help="a model of dummy weights")
    parser.add_argument("--model", default="", help="a model's folder instead")
    parser.add_argument("--isl", type=lambda text: [int(item) for item in text.split(",")], default=[64, 1000, 3000])
    parser.add_argument("--osl", type=int, default=32)
    parser.add_argument("--tries", type=int, default=6, help="prompts of each length; the first one is not timed")
    parser.add_argument("--requests", type=int, default=32, help="of the load at the end, 8 at once; 0: none")
    parser.add_argument("--devices", default="0", help="of prefill and decode: 0 or 0,1")
    parser.add_argument("--share", type=float, default=0.42, help="of the GPU's memory that one engine may take")
    parser.add_argument("--kv-gib", type=float, default=8.0)
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--chunk-tokens", type=int, default=2048)
    parser.add_argument("--transports", default="ucx")
    parser.add_argument("--verify", action="store_true", help="digest the KV in the blocks where it landed, too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--role", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.role:
        asyncio.run(run_engine(options))
        return
    with tempfile.TemporaryDirectory() as folder:
        if not options.model:
            options.model = folder
            (Path(folder) / "config.json").write_text(json.dumps(SHAPES[options.shape]))
        rows = asyncio.run(measure(options))
    title = f"{options.shape or options.model}; {machine()}; {versions('vllm', 'torch', 'ucxx-cu13')}"
    print_table(title, COLUMNS, [row for row in rows if "equal" in row])
    write_json(options.json, rows)


if __name__ == "__main__":
    main()
