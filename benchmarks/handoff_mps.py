"""An MPS daemon of our own: without one a GPU time-slices between two processes, and the figures show that."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

_CONTROL = "nvidia-cuda-mps-control"
_TIMEOUT_S = 20.0


@contextlib.contextmanager
def mps_daemon() -> Iterator[None]:
    """Processes that are started meanwhile share the GPU through it; where there is no such program, nothing changes."""
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        settings = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        try:
            subprocess.run([_CONTROL, "-d"], env={**os.environ, **settings}, timeout=_TIMEOUT_S, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"no MPS daemon ({error}): the two processes take turns on the GPU", file=sys.stderr)
            yield
            return
        os.environ.update(settings)
        try:
            yield
        finally:
            for name in settings:
                del os.environ[name]
            with contextlib.suppress(subprocess.SubprocessError):
                subprocess.run(
                    [_CONTROL], input=b"quit\n", env={**os.environ, **settings}, timeout=_TIMEOUT_S, check=False
                )
