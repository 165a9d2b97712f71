"""How busy the GPUs are, through NVML; nothing where there is none."""

from __future__ import annotations

import statistics
import threading
from typing import Any

from measure import Row

EVERY_S = 0.2


class GpuSampler:
    """Samples in a thread of its own from `start` to `row`."""

    def __init__(self) -> None:
        self._nvml: Any = None  # pynvml has no types.
        self._handles: list[Any] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._busy: list[list[int]] = []
        try:
            import pynvml  # Only where there are GPUs.

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        except Exception as error:  # Any: no package, no driver, no permission.
            print(f"no figures of GPUs: {error}")

    @property
    def name(self) -> str:
        """Of the first GPU, and how many."""
        if not self._handles:
            return "no GPU"
        return f"{len(self._handles)} x {self._nvml.nvmlDeviceGetName(self._handles[0])}"

    def start(self) -> None:
        self._busy = [[] for _ in self._handles]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            for index, handle in enumerate(self._handles):
                self._busy[index].append(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu)

    def row(self) -> Row:
        """Mean share of time with a kernel running, in per cent, and memory in GiB, of each GPU since `start`."""
        self._stop.set()
        if self._thread:
            self._thread.join()
        row: Row = {}
        for index, handle in enumerate(self._handles):
            row[f"gpu{index}_busy_pct"] = statistics.fmean(self._busy[index]) if self._busy[index] else None
            row[f"gpu{index}_gib"] = self._nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30
        return row
