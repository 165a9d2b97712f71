"""Virtual time: order, jumps, processes that pause and die, and no way out into the real world."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from hocket.lab.log import EventLog, first_difference
from hocket.lab.loop import Deadlock, Process, VirtualLoop, run


def test_time_jumps_to_the_next_timer_and_equal_times_keep_their_order():
    async def main(loop: VirtualLoop) -> list[tuple[float, str]]:
        seen: list[tuple[float, str]] = []
        for name, delay_s in (("late", 3600.0), ("first", 1.0), ("second", 1.0)):
            loop.call_later(delay_s, lambda name=name: seen.append((loop.time(), name)))
        await asyncio.sleep(7200)
        return [*seen, (loop.time(), "end")]

    assert run(main) == [(1.0, "first"), (1.0, "second"), (3600.0, "late"), (7200.0, "end")]


def test_a_wait_that_nothing_can_end_is_an_error():
    async def main(loop: VirtualLoop) -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock, match="nothing is left to happen at 0 s"):
        run(main)


def test_waiting_for_time_without_a_timer_is_an_error():
    async def main(loop: VirtualLoop) -> None:
        while loop.time() < 1:
            await asyncio.sleep(0)

    with pytest.raises(Deadlock, match="without a timer"):
        run(main)


def test_what_would_be_a_thread_runs_here():
    async def main(loop: VirtualLoop) -> list[int]:
        return [await asyncio.to_thread(threading.get_ident), threading.get_ident()]

    there, here = run(main)
    assert there == here


def test_the_network_is_refused():
    async def main(loop: VirtualLoop) -> None:
        await asyncio.open_connection("127.0.0.1", 1)

    with pytest.raises(RuntimeError, match="no network on virtual time"):
        run(main)


async def tick(seen: list[float], loop: VirtualLoop) -> None:
    try:
        while True:
            await asyncio.sleep(1)
            seen.append(loop.time())
    finally:
        seen.append(-1.0)


def test_a_paused_process_does_nothing_and_then_catches_up():
    async def main(loop: VirtualLoop) -> tuple[list[float], list[float]]:
        stopped, other = Process(loop, "stopped"), Process(loop, "other")
        seen: tuple[list[float], list[float]] = ([], [])
        stopped.start(tick(seen[0], loop), "tick")
        other.start(tick(seen[1], loop), "tick")
        await asyncio.sleep(1.5)
        stopped.pause()
        await asyncio.sleep(3)
        stopped.resume()
        await asyncio.sleep(1.25)
        return list(seen[0]), list(seen[1])

    stopped, other = run(main)
    assert stopped == [1.0, 4.5, 5.5]
    assert other == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_killed_process_runs_not_even_its_cleanup_and_leaves_nothing_open():
    async def main(loop: VirtualLoop) -> tuple[list[float], int]:
        process = Process(loop, "killed")
        seen: list[float] = []
        task = process.start(tick(seen, loop), "tick")
        await asyncio.sleep(1.5)
        process.kill()
        task.cancel()
        await asyncio.sleep(10)
        return list(seen), len(loop.open_tasks())

    assert run(main) == ([1.0], 1)  # The main task itself.


def test_what_a_process_starts_belongs_to_it():
    async def main(loop: VirtualLoop) -> list[float]:
        process = Process(loop, "parent")
        seen: list[float] = []

        async def parent() -> None:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(tick(seen, loop))

        process.start(parent(), "parent")
        await asyncio.sleep(2.5)
        process.kill()
        await asyncio.sleep(5)
        return seen[:]

    assert run(main) == [1.0, 2.0]


GROUP = """
import asyncio
from hocket.lab.loop import run

async def main(loop):
    order = []
    async def one(name):
        try:
            await asyncio.sleep(60)
        finally:
            order.append(name)
    async def fail():
        raise ValueError
    padding = [object() for _ in range(hash("x") % 1000)]
    try:
        async with asyncio.TaskGroup() as tasks:
            for name in "abcdefghij":
                tasks.create_task(one(name))
            await asyncio.sleep(0)
            tasks.create_task(fail())
    except* ValueError:
        pass
    return "".join(order)

print(run(main))
"""


def test_a_group_of_tasks_is_cancelled_in_the_same_order_in_every_process():
    outputs = {subprocess.run([sys.executable, "-c", GROUP], capture_output=True, text=True).stdout for _ in range(4)}
    assert outputs == {"abcdefghij\n"}


def test_two_logs_are_compared_to_their_first_difference():
    log = EventLog(lambda: 1.5)
    log.add("router-1", "started")
    log.add("decode-2", "killed")
    assert log.lines[0] == "   1.500000 router-1       started"
    assert first_difference(log.lines, log.lines) == ""
    shown = first_difference(log.lines, [log.lines[0], "other"], context=1)
    assert shown.splitlines() == ["line 2:", "  " + log.lines[0], "- " + log.lines[1], "+ other"]
    assert "(ends here)" in first_difference(log.lines, log.lines[:1])
