"""Whatever ends an engine, its front end hears of it, and no process of it stays."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vllm_rig import DECODE_EPOCH, Answer, engine_config, random_prompt

from hocket.bus.messages import SamplingParams
from hocket.workers.engines.base import DecodeTask, EngineDead, EngineError
from hocket.workers.engines.vllm import reaper
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
GONE_S = 2.0


def processes(mark: str) -> list[int]:
    return reaper.marked(mark.encode())


async def wait_gone(mark: str) -> None:
    async with asyncio.timeout(GONE_S):
        while processes(mark):
            await asyncio.sleep(0.02)


def worker_pid(mark: str) -> int:
    """vLLM names its processes."""
    return next(pid for pid in processes(mark) if b"Worker" in Path(f"/proc/{pid}/cmdline").read_bytes())


async def start_front_end(model: Path) -> tuple[asyncio.subprocess.Process, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(Path(__file__).with_name("vllm_front_end.py")), str(model), stdout=subprocess.PIPE
    )
    assert process.stdout
    async with asyncio.timeout(30):
        return process, (await process.stdout.readline()).decode().strip()


async def test_a_killed_worker_process_ends_every_request_and_the_engine(demo_model: Path) -> None:
    engine = VllmEngine(engine_config("decode", demo_model), worker_id="decode", epoch=DECODE_EPOCH)
    try:
        await engine.start()
        answer, sampling = Answer(), SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True)
        task = DecodeTask("r", 1, random_prompt(10, 1), sampling, None, 1.0)
        decode = asyncio.create_task(engine.decode(task, answer.steps.append))
        async with asyncio.timeout(30):
            while not answer.steps:
                await asyncio.sleep(0.02)
        os.kill(worker_pid(engine.mark), signal.SIGKILL)
        async with asyncio.timeout(1):
            assert isinstance(await engine.failed(), EngineDead)
            with pytest.raises(EngineDead):
                await decode
        with pytest.raises(EngineDead):
            await engine.decode(task, answer.steps.append)
    finally:
        started_s = time.monotonic()
        await engine.aclose()
    assert time.monotonic() - started_s < 5
    await wait_gone(engine.mark)


async def test_a_worker_process_that_hangs_shows_as_no_step_and_does_not_survive(demo_model: Path) -> None:
    engine = VllmEngine(engine_config("decode", demo_model), worker_id="decode", epoch=DECODE_EPOCH)
    try:
        await engine.start()
        answer, sampling = Answer(), SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True)
        task = DecodeTask("r", 1, random_prompt(10, 1), sampling, None, 1.0)
        decode = asyncio.create_task(engine.decode(task, answer.steps.append))
        async with asyncio.timeout(30):
            while engine.load().steps < 5:
                await asyncio.sleep(0.02)
        os.kill(worker_pid(engine.mark), signal.SIGSTOP)
        steps = -1
        async with asyncio.timeout(30):
            while engine.load().steps != steps:  # The steps that were under way.
                steps = engine.load().steps
                await asyncio.sleep(1.0)
        assert engine.load().due == 1
        engine.break_down("it hangs")
        with pytest.raises(EngineDead, match="it hangs"):
            await decode
    finally:
        started_s = time.monotonic()
        await engine.aclose()
    assert time.monotonic() - started_s < 5
    await wait_gone(engine.mark)


async def test_a_closed_engine_fails_what_runs_and_what_comes(demo_model: Path) -> None:
    engine = VllmEngine(engine_config("decode", demo_model), worker_id="decode", epoch=DECODE_EPOCH)
    try:
        await engine.start()
        answer, sampling = Answer(), SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True)
        task = DecodeTask("r", 1, random_prompt(10, 1), sampling, None, 1.0)
        decode = asyncio.create_task(engine.decode(task, answer.steps.append))
        async with asyncio.timeout(30):
            while not answer.steps:
                await asyncio.sleep(0.02)
    finally:
        started_s = time.monotonic()
        await engine.aclose()
    assert time.monotonic() - started_s < 5
    with pytest.raises(EngineDead):
        await decode
    with pytest.raises(EngineDead):
        await engine.decode(task, answer.steps.append)
    assert not processes(engine.mark)


async def test_when_the_front_end_is_killed_its_processes_go(demo_model: Path) -> None:
    front_end, mark = await start_front_end(demo_model)
    assert front_end.stdout
    async with asyncio.timeout(200):
        assert await front_end.stdout.readline() == b"ready\n"
    assert len(processes(mark)) >= 2
    front_end.kill()
    await front_end.wait()
    await wait_gone(mark)


async def test_when_the_front_end_is_killed_while_it_starts_its_processes_go(demo_model: Path) -> None:
    front_end, mark = await start_front_end(demo_model)
    async with asyncio.timeout(100):
        while not processes(mark):
            await asyncio.sleep(0.05)
    front_end.kill()
    await front_end.wait()
    await wait_gone(mark)


async def test_a_start_that_is_cancelled_leaves_nothing(demo_model: Path) -> None:
    engine = VllmEngine(engine_config("decode", demo_model), worker_id="decode", epoch=DECODE_EPOCH)
    start = asyncio.create_task(engine.start())
    async with asyncio.timeout(100):
        while not processes(engine.mark):
            await asyncio.sleep(0.05)
    start.cancel()
    async with asyncio.timeout(20):
        with pytest.raises(asyncio.CancelledError):
            await start
        await engine.aclose()
    await wait_gone(engine.mark)


async def test_a_model_that_cannot_be_loaded_is_an_engine_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    engine = VllmEngine(engine_config("decode", tmp_path), worker_id="decode", epoch=DECODE_EPOCH)
    try:
        with pytest.raises(EngineError, match="vllm did not start"):
            await engine.start()
    finally:
        await engine.aclose()
    await wait_gone(engine.mark)
