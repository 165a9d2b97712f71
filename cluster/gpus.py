"""The GPUs of this machine, as nvidia-smi tells, or those that a setting names."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence

import msgspec

from .settings import SettingsError

MIB = 1 << 20
GIB = 1 << 30
_QUERY = ("nvidia-smi", "--query-gpu=name,uuid,memory.total,memory.used", "--format=csv,noheader,nounits")
_QUERY_S = 20.0  # without its persistence daemon the driver takes seconds a GPU
# Memory in MiB as nvidia-smi shows it.
CARDS = {
    "A100": 81920,
    "A100-40GB": 40960,
    "B200": 183359,
    "H100": 81559,
    "H200": 143771,
    "L4": 23034,
    "L40S": 46068,
}


class Gpu(msgspec.Struct, frozen=True):
    """One GPU."""

    name: str
    memory_bytes: int
    used_bytes: int = 0  # by whatever runs there now
    uuid: str = ""


def named_gpus(text: str) -> tuple[Gpu, ...]:
    """Those of a setting like 8xH200 or 2x80GiB; "" names none. Raises SettingsError."""
    if not text:
        return ()
    match = re.fullmatch(r"(?:(\d{1,3})x)?(\S+)", text.strip())
    count, card = (int(match[1] or 1), match[2]) if match else (0, "")
    size = re.fullmatch(r"(\d+(?:\.\d+)?)(GiB|GB)", card)
    if size:
        memory_bytes = int(float(size[1]) * (GIB if size[2] == "GiB" else 10**9))
    else:
        memory_bytes = {name.lower(): mib for name, mib in CARDS.items()}.get(card.lower(), 0) * MIB
    if not count or not memory_bytes:
        known = ", ".join(CARDS)
        raise SettingsError(f"machine_gpus: {text!r} is not like 8xH200 or 2x80GiB; cards known by name: {known}")
    return (Gpu(card, memory_bytes),) * count


def gpus_here() -> tuple[Gpu, ...]:
    """This machine's; none where there is no driver."""
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_QUERY_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(_gpu(line) for line in done.stdout.splitlines() if line.count(",") == 3)


def _gpu(line: str) -> Gpu:
    name, uuid, total, used = (part.strip() for part in line.split(","))
    return Gpu(name, int(total) * MIB if total.isdigit() else 0, int(used) * MIB if used.isdigit() else 0, uuid)


def find_gpu(name: str, gpus: Sequence[Gpu]) -> int | None:
    """The index of a GPU as CUDA_VISIBLE_DEVICES names it: its number or the beginning of its UUID."""
    if name.isdigit():
        return int(name) if int(name) < len(gpus) else None
    found = [index for index, gpu in enumerate(gpus) if name and gpu.uuid.startswith(name)]
    return found[0] if len(found) == 1 else None
