"""What holds vLLM's processes to their front end: the reaper, and the side channel."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import pytest

from hocket.transport.base import HandoffKey
from hocket.workers.engines.vllm import reaper
from hocket.workers.engines.vllm.side_channel import AbortSend, FrontEnd, Hello, Note, SendEnded

KEY = HandoffKey(b"k" * 16, 1, 1)
CONNECTOR = textwrap.dedent(
    """
    import queue, sys
    from hocket.transport.base import HandoffKey
    from hocket.workers.engines.vllm.side_channel import ConnectorEnd, SendEnded
    notes = queue.Queue()
    end = ConnectorEnd(sys.argv[1], "worker", notes.put)
    note = notes.get(timeout=30)
    end.send(SendEnded(note.key, False, 5, note.reason))
    notes.get(timeout=30)
    """
)


async def start_reaper(mark: str, folder: Path) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", reaper.__file__, mark, str(folder), stdin=subprocess.PIPE, start_new_session=True
    )


async def start_tree(mark: str) -> tuple[asyncio.subprocess.Process, int]:
    """A shell with a child; both carry the mark. Returns the shell and the child's pid."""
    name, _, value = mark.partition("=")
    shell = await asyncio.create_subprocess_exec(
        "/bin/sh", "-c", "sleep 60 & echo $!; wait", env={**os.environ, name: value}, stdout=subprocess.PIPE
    )
    assert shell.stdout
    return shell, int(await shell.stdout.readline())


async def gone(pid: int) -> None:
    while os.path.exists(f"/proc/{pid}") and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]:
        await asyncio.sleep(0.01)


async def test_the_reaper_ends_the_whole_tree_when_its_pipe_closes(tmp_path: Path) -> None:
    mark = f"HOCKET_ENGINE={uuid.uuid4().hex}"
    watcher = await start_reaper(mark, tmp_path)
    shell, child = await start_tree(mark)
    assert watcher.stdin
    watcher.stdin.close()
    async with asyncio.timeout(20):
        await watcher.wait()
        await shell.wait()
        await gone(child)
    assert reaper.marked(mark.encode()) == []
    assert not tmp_path.exists()


async def test_the_reaper_leaves_other_engines_alone(tmp_path: Path) -> None:
    mark = f"HOCKET_ENGINE={uuid.uuid4().hex}"
    watcher = await start_reaper(mark + "x", tmp_path / "none")
    shell, child = await start_tree(mark)
    assert watcher.stdin
    watcher.stdin.close()
    async with asyncio.timeout(20):
        await watcher.wait()
        assert sorted(reaper.marked(mark.encode())) == sorted([shell.pid, child])
        reaper.reap(mark.encode())
        await shell.wait()


class Recorder:
    """What the front end hears."""

    def __init__(self) -> None:
        self.notes: asyncio.Queue[Note] = asyncio.Queue()
        self.lost: asyncio.Queue[str] = asyncio.Queue()
        self.channel = FrontEnd(self.notes.put_nowait, self.lost.put_nowait)


@pytest.fixture
async def connected(tmp_path: Path) -> tuple[Recorder, asyncio.subprocess.Process]:
    """A front end and a connector in another process."""
    recorder = Recorder()
    await recorder.channel.start(str(tmp_path / "side"))
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", CONNECTOR, str(tmp_path / "side"))
    async with asyncio.timeout(20):
        assert await recorder.notes.get() == Hello("worker", process.pid)
    return recorder, process


async def test_notes_go_both_ways_and_a_dead_connector_is_noticed(
    connected: tuple[Recorder, asyncio.subprocess.Process],
) -> None:
    recorder, process = connected
    recorder.channel.send(AbortSend(KEY, "test"))
    async with asyncio.timeout(20):
        assert await recorder.notes.get() == SendEnded(KEY, False, 5, "test")
        process.kill()
        assert await recorder.lost.get() == "worker"
        await process.wait()
    recorder.channel.close()


async def test_a_connector_whose_front_end_is_gone_ends_itself(
    connected: tuple[Recorder, asyncio.subprocess.Process],
) -> None:
    recorder, process = connected
    recorder.channel.close()
    async with asyncio.timeout(20):
        assert await process.wait() == 1
