"""When an engine hangs, and when it only takes its time."""

from __future__ import annotations

import asyncio

import pytest
from workers_rig import PairMaker, prompt_of

from hocket.bus.messages import SamplingParams
from hocket.workers.engines.base import DecodeTask, EngineDead, EngineLoad
from hocket.workers.watchdog import FIRST_STEP_SHARE, LOOK_S, Watchdog


class Looks:
    """A watchdog that is asked as often as it wants."""

    def __init__(self, limit_s: float = 10.0) -> None:
        self.watchdog = Watchdog(limit_s)
        self.now = 100.0

    def until_stuck(self, seconds: float, *, steps: int, due: int) -> float | None:
        """How long it took, if it was found within `seconds`."""
        start, end = self.now, self.now + seconds
        while self.now < end:
            self.now += LOOK_S
            if self.watchdog.look(EngineLoad(1, 0, 5, steps, due), self.now):
                return self.now - start
        return None


def test_an_engine_that_makes_no_step_for_its_requests_hangs():
    looks = Looks(10.0)
    assert looks.until_stuck(60.0, steps=7, due=1) == pytest.approx(10.0, abs=2 * LOOK_S)


def test_an_engine_that_makes_steps_does_not_hang_however_slow_they_are():
    looks = Looks(10.0)
    assert [looks.until_stuck(9.0, steps=steps, due=1) for steps in range(1, 20)] == [None] * 19


def test_an_idle_engine_does_not_hang():
    assert Looks().until_stuck(1000.0, steps=7, due=0) is None


def test_requests_that_give_up_do_not_hide_a_hang():
    looks = Looks(10.0)
    for _ in range(2):
        assert looks.until_stuck(4.0, steps=7, due=1) is None
        assert looks.until_stuck(20.0, steps=7, due=0) is None
    assert looks.until_stuck(4.0, steps=7, due=1) is not None


def test_the_first_step_may_take_longer():
    assert Looks(10.0).until_stuck(10.0 * FIRST_STEP_SHARE - 1, steps=0, due=1) is None
    assert Looks(10.0).until_stuck(10.0 * FIRST_STEP_SHARE + 1, steps=0, due=1) is not None


def test_time_in_which_the_worker_was_suspended_itself_does_not_count():
    looks = Looks(10.0)
    assert looks.until_stuck(5.0, steps=7, due=1) is None
    looks.now += 3600.0
    assert looks.until_stuck(2.0, steps=7, due=1) is None


def test_a_limit_of_0_finds_nothing():
    assert Looks(0.0).until_stuck(1000.0, steps=7, due=1) is None


async def test_the_simulator_shows_that_it_hangs_and_that_it_goes_on(sim_pair: PairMaker):
    engine = (await sim_pair(sim_itl_ms=1.0)).decode
    task = DecodeTask("one", 1, prompt_of(40, 1), SamplingParams(max_tokens=500, temperature=0.0), None, 5.0)
    made: list[int] = []
    done = asyncio.ensure_future(engine.decode(task, lambda output: made.extend(output.token_ids)))
    async with asyncio.timeout(10):
        while len(made) < 10:
            await asyncio.sleep(0.01)
        engine.hang()
        await asyncio.sleep(0.05)  # The step at hand may end.
        before = engine.load()
        await asyncio.sleep(0.1)
        load = engine.load()
        assert (load.steps, load.due) == (before.steps, 1)
        engine.go_on()
        await done
    assert engine.load().due == 0
    assert engine.load().steps > before.steps


async def test_an_engine_that_is_given_up_fails_its_requests(sim_pair: PairMaker):
    engine = (await sim_pair(sim_itl_ms=1.0)).decode
    engine.hang()
    task = DecodeTask("one", 1, prompt_of(40, 1), SamplingParams(max_tokens=500), None, 5.0)
    done = asyncio.ensure_future(engine.decode(task, lambda _: None))
    await asyncio.sleep(0)
    engine.break_down("it hangs")
    async with asyncio.timeout(5):
        with pytest.raises(EngineDead, match="it hangs"):
            await done
        assert "it hangs" in str(await engine.failed())
