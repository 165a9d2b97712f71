"""The embedded nats-server: its password, its store, its end."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
from pathlib import Path

import pytest

from hocket.bus import BusError, EmbeddedServer, NatsBus
from hocket.bus.server import find_binary


def is_alive(pid: int) -> bool:
    """Running, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until_dead(pid: int) -> None:
    async with asyncio.timeout(10):
        while is_alive(pid):
            await asyncio.sleep(0.01)


async def test_a_temporary_store_is_removed_at_the_end() -> None:
    async with EmbeddedServer() as server:
        folder, pid = server.log_path.parent, server.pid
        assert folder.exists()
    assert not folder.exists()
    assert not is_alive(pid)


async def test_a_store_of_ones_own_stays(tmp_path: Path) -> None:
    store = tmp_path / "state" / "nats"
    async with EmbeddedServer(store):
        pass
    assert (store / "jetstream").is_dir()
    async with EmbeddedServer(store) as server:
        bus = NatsBus(server.url, name="test")
        await bus.connect()
        await bus.aclose()


async def test_the_password_is_needed_and_stands_in_no_command_line(server: EmbeddedServer) -> None:
    password = server.url.partition("@")[0].rpartition(":")[2]
    assert len(password) >= 32
    assert password.encode() not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
    assert password.encode() not in Path(f"/proc/{server.pid}/environ").read_bytes()
    config = server.log_path.parent / "nats-server.conf"
    assert password in config.read_text()
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    with pytest.raises(BusError, match="Authorization"):
        await NatsBus(f"nats://{server.address}", name="test").connect()


async def test_a_second_server_on_one_store_is_refused(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path):
        with pytest.raises(BusError, match=r"is in use by another nats-server"):
            await EmbeddedServer(tmp_path).start()
    async with EmbeddedServer(tmp_path):
        pass


async def test_a_server_that_was_killed_comes_back_at_its_address(tmp_path: Path) -> None:
    async with EmbeddedServer(tmp_path) as server:
        url = server.url
        exited = asyncio.create_task(server.wait_exit())
        os.kill(server.pid, signal.SIGKILL)
        async with asyncio.timeout(5):
            assert (await exited).startswith("nats-server ended with SIGKILL")
        await server.start()
        assert server.url == url
        bus = NatsBus(url, name="test")
        await bus.connect()
        await bus.aclose()


async def test_an_early_end_is_told_in_the_servers_own_words(tmp_path: Path) -> None:
    (tmp_path / "jetstream").write_text("not a folder")
    with pytest.raises(
        BusError, match="nats-server ended with exit code 1 at its start; its log says: .*storage directory is not"
    ):
        await EmbeddedServer(tmp_path).start()


async def test_a_taken_port_is_told(server: EmbeddedServer, tmp_path: Path) -> None:
    with pytest.raises(BusError, match="address already in use"):
        await EmbeddedServer(tmp_path, port=int(server.address.rpartition(":")[2])).start()


async def test_a_store_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BusError, match="cannot use .*file/store as a store"):
        await EmbeddedServer(tmp_path / "file" / "store").start()


async def test_the_binary_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "nats-server"
    own.symlink_to(find_binary())
    monkeypatch.setenv("NATS_SERVER_BIN", str(own))
    assert find_binary() == str(own)
    async with EmbeddedServer():
        pass


async def test_a_cancelled_start_leaves_no_process(tmp_path: Path) -> None:
    for delay_s in (0.0, 0.005, 0.02):
        server = EmbeddedServer(tmp_path)
        start = asyncio.create_task(server.start())
        await asyncio.sleep(delay_s)
        start.cancel()
        try:
            await start
        except asyncio.CancelledError:
            pass
        else:
            await server.stop()
    async with EmbeddedServer(tmp_path):  # The lock is free: nobody lives.
        pass


PARENT = """
import asyncio, sys
from pathlib import Path
from hocket.bus import EmbeddedServer
async def main():
    async with EmbeddedServer(Path(sys.argv[1])) as server:
        print(server.pid, server.url, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


async def start_parent(store: Path) -> tuple[asyncio.subprocess.Process, int]:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(store), stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    assert parent.stdout is not None
    async with asyncio.timeout(20):
        line = await parent.stdout.readline()
    return parent, int(line.split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux only")
async def test_the_server_dies_with_its_parent_and_frees_its_store(tmp_path: Path) -> None:
    parent, pid = await start_parent(tmp_path)
    try:
        assert is_alive(pid)
        parent.kill()
        await parent.wait()
        async with EmbeddedServer(tmp_path):  # waits for the old one's lock
            assert not is_alive(pid)
        await until_dead(pid)
    finally:
        if parent.returncode is None:
            parent.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
async def test_ctrl_c_does_not_reach_the_server(tmp_path: Path) -> None:
    parent, pid = await start_parent(tmp_path)
    try:
        assert os.getpgid(pid) != os.getpgid(parent.pid)
        assert os.getsid(pid) != os.getsid(parent.pid)
    finally:
        parent.kill()
        await parent.wait()
    await until_dead(pid)
