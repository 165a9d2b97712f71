"""Run as a script: a decode engine whose process a test kills. Prints the mark of its processes, then "ready"."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from vllm_rig import DECODE_EPOCH, engine_config

from hocket.workers.engines.vllm.engine import VllmEngine


async def main() -> None:
    engine = VllmEngine(engine_config("decode", Path(sys.argv[1])), worker_id="decode", epoch=DECODE_EPOCH)
    print(engine.mark, flush=True)
    await engine.start()
    print("ready", flush=True)
    await asyncio.sleep(60)


if __name__ == "__main__":  # vLLM's processes import the main module.
    asyncio.run(main())
