"""A nats-server and the demo model for every test here; pools are built by the tests."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hocket.bus.server import EmbeddedServer
from hocket.cluster.model import resolve_model

sys.path.insert(0, str(Path(__file__).parent))  # For `pool`: with import-mode=importlib nothing else adds it.


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's folder (`make` fetches it before the tests)."""
    return resolve_model("demo")


@pytest.fixture(scope="session")
def nats_url() -> Iterator[str]:
    """One server for all pools here; each pool has a name of its own."""
    with asyncio.Runner() as runner:
        server = EmbeddedServer()
        runner.run(server.start())
        yield server.url
        runner.run(server.stop())


class OwnServer:
    """A nats-server that a test may restart."""

    def __init__(self, server: EmbeddedServer) -> None:
        self._server = server

    @property
    def url(self) -> str:
        return self._server.url

    async def restart(self) -> None:
        """Down and up again on the same port and store."""
        await self._server.stop()
        await self._server.start()


@pytest.fixture
async def nats_server_of_its_own(tmp_path: Path) -> AsyncIterator[OwnServer]:
    async with EmbeddedServer(tmp_path) as server:
        yield OwnServer(server)
