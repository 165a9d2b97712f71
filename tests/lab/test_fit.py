"""Profiles from step logs."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import msgspec
import pytest

from hocket.bus.messages import SamplingParams
from hocket.cluster.cli import main
from hocket.lab.clients import VOCABULARY, Request
from hocket.lab.fit import FitError, Step, fit, read_step_log
from hocket.lab.house import House
from hocket.lab.log import EventLog
from hocket.lab.loop import VirtualLoop, run
from hocket.lab.members import Shape
from hocket.lab.timing import Coefficients, ProfileTiming, StepLoad, load_profile


def steps_of(name: str, count: int, noise: float) -> list[Step]:
    """What an engine that behaves exactly like the profile would log, on a clock that is off by `noise`."""
    rng, timing = random.Random(3), ProfileTiming(load_profile(name))
    steps = []
    for _ in range(count):
        tokens = rng.choice((0, rng.randint(1, 8192)))
        requests = rng.choice((0, rng.randint(1, 200))) if tokens else rng.randint(1, 200)
        kv = requests * rng.randint(10, 5000)
        pairs = tokens * rng.randint(tokens // 2, 20000)
        seconds = timing.step_s(StepLoad(tokens, pairs, requests, kv)) * rng.uniform(1 - noise, 1 + noise)
        steps.append(Step(seconds, tokens, pairs, requests, kv))
    return steps


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-6), (0.05, 0.05)])
def test_the_coefficients_of_an_engine_are_found_again(noise: float, tolerance: float):
    found = fit(steps_of("h200-llama-70b-fp8", 2000, noise))
    truth = load_profile("h200-llama-70b-fp8").coefficients
    for name in Coefficients.__struct_fields__:
        assert getattr(found.coefficients, name) == pytest.approx(getattr(truth, name), rel=tolerance)
    assert found.error_p90 <= noise + 1e-9


def test_a_cost_that_would_be_negative_is_zero():
    steps = [Step(0.01 + 1e-6 * n - 1e-9 * n * n, n, n * n, n % 7, n % 7 * (n % 11)) for n in range(1, 500, 3)]
    assert min(msgspec.structs.astuple(fit(steps).coefficients)) >= 0


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ([Step(0.1, 1, 1, 1, 1)] * 5, "5 steps are too few"),
        ([Step(0.1, 10, 50)] * 30, "none with decoding requests"),
        ([Step(0.1, 10, 50, 1, 7)] * 30, "too much alike"),
    ],
)
def test_a_log_that_determines_nothing_is_refused(steps: list[Step], why: str):
    with pytest.raises(FitError, match=why):
        fit(steps)


def test_a_bad_line_is_named(tmp_path: Path):
    log = tmp_path / "steps.jsonl"
    log.write_text('{"seconds": 0.1}\n\n{"seconds": 0}\n')
    with pytest.raises(FitError, match=r"steps.jsonl:3: .*seconds"):
        read_step_log(log)


FACTS = [
    "--kv-bytes-per-token",
    "131072",
    "--kv-tokens",
    "400000",
    "--layers",
    "32",
    "--hidden",
    "4096",
    "--weight-gb",
    "16",
]


def test_the_step_log_of_a_pool_gives_its_engines_times_back(tmp_path: Path):
    log, out = tmp_path / "steps.jsonl", tmp_path / "mine.json"
    shape = Shape(slots=16, kv_blocks=400, chunk_tokens=128, prefill_ms_per_token=0.5, itl_ms=20.0, step_log=str(log))

    async def main_of(loop: VirtualLoop) -> list[Request]:
        house = House(loop, random.Random(1), shape, EventLog(loop.time))
        await house.start()
        rng, requests = random.Random(2), []
        for number in range(60):
            prompt = rng.choices(VOCABULARY, k=rng.randint(4, 300))
            requests.append(Request(number, prompt, SamplingParams(max_tokens=rng.randint(1, 40)), loop.time()))
            house.send(requests[-1])
            await asyncio.sleep(rng.expovariate(4.0))
        await asyncio.sleep(10.0)
        await house.stop()
        return requests

    assert {how for request in run(main_of) for how in request.ends} == {"answered"}
    steps = read_step_log(log)
    assert sum(step.prefill_tokens for step in steps) > 5000
    assert main(["lab", "fit", str(log), "--out", str(out), *FACTS]) == 0
    timing = ProfileTiming(load_profile(str(out)))
    for tokens, requests in ((128, 0), (40, 0), (0, 1), (0, 12), (100, 5)):
        load = StepLoad(tokens, tokens * (tokens + 1) // 2, requests, requests * 100)
        assert timing.step_s(load) == pytest.approx(tokens * 0.5e-3 + (20e-3 if requests else 0.0), rel=0.03)


def test_the_command_writes_a_profile_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log, out = tmp_path / "steps.jsonl", tmp_path / "mine.json"
    log.write_bytes(b"\n".join(msgspec.json.encode(step) for step in steps_of("h200-llama-8b", 300, 0.01)))
    assert main(["lab", "fit", str(log), "--out", str(out), *FACTS]) == 0
    assert "300 steps, relative error" in capsys.readouterr().out
    assert load_profile(str(out)).kv_tokens == 400000
    rows = tmp_path / "rows.json"
    trace = "synthetic:poisson,requests=20,prompt=500,output=10"
    run = ["lab", "run", "--trace", trace, "--profile", str(out), "--workers", "2", "--jobs", "1", "--json", str(rows)]
    assert main([*run, "--policy", "kv", "--policy", "round_robin"]) == 0
    assert [row["label"] for row in json.loads(rows.read_text())] == ["kv, 2 workers", "round_robin, 2 workers"]
    assert "TTFT mean s" in capsys.readouterr().out
