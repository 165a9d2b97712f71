"""`hocket lab fit`: a profile from an engine's step log, by least squares of the relative error.

A step log is JSON lines, one object an engine step:
    {"seconds": 0.0312, "prefill_tokens": 512, "prefill_pairs": 131328, "decode_requests": 7, "decode_kv_tokens": 21500}
`prefill_pairs`: for each prompt token of the step, the tokens it attends to, itself included; the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from .timing import Coefficients

STEPS_MIN = 20

Count = Annotated[int, msgspec.Meta(ge=0)]


class FitError(ValueError):
    """A step log that cannot be read or does not determine a profile; the text says where or why."""


class Step(msgspec.Struct, frozen=True):
    """One line of the log."""

    seconds: Annotated[float, msgspec.Meta(gt=0)]
    prefill_tokens: Count = 0
    prefill_pairs: Count = 0
    decode_requests: Count = 0
    decode_kv_tokens: Count = 0


@dataclass(frozen=True, slots=True)
class Fit:
    """What came out, and how far the log is from it."""

    coefficients: Coefficients
    steps: int
    error_p50: float  # relative
    error_p90: float


def read_step_log(path: Path) -> list[Step]:
    """Raises FitError with the line's number."""
    steps = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise FitError(f"{path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            steps.append(msgspec.json.decode(line, type=Step))
        except msgspec.MsgspecError as error:
            raise FitError(f"{path}:{number}: {error}") from error
    return steps


def fit(steps: Sequence[Step]) -> Fit:
    """Coefficients that are not negative. Raises FitError when the log does not vary enough to tell them apart."""
    if len(steps) < STEPS_MIN:
        raise FitError(f"{len(steps)} steps are too few, {STEPS_MIN} are needed")
    seconds = np.array([step.seconds for step in steps])
    loads = np.array(
        [
            [1, s.prefill_tokens, s.prefill_pairs, s.decode_requests, s.decode_kv_tokens, s.decode_requests > 0]
            for s in steps
        ],
        dtype=float,
    )
    if loads[:, 5].all():  # Then it is a part of every step.
        loads = loads[:, :5]
    if not loads[:, 1].any() or not loads[:, 3].any():
        raise FitError("the log has no step with prompt tokens, or none with decoding requests")
    solution = _not_negative(loads / seconds[:, None], np.ones(len(steps)))
    errors = np.abs(loads @ solution / seconds - 1)
    p50, p90 = np.percentile(errors, (50, 90))
    return Fit(Coefficients(*(float(value) * 1e6 for value in solution)), len(steps), float(p50), float(p90))


def _not_negative(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Least squares; a column that would get a negative share is left out, the most negative one first."""
    scale = np.abs(a).max(axis=0)
    used = [column for column in range(a.shape[1]) if scale[column]]
    while used:
        solution, _, rank, _ = np.linalg.lstsq(a[:, used] / scale[used], b, rcond=1e-10)
        if rank < len(used):
            raise FitError("the steps are too much alike to tell the costs of their parts from each other")
        if solution.min() >= 0:
            full = np.zeros(a.shape[1])
            full[used] = solution / scale[used]
            return full
        del used[int(solution.argmin())]
    raise FitError("no cost is positive: the log cannot be right")
