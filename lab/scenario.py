"""What one simulated run is told: the pool, its engines and links, the router, the clients."""

from __future__ import annotations

from typing import Literal

import msgspec

from .timing import MockerTiming, Profile, ProfileError, ProfileTiming, Timing, load_profile, tensor_parallel

MOCKER = "mocker"
MODEL = "lab"
LLAMA_70B = 327_680, 80
"""KV bytes of a token, layers: what the mocker's formula, which knows no model, is taken to serve."""


class Slo(msgspec.Struct, frozen=True):
    """What a request must keep to count as good: its time to the first token, and the mean gap between its tokens."""

    ttft_s: float = float("inf")
    itl_s: float = float("inf")


class Engine(msgspec.Struct, frozen=True):
    """One worker's engine. Zero: what the profile says (mocker: its own defaults)."""

    profile: str = MOCKER  # "mocker", the name of a profile, or a file of one
    tp: int = 1  # GPUs of one worker; profiles only
    block_tokens: int = 64
    kv_blocks: int = 0
    slots: int = 0
    max_batched_tokens: int = 0
    speedup: float = 1.0
    steps_max: int = 1 << 30  # 1: every step by itself

    def resolved(self) -> ResolvedEngine:
        """With everything known. Raises timing.ProfileError."""
        if self.profile == MOCKER:
            if self.tp != 1:
                raise ProfileError("the mocker's formula knows no tensor parallelism: name a profile")
            # Defaults of Dynamo's mocker 1.6.1: 16,384 blocks of 64 tokens, 256 requests, 8,192 tokens a step.
            kv_blocks = self.kv_blocks or 16384 * 64 // self.block_tokens
            timing: Timing = MockerTiming(kv_blocks * self.block_tokens, speedup=self.speedup)
            return ResolvedEngine(timing, kv_blocks, self.slots or 256, self.max_batched_tokens or 8192, None)
        profile = tensor_parallel(load_profile(self.profile), self.tp)
        return ResolvedEngine(
            ProfileTiming(profile, speedup=self.speedup),
            self.kv_blocks or profile.kv_tokens // self.block_tokens,
            self.slots or profile.slots,
            self.max_batched_tokens or profile.max_batched_tokens,
            profile,
        )


class ResolvedEngine(msgspec.Struct, frozen=True):
    """An engine's sizes and its timing."""

    timing: Timing
    kv_blocks: int
    slots: int
    max_batched_tokens: int
    profile: Profile | None

    @property
    def gpus(self) -> int:
        """Of one worker."""
        return self.profile.gpus if self.profile else 1


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One run. With `prefill` workers the pool is disaggregated, without every worker does both."""

    decode: int
    prefill: int = 0
    policy: str = "kv"
    engine: Engine = Engine()
    prefill_engine: Engine | None = None  # None: as `engine`
    prefill_slots: int = 8  # jobs that a prefill worker pulls at once
    lane_wait_s: float | None = None
    """A prefill job goes to the worker of `Choice.lane` if that has a free slot within this time. None, as the router is now:
    whoever pulls first."""
    link_gb_per_s: float = 64.0  # of each GPU, in and out
    link_latency_s: float = 1e-3  # grant, last digest, word that it landed
    is_layerwise: bool = True  # a layer's KV is sent while the next is computed
    kv_bytes_per_token: int = 0  # 0: of the profile; mocker: Llama-70B's 320 KiB
    local_prefill_tokens_max: int = 16
    routers: int = 1  # requests go to each in turn
    bus_s: float = 3e-4  # one message, from who sends it to who handles it
    queue_s: float = 1e-3  # a prefill job, from its publisher to whoever pulls it
    heartbeat_s: float = 0.5
    concurrency: int = 0  # 0: by the trace's clock; n: n clients, each sends its next request when an answer ends
    timeout_s: float = 600.0
    slo: Slo = Slo()
    seed: int = 0

    def gpus(self) -> tuple[int, int]:
        """Of one prefill worker, and of one that decodes. Raises timing.ProfileError."""
        return (self.prefill_engine or self.engine).resolved().gpus, self.engine.resolved().gpus

    def kv_shape(self) -> tuple[int, int]:
        """KV bytes of a token, and layers that are sent one by one. Raises timing.ProfileError."""
        profile = self.engine.resolved().profile
        kv_bytes, layers = (profile.kv_bytes_per_token, profile.layers) if profile else LLAMA_70B
        return self.kv_bytes_per_token or kv_bytes, layers

    @property
    def label(self) -> str:
        """Short, for tables and plots."""
        decode, prefill = self.engine, self.prefill_engine or self.engine
        of_decode, of_prefill = (f" TP{engine.tp}" if engine.tp > 1 else "" for engine in (decode, prefill))
        pool = f"{self.decode} workers{of_decode}"
        if self.prefill:
            pool = f"{self.prefill}P{of_prefill} : {self.decode}D{of_decode}"
        usual = Scenario(decode=1)
        more = [
            f", {self.link_gb_per_s:g} GB/s" * (self.link_gb_per_s != usual.link_gb_per_s),
            f", local {self.local_prefill_tokens_max}"
            * (self.local_prefill_tokens_max != usual.local_prefill_tokens_max),
            f", {self.routers} routers" * (self.routers != usual.routers),
        ]
        return f"{self.policy}, {pool}{''.join(more)}"


Outcome = Literal["ok", "too_long", "timeout"]
