"""A worker process: `worker_child.py CONFIG_AS_JSON`."""

from __future__ import annotations

import asyncio
import sys

import msgspec

from hocket.workers.config import WorkerConfig
from hocket.workers.worker import run_worker

if __name__ == "__main__":
    sys.exit(asyncio.run(run_worker(msgspec.json.decode(sys.argv[1], type=WorkerConfig))))
