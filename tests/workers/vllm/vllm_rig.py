"""A prefill and a decode engine of real vLLM in one test process (their own processes do the work), and how to drive them."""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

from hocket.bus.messages import KvEvent, SamplingParams, TokenLogprob
from hocket.transport.base import HandoffKey
from hocket.workers.config import WorkerConfig
from hocket.workers.engines.base import DecodeTask, EngineInfo, PrefillOutcome, PrefillTask, StepOutput
from hocket.workers.engines.vllm.engine import VllmEngine

PREFILL_EPOCH, DECODE_EPOCH = 11, 22
BLOCK_TOKENS = 32
CHUNK_TOKENS = 256
MAX_MODEL_LEN = 2048
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def engine_config(role: str, model: Path, **changes: object) -> WorkerConfig:
    """One core for each rank of an engine, half a GiB of KV; `changes` are fields of WorkerConfig."""
    cores = sorted(os.sched_getaffinity(0))
    ranks = int(str(changes.get("tp", 1)))
    own = [cores[(rank if role == "prefill" else -1 - rank) % len(cores)] for rank in range(ranks)]
    settings: dict[str, object] = {
        "role": role,
        "model": str(model),
        "transports": "ucx,tcp",
        "block_tokens": BLOCK_TOKENS,
        "kv_gib": 0.5,
        "max_model_len": MAX_MODEL_LEN,
        "chunk_tokens": CHUNK_TOKENS,
        "cpu_cores": "|".join(map(str, own)),
    }
    return WorkerConfig(**{**settings, **changes})  # type: ignore[arg-type]  # Checked by the struct's own tests.


def random_prompt(tokens: int, seed: int) -> list[int]:
    """Token ids without meaning: the same for the same arguments."""
    source = random.Random(f"{tokens} {seed}")
    return [source.randrange(100, 40_000) for _ in range(tokens)]


@dataclass
class Answer:
    """Everything that one decode request made."""

    steps: list[StepOutput] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [token for step in self.steps for token in step.token_ids]

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [entry for step in self.steps for entry in step.logprobs]

    @property
    def computed_tokens(self) -> int | None:
        return self.steps[0].computed_tokens

    @property
    def cached_tokens(self) -> int | None:
        return self.steps[0].cached_tokens


@dataclass
class EnginePair:
    """Prefill and decode engine, started."""

    prefill_engine: VllmEngine
    decode_engine: VllmEngine
    prefill_info: EngineInfo
    decode_info: EngineInfo
    prefill_events: list[KvEvent] = field(default_factory=list)
    decode_events: list[KvEvent] = field(default_factory=list)
    references: dict[tuple[object, ...], Answer] = field(default_factory=dict)

    def addresses(self, scheme: str) -> tuple[str, ...]:
        return tuple(address for address in self.decode_info.handoff_addresses if address.startswith(f"{scheme}:"))

    async def clear(self) -> None:
        """Both prefix caches empty; every block must be free for that."""
        async with asyncio.timeout(10):
            while not (
                await self.prefill_engine.clear_prefix_cache() and await self.decode_engine.clear_prefix_cache()
            ):
                await asyncio.sleep(0.05)

    async def decode(
        self, prompt: list[int], token: bytes | None = None, sampling: SamplingParams = GREEDY, timeout_s: float = 60.0
    ) -> Answer:
        answer = Answer()
        task = DecodeTask("r", 1, prompt, sampling, token, timeout_s, self.prefill_info.tp_size)
        await self.decode_engine.decode(task, answer.steps.append)
        return answer

    async def prefill(
        self,
        prompt: list[int],
        token: bytes,
        *,
        scheme: str = "tcp",
        fingerprint: str | None = None,
        epoch: int = DECODE_EPOCH,
        timeout_s: float = 60.0,
    ) -> PrefillOutcome:
        key = HandoffKey(token, 1, 1)
        fingerprint = self.decode_info.fingerprint if fingerprint is None else fingerprint
        task = PrefillTask("r", key, prompt, self.addresses(scheme), epoch, fingerprint, timeout_s)
        decode = self.decode_info
        return await self.prefill_engine.prefill(
            replace(task, decode_ranks=decode.tp_size, decode_block_tokens=decode.block_tokens)
        )

    async def hand_off(
        self, prompt: list[int], sampling: SamplingParams = GREEDY, *, scheme: str = "tcp"
    ) -> tuple[PrefillOutcome, Answer]:
        """Prefill there, decode here."""
        token = os.urandom(16)
        async with asyncio.TaskGroup() as group:
            decode = group.create_task(self.decode(prompt, token, sampling))
            prefill = group.create_task(self.prefill(prompt, token, scheme=scheme))
        return prefill.result(), decode.result()

    async def under_way(
        self, prompt: list[int], blocks: int, sampling: SamplingParams = GREEDY, *, timeout_s: float = 60.0
    ) -> tuple[asyncio.Task[Answer], asyncio.Task[PrefillOutcome]]:
        """A decode, and its prefill when so many blocks are computed; one that was over before that was seen is done again."""
        for _ in range(10):
            await self.clear()
            token = os.urandom(16)
            decode = asyncio.create_task(self.decode(prompt, token, sampling, timeout_s=timeout_s))
            prefill = asyncio.create_task(self.prefill(prompt, token))
            async with asyncio.timeout(timeout_s):
                while self.prefill_engine.load().kv_blocks_free > self.prefill_info.kv_blocks - blocks:
                    await asyncio.sleep(0.002)
                    if prefill.done():
                        break
            if not prefill.done():
                return decode, prefill
            await decode
        raise AssertionError("no prefill was seen while it was computed")

    async def reference(self, prompt: list[int], sampling: SamplingParams = GREEDY) -> Answer:
        """What the decode engine says when it computes the whole prompt itself; leaves both caches empty."""
        key = (tuple(prompt), sampling.seed, sampling.logprobs, sampling.max_tokens)
        if key not in self.references:
            await self.clear()
            answer = await self.decode(prompt, None, sampling)
            assert answer.computed_tokens == len(prompt)
            self.references[key] = answer
        await self.clear()
        return self.references[key]

    async def wait_blocks_free(self, timeout_s: float = 10.0) -> None:
        """Every block of both engines is back."""
        async with asyncio.timeout(timeout_s):
            for engine, info in (
                (self.prefill_engine, self.prefill_info),
                (self.decode_engine, self.decode_info),
            ):
                while engine.load().kv_blocks_free != info.kv_blocks or engine.load().running:
                    await asyncio.sleep(0.05)
