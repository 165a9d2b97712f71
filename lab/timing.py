"""How long an engine step takes: Dynamo's published mocker formula, or a profile of a real GPU. Seconds.

Both are polynomials of the step's load, so a run of decode steps in which nothing else happens has its duration in
closed form (`run_s`), and the simulator need not walk through it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Protocol

import msgspec


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What one step computes. Pairs: for each prompt token, the tokens it attends to."""

    prefill_tokens: int
    prefill_pairs: int
    decode_requests: int
    decode_kv_tokens: int  # that the decoding requests attend to, all together


@dataclass(frozen=True, slots=True)
class Quadratic:
    """The duration of the i-th step of a run, i from 0: `constant + linear * i + square * i * i`."""

    constant: float
    linear: float
    square: float

    def run_s(self, steps: int) -> float:
        """Of the first `steps` steps together."""
        n = steps
        return self.constant * n + self.linear * (n * (n - 1) / 2) + self.square * ((n - 1) * n * (2 * n - 1) / 6)

    def steps_until(self, elapsed_s: float, steps_max: int) -> int:
        """The fewest steps (at least 1) that last `elapsed_s`; `steps_max` when all of them are shorter."""
        low, high = 1, steps_max
        while low < high:
            middle = (low + high) // 2
            if self.run_s(middle) >= elapsed_s:
                high = middle
            else:
                low = middle + 1
        return low

    def steps_done(self, elapsed_s: float, steps_max: int) -> int:
        """How many of `steps_max` steps are over after `elapsed_s`."""
        steps = self.steps_until(elapsed_s, steps_max)
        return steps if self.run_s(steps) <= elapsed_s else steps - 1


class Timing(Protocol):
    """What a step costs."""

    def step_s(self, load: StepLoad) -> float:
        """One step."""

    def decode_run(self, requests: int, kv_tokens: int) -> Quadratic:
        """Steps of `requests` that only decode, each of which adds one token to what they attend to."""


class MockerTiming:
    """Dynamo's mocker (lib/mocker/src/common/perf_model.rs, `Polynomial`), in every version since 0.2.

    `prefill_ms = 4.209989e-7 n^2 + 1.518344e-2 n + 16.50142` for n new prompt tokens in the step and
    `decode_ms = max(1, -25.74 u^2 + 54.01 u + 5.74)`, u being the share of the KV cache that decoding requests attend to.
    A step lasts both together. On 0 <= u <= 1 the lower bound never acts.
    """

    def __init__(self, kv_tokens: int, *, speedup: float = 1.0) -> None:
        self._kv_tokens = kv_tokens
        self._scale = 1e-3 / speedup

    def step_s(self, load: StepLoad) -> float:
        """One step."""
        ms = 0.0
        if n := load.prefill_tokens:
            ms = (4.209989e-7 * n + 1.518344e-2) * n + 16.50142
        if load.decode_requests:
            u = min(load.decode_kv_tokens / self._kv_tokens, 1.0)
            ms += (-25.74 * u + 54.01) * u + 5.74
        return ms * self._scale

    def decode_run(self, requests: int, kv_tokens: int) -> Quadratic:
        """Steps of `requests` that only decode."""
        u, du = kv_tokens / self._kv_tokens, requests / self._kv_tokens
        constant = (-25.74 * u + 54.01) * u + 5.74
        linear = (54.01 - 2 * 25.74 * u) * du
        return Quadratic(constant * self._scale, linear * self._scale, -25.74 * du * du * self._scale)


class Coefficients(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Microseconds: a step costs `step_us` and so much for each of its parts."""

    step_us: float  # reading the weights, launching
    prefill_token_us: float
    prefill_pair_us: float
    decode_request_us: float
    decode_kv_token_us: float
    decode_step_us: float = 0.0  # once in a step that makes tokens, however many
    prefill_step_us: float = 0.0  # once in a step with prompt tokens: launching what is in no CUDA graph


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model on one worker's GPUs. `notes` say what was measured and what follows from something else."""

    name: str
    gpus: int
    coefficients: Coefficients
    kv_bytes_per_token: int
    kv_tokens: int  # that fit besides the weights
    layers: int
    hidden: int  # width of the model
    weight_bytes: int
    step_bytes: int = 0  # of them read by a step of one token; 0: all. A mixture of experts reads more with every token
    max_batched_tokens: int = 8192
    slots: int = 256
    notes: tuple[str, ...] = ()


HBM_BYTES_PER_US = 4.08e6
"""85 % of an H200's 4.8 TB/s: what reading weights and KV reaches."""
ALL_REDUCE_US = 10.0
"""One small all-reduce between the GPUs of a host (vLLM's custom kernel takes 8-12 us)."""
NVLINK_BYTES_PER_US = 394e3
"""Measured between two H200 with NV18."""


def tensor_parallel(profile: Profile, gpus: int) -> Profile:
    """The same model over `gpus` GPUs of one host, from its profile on one. Arithmetic, not measured.

    Compute, KV and the reading of weights divide by the GPUs; the rest of a step does not; each layer adds two
    all-reduces of the activations (2 bytes a value, ring: every GPU sends 2 (n - 1) / n of them). Raises ProfileError.
    """
    if gpus == 1:
        return profile
    if profile.gpus != 1:
        raise ProfileError(
            f"profile {profile.name!r} is of {profile.gpus} GPUs already; --tp divides one of a single GPU"
        )
    c, n, reductions = profile.coefficients, gpus, 2 * profile.layers
    reading_us = min((profile.step_bytes or profile.weight_bytes) / HBM_BYTES_PER_US, c.step_us)
    token_us = reductions * 2 * profile.hidden * 2 * (n - 1) / n / NVLINK_BYTES_PER_US
    room = profile.kv_tokens * profile.kv_bytes_per_token + profile.weight_bytes
    return msgspec.structs.replace(
        profile,
        name=f"{profile.name} TP{n}",
        gpus=n,
        coefficients=Coefficients(
            step_us=c.step_us - reading_us + reading_us / n + reductions * ALL_REDUCE_US,
            prefill_token_us=c.prefill_token_us / n + token_us,
            prefill_pair_us=c.prefill_pair_us / n,
            decode_request_us=c.decode_request_us / n + token_us,
            decode_kv_token_us=c.decode_kv_token_us / n,
            decode_step_us=c.decode_step_us,
            prefill_step_us=c.prefill_step_us,
        ),
        kv_tokens=(n * room - profile.weight_bytes) // profile.kv_bytes_per_token,
        notes=(*profile.notes, f"Divided over {n} GPUs by arithmetic: see hocket.lab.timing.tensor_parallel."),
    )


class ProfileTiming:
    """Linear in what a step computes; prompt and decode tokens of one step share the reading of the weights."""

    def __init__(self, profile: Profile, *, speedup: float = 1.0) -> None:
        scale, c = 1e-6 / speedup, profile.coefficients
        self._step, self._token, self._pair = c.step_us * scale, c.prefill_token_us * scale, c.prefill_pair_us * scale
        self._request, self._kv = c.decode_request_us * scale, c.decode_kv_token_us * scale
        self._decode, self._prefill = c.decode_step_us * scale, c.prefill_step_us * scale

    def step_s(self, load: StepLoad) -> float:
        """One step."""
        prefill = self._token * load.prefill_tokens + self._pair * load.prefill_pairs
        prefill += self._prefill if load.prefill_tokens else 0.0
        decode = self._request * load.decode_requests + self._kv * load.decode_kv_tokens
        return self._step + prefill + decode + (self._decode if load.decode_requests else 0.0)

    def decode_run(self, requests: int, kv_tokens: int) -> Quadratic:
        """Steps of `requests` that only decode."""
        constant = self._step + self._decode + self._request * requests + self._kv * kv_tokens
        return Quadratic(constant, self._kv * requests, 0.0)


class ProfileError(ValueError):
    """A profile that is not there or cannot be read; the text says which and why."""


def profile_names() -> list[str]:
    """The profiles that come with Hocket."""
    return sorted(path.name.removesuffix(".json") for path in (files(__package__) / "profiles").iterdir())


def load_profile(name: str) -> Profile:
    """A profile that comes with Hocket, or a file of `hocket lab fit`. Raises ProfileError."""
    source = Path(name) if name.endswith(".json") else files(__package__) / "profiles" / f"{name}.json"
    try:
        return msgspec.json.decode(source.read_bytes(), type=Profile)
    except OSError as error:
        raise ProfileError(f"no profile {name!r}; there are {', '.join(profile_names())}, or a .json file") from error
    except msgspec.MsgspecError as error:
        raise ProfileError(f"profile {name!r}: {error}") from error
