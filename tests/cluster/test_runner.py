"""The runner with real child processes: small scripts that die, hang, ignore SIGTERM or start processes of their own."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from hocket.cluster.guard import members
from hocket.cluster.runner import ChildPlan, Console, ReadyLines, Runner
from hocket.cluster.supervision import Limits

PRELUDE = "import json, os, signal, subprocess, sys, time\nsettings = json.load(sys.stdin)\n"
SAY_READY = "print(json.dumps({'ready': 'x', 'pid': str(os.getpid())}), flush=True)\n"
SLEEP = "time.sleep(60)\n"
IGNORE_SIGTERM = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
GRANDCHILD = "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
LIMITS = Limits(start_timeout_s=5.0, stop_s=(0.5, 0.5), deaths_max=2, deaths_window_s=60.0)


def script(name: str, body: str, *, group: int = 0, **settings: object) -> ChildPlan:
    return ChildPlan(name, group, [sys.executable, "-S", "-c", PRELUDE + body], settings)


def runner(tmp_path: Path, *plans: ChildPlan, limits: Limits = LIMITS) -> Runner:
    return Runner(plans, limits, logs=tmp_path / "logs", console=Console("info"))


async def carry_on(_: ReadyLines) -> str:
    return ""


def then(action: Callable[[ReadyLines], None]) -> Callable[[ReadyLines], Awaitable[str]]:
    async def on_complete(lines: ReadyLines) -> str:
        action(lines)
        return ""

    return on_complete


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


async def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


async def test_children_run_until_they_are_told_to_stop(tmp_path: Path):
    run = runner(tmp_path, script("a", SAY_READY + SLEEP), script("b", SAY_READY + SLEEP, group=1))
    pids: list[int] = []

    def stop(lines: ReadyLines) -> None:
        pids.extend(int(line["pid"]) for line in lines.values())
        run.stop()

    assert await run.run(then(stop)) == 0
    assert len(pids) == 2
    assert not any(is_running(pid) for pid in pids)


async def test_settings_arrive_on_stdin_and_on_no_command_line(tmp_path: Path):
    body = "print(settings['secret'], flush=True)\n" + SAY_READY + SLEEP
    run = runner(tmp_path, script("a", body, secret="hunter2"))
    seen: list[str] = []

    def look(lines: ReadyLines) -> None:
        pid = lines["a"]["pid"]
        seen.append(Path(f"/proc/{pid}/cmdline").read_text() + Path(f"/proc/{pid}/environ").read_text())
        run.stop()

    assert await run.run(then(look)) == 0
    assert "hunter2" not in seen[0]
    assert (tmp_path / "logs" / "a.log").read_text().startswith("hunter2\n")


async def test_a_child_that_dies_at_its_start_fails_the_start_and_shows_its_last_lines(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    run = runner(tmp_path, script("a", "sys.exit('no such model')"), script("b", SAY_READY + SLEEP))
    assert await run.run(carry_on) == 1
    shown = capfd.readouterr().err
    assert "a ended while starting (exit 1)" in shown
    assert "no such model" in shown
    assert str(tmp_path / "logs" / "a.log") in shown


async def test_a_command_that_does_not_exist_fails_the_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run = runner(tmp_path, ChildPlan("a", 0, ["/no/such/program"]))
    assert await run.run(carry_on) == 1
    assert "/no/such/program" in capfd.readouterr().err


async def test_a_child_that_is_never_ready_is_killed_with_what_it_started(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    body = IGNORE_SIGTERM + GRANDCHILD + "print(os.getpid(), child.pid, flush=True)\n" + SLEEP
    limits = Limits(start_timeout_s=1.5, stop_s=(0.5, 0.5))
    run = runner(tmp_path, script("a", body), limits=limits)
    assert await run.run(carry_on) == 1
    assert "a was not ready after 1.5 s" in capfd.readouterr().err
    pids = [int(word) for word in (tmp_path / "logs" / "a.log").read_text().split()]
    assert len(pids) == 2
    assert not any(is_running(pid) for pid in pids)


async def test_a_child_that_ignores_sigterm_is_killed_after_its_time(tmp_path: Path):
    run = runner(tmp_path, script("a", IGNORE_SIGTERM + SAY_READY + SLEEP))
    stopped_s: list[float] = []

    def stop(_: ReadyLines) -> None:
        stopped_s.append(time.monotonic())
        run.stop()

    assert await run.run(then(stop)) == 0
    assert 0.5 <= time.monotonic() - stopped_s[0] < 5.0


async def test_a_second_stop_kills_at_once(tmp_path: Path):
    limits = Limits(start_timeout_s=5.0, stop_s=(60.0,))
    run = runner(tmp_path, script("a", IGNORE_SIGTERM + SAY_READY + SLEEP), limits=limits)

    def stop_twice(_: ReadyLines) -> None:
        run.stop()
        run.stop()

    async with asyncio.timeout(10.0):
        assert await run.run(then(stop_twice)) == 0


async def test_a_child_that_dies_later_is_started_again_and_its_orphans_are_ended(tmp_path: Path):
    body = GRANDCHILD + "print(child.pid, flush=True)\n" + SAY_READY + SLEEP
    run = runner(tmp_path, script("a", body))
    log = tmp_path / "logs" / "a.log"

    async def kill_it_and_wait(lines: ReadyLines) -> str:
        orphan = int(log.read_text().split()[0])
        os.kill(int(lines["a"]["pid"]), signal.SIGKILL)
        await wait_until(lambda: log.read_text().count("ready") == 2)
        run.stop()
        return "" if not is_running(orphan) else "the orphan lives"

    assert await run.run(kill_it_and_wait) == 0


async def test_a_child_that_keeps_dying_fails_the_cluster(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    run = runner(tmp_path, script("a", SAY_READY + "time.sleep(0.3)\nsys.exit(7)"), script("b", SAY_READY + SLEEP))
    assert await run.run(carry_on) == 1
    assert "a died 3 times in 60 s (last: exit 7)" in capfd.readouterr().err


async def test_an_orphan_that_left_the_session_and_holds_the_pipes_does_not_hold_the_end(tmp_path: Path):
    body = "subprocess.Popen(['setsid', 'sleep', '8'])\n" + SAY_READY + SLEEP
    run = runner(tmp_path, script("a", body))

    async def die(lines: ReadyLines) -> str:
        os.kill(int(lines["a"]["pid"]), signal.SIGTERM)
        await asyncio.sleep(0.2)
        run.stop()
        return ""

    async with asyncio.timeout(6.0):
        assert await run.run(die) == 0


async def test_only_records_of_our_own_reach_the_console(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    ours = "print('12:00:00.000 INFO    hocket.workers.worker ours', file=sys.stderr)\n"
    theirs = (
        "print('INFO 11-24 [core.py:1] theirs', file=sys.stderr)\nprint('x' * 200000, file=sys.stderr, flush=True)\n"
    )
    run = runner(tmp_path, script("a", ours + theirs + "time.sleep(0.1)\n" + SAY_READY + SLEEP))
    assert await run.run(then(lambda _: run.stop())) == 0
    shown = capfd.readouterr().err
    assert "a          | 12:00:00.000 INFO    hocket.workers.worker ours" in shown
    assert "theirs" not in shown
    kept = (tmp_path / "logs" / "a.log").read_text()
    assert "theirs" in kept
    assert kept.count("x") >= 200000


async def test_a_failure_after_all_are_ready_ends_with_exit_1(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    async def fail(_: ReadyLines) -> str:
        return "the router is not ready"

    assert await runner(tmp_path, script("a", SAY_READY + SLEEP)).run(fail) == 1
    assert "failed: the router is not ready" in capfd.readouterr().err


SUPERVISOR = """
import asyncio, sys
from pathlib import Path
from hocket.cluster.runner import ChildPlan, Console, Runner
from hocket.cluster.supervision import Limits
body = sys.argv[2]
plan = ChildPlan("a", 0, [sys.executable, "-c", body])
run = Runner([plan], Limits(30.0, (5.0,)), logs=Path(sys.argv[1]), console=Console("info"))
async def hang(_): await asyncio.sleep(60)
asyncio.run(run.run(hang))
"""


@pytest.mark.slow
async def test_nothing_is_left_after_kill_9_of_the_supervisor(tmp_path: Path):
    body = PRELUDE + IGNORE_SIGTERM + GRANDCHILD + "print(os.getpid(), child.pid, flush=True)\n" + SAY_READY + SLEEP
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SUPERVISOR, str(tmp_path), body)
    log = tmp_path / "a.log"
    await wait_until(lambda: log.exists() and "ready" in log.read_text())
    pids = [int(word) for word in log.read_text().split()[:2]]
    assert set(pids) == members(pids[:1])
    process.kill()
    await process.wait()
    await wait_until(lambda: not any(is_running(pid) for pid in pids), timeout_s=15.0)


def test_members_are_the_session_and_what_left_it():
    assert os.getpid() in members([os.getsid(0)])
    assert members([]) == set()
