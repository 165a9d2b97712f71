"""NIXL as a method of `kv_handoff.py`: WRITE over its UCX backend, one descriptor a block, prepared once for the whole pool.

`pip install --no-deps --target DIR nixl-cu12` (or `nixl-cu13`), then `kv_handoff.py --nixl-site DIR`. It brings a UCX of its
own, 1.23, which lives beside ours. The agent has no progress thread: that one takes a whole core on each side, also idle, and
made every transfer slower here. NIXL has no digest, and nothing tells the receiver but a notification that it polls for.
"""

from __future__ import annotations

import asyncio
import time
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
from handoff_cases import Arena, Case
from handoff_methods import NIXL_POLL_S, Facts, Sink, Source, until

Descriptors = npt.NDArray[np.uint64]


def nixl_api() -> Any:  # The wheel has no types that mypy finds.
    """Its Python module. Raises ImportError."""
    try:
        return import_module("nixl_cu13._api")
    except ImportError:
        return import_module("nixl_cu12._api")


class Agent:
    """One process's agent with all of its KV memory registered; made before our own UCX, which sets variables."""

    def __init__(self, arena: Arena, name: str) -> None:
        api = nixl_api()
        self.arena = arena
        self.nixl = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=False))
        self._registered = self.nixl.register_memory([(arena.address, arena.nbytes, arena.gpu, "")], arena.kind)
        self._peers: dict[bytes, str] = {}

    def facts(self) -> Facts:
        return Facts(agent=self.nixl.get_agent_metadata(), memory=self.arena.address, gpu=self.arena.gpu)

    def peer(self, theirs: Facts) -> str:
        """The name of the other agent, made known once."""
        if theirs.agent not in self._peers:
            self._peers[theirs.agent] = self.nixl.add_remote_agent(theirs.agent)
        return self._peers[theirs.agent]

    def prepared(self, case: Case, agent: str, address: int, gpu: int) -> Any:  # NIXL's own handle
        """A list of every block of the case, or of the run as one."""
        if case.is_one_run:
            descriptors: Descriptors = np.array([[address, case.kv_bytes, gpu]], np.uint64)
        else:
            count = case.layers * case.blocks
            descriptors = np.zeros((count, 3), np.uint64)
            descriptors[:, 0] = np.uint64(address) + np.arange(count, dtype=np.uint64) * np.uint64(case.block_bytes)
            descriptors[:, 1] = case.block_bytes
            descriptors[:, 2] = gpu
        return self.nixl.prep_xfer_dlist(agent, self.nixl.get_xfer_descs(descriptors, self.arena.kind))

    def was_told(self) -> bool:
        return bool(self.nixl.get_new_notifs())

    async def idle(self, seconds: float) -> None:
        """There is no event to wait for, so whoever waits polls."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.was_told()
            await asyncio.sleep(NIXL_POLL_S)


def _entries(case: Case, side: str) -> npt.NDArray[np.int32]:
    """Which entries of a prepared list, in the prompt's order."""
    if case.is_one_run:
        return np.zeros(1, np.int32)
    layers = np.arange(case.layers, dtype=np.int32)[:, None] * case.blocks
    return (layers + np.array(case.block_ids(side), np.int32)).reshape(-1).astype(np.int32)


class NixlSource(Source):
    """Ahead: the transfer is put together already (`make_prepped_xfer`)."""

    def __init__(self, case: Case, agent: Agent) -> None:
        self._case, self._agent = case, agent
        self._handle: Any = None  # NIXL's own

    async def open(self, theirs: Facts) -> Facts:
        agent, case = self._agent, self._case
        peer = agent.peer(theirs)
        self._lists = (
            agent.prepared(case, "NIXL_INIT_AGENT", agent.arena.address, agent.arena.gpu),
            agent.prepared(case, peer, theirs.memory, theirs.gpu),
        )
        self._entries = _entries(case, "prefill"), _entries(case, "decode")
        return agent.facts()

    async def prepare(self, theirs: Facts, *, ahead: bool) -> None:
        self._handle = self._make() if ahead else None

    def _make(self) -> Any:  # NIXL's own handle
        return self._agent.nixl.make_prepped_xfer(
            "WRITE", self._lists[0], self._entries[0], self._lists[1], self._entries[1], b"d"
        )

    async def send(self) -> float:
        return await asyncio.to_thread(self._send)

    def _send(self) -> float:
        self._agent.arena.enter()
        started = time.perf_counter()
        handle = self._handle or self._make()
        state = self._agent.nixl.transfer(handle)

        def is_done() -> bool:
            nonlocal state
            if state == "PROC":
                state = self._agent.nixl.check_xfer_state(handle)
            return bool(state != "PROC")

        until(is_done, "end of a write")
        if state != "DONE":
            raise RuntimeError(f"the write ended as {state}")
        until(self._agent.was_told, "answer")  # The notification leaves only while its sender makes progress.
        handle.release()
        return started

    async def idle(self, seconds: float) -> None:
        await self._agent.idle(seconds)


class NixlSink(Sink):
    """The peer writes; a notification says that it has."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def open(self) -> Facts:
        return self._agent.facts()

    async def accept(self, theirs: Facts) -> None:
        self._peer = self._agent.peer(theirs)

    async def receive(self) -> float:
        return await asyncio.to_thread(self._receive)

    def _receive(self) -> float:
        self._agent.arena.enter()
        until(self._agent.was_told, "notification")
        at = time.perf_counter()
        self._agent.nixl.send_notif(self._peer, b"a")
        end = time.monotonic() + NIXL_POLL_S
        while time.monotonic() < end:
            self._agent.was_told()
        return at

    async def idle(self, seconds: float) -> None:
        await self._agent.idle(seconds)
