"""The step log of a real engine adds up to what was asked of it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import msgspec
import pytest
from vllm_rig import DECODE_EPOCH, Answer, engine_config, random_prompt

from hocket.bus.messages import SamplingParams
from hocket.workers.engines.base import DecodeTask
from hocket.workers.engines.step_log import LoggedStep
from hocket.workers.engines.vllm.engine import VllmEngine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),
]
LENGTHS, TOKENS = (20, 70, 150), 30


async def test_every_token_is_in_the_step_log_once(demo_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    config = engine_config("decode", demo_model, step_log=str(path))
    engine = VllmEngine(config, worker_id="decode", epoch=DECODE_EPOCH)
    try:
        await engine.start()
        started_s = time.monotonic()
        sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        answers = [Answer() for _ in LENGTHS]
        async with asyncio.timeout(100), asyncio.TaskGroup() as tasks:
            for answer, length in zip(answers, LENGTHS, strict=True):
                task = DecodeTask(f"r{length}", 1, random_prompt(length, 1), sampling, None, 1.0)
                tasks.create_task(engine.decode(task, answer.steps.append))
        wall_s = time.monotonic() - started_s
        await asyncio.sleep(1.1)  # Whatever ends after this writes what came before.
        task = DecodeTask("last", 1, random_prompt(5, 1), SamplingParams(max_tokens=2), None, 1.0)
        await engine.decode(task, Answer().steps.append)
    finally:
        await engine.aclose()
    steps = [msgspec.json.decode(line, type=LoggedStep) for line in path.read_bytes().splitlines()]
    asked = [step for step in steps if step.prefill_tokens != 5 and step.unix_s < steps[0].unix_s + wall_s + 0.5]
    assert sum(step.prefill_tokens for step in asked) == sum(LENGTHS)
    assert sum(step.decode_requests for step in asked) == len(LENGTHS) * (
        TOKENS - 1
    )  # A prompt's step makes the first.
    assert sum(step.prefill_pairs for step in asked) == sum(length * (length + 1) // 2 for length in LENGTHS)
    assert max(step.decode_requests for step in asked) == len(LENGTHS)
    assert 0.2 * wall_s < sum(step.seconds for step in asked) <= wall_s
