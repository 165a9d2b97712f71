"""The worker side of the connector on real tensors and a real link, its hooks called as vLLM calls them; no engine."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from hocket.transport.base import Chunk, HandoffKey
from hocket.workers.engines.vllm.kv_tensors import ModelFacts, UnfitKv, pool_of
from hocket.workers.engines.vllm.scheduler import Open, Push, Receive, StepPlan
from hocket.workers.engines.vllm.side_channel import FrontEnd, Note, Ready, ReceiveEnded, SendEnded
from hocket.workers.engines.vllm.worker_side import HandoffSettings, WorkerSide

LAYERS = ("a", "b", "c")
BLOCKS = 12
FACTS = ModelFacts("model", "1", "float32", 4, "0", "CPU")
EPOCH = 5
TOKEN = b"t" * 16
KEY = HandoffKey(TOKEN, 1, 1)


def make_tensors(fill: float) -> dict[str, torch.Tensor]:
    """(blocks, heads, tokens, 2 x head size), as vLLM's layout HND."""
    return {name: torch.rand(BLOCKS, 2, 4, 6) + fill for name in LAYERS}


class Side:
    """One engine's worker side and what its front end heard."""

    def __init__(self, is_decode: bool, path: Path) -> None:
        self.notes: list[Note] = []
        self.front_end = FrontEnd(self.notes.append, lambda side: None)
        self.path = str(path)
        self.tensors = make_tensors(10.0 if is_decode else 0.0)
        self._settings = HandoffSettings(is_decode, "tcp", "127.0.0.1", "side", EPOCH)

    async def start(self) -> None:
        await self.front_end.start(self.path)
        self.hooks = await asyncio.to_thread(WorkerSide, self._settings, self.path)
        await asyncio.to_thread(self.hooks.register, self.tensors, FACTS)
        self.ready = await self.heard(Ready)

    async def heard(self, kind: type[Note]) -> Note:
        async with asyncio.timeout(5):
            while True:
                for note in self.notes:
                    if isinstance(note, kind):
                        return note
                await asyncio.sleep(0.01)

    async def aclose(self) -> None:
        await asyncio.to_thread(self.hooks.stop)
        self.front_end.close()


@pytest.fixture
async def sides(tmp_path: Path) -> AsyncIterator[tuple[Side, Side]]:
    prefill, decode = Side(False, tmp_path / "p"), Side(True, tmp_path / "d")
    await prefill.start()
    await decode.start()
    yield prefill, decode
    await prefill.aclose()
    await decode.aclose()


def open_order(decode: Side, blocks: int) -> Open:
    assert isinstance(decode.ready, Ready)
    deadline_s = time.monotonic() + 10
    return Open("p", KEY, decode.ready.addresses, EPOCH, decode.ready.layout.fingerprint(), blocks, deadline_s)


def receive(blocks: tuple[int, ...], timeout_s: float = 10.0) -> Receive:
    return Receive("d", TOKEN, 1, 0, blocks, time.monotonic() + timeout_s)


async def results_with(side: Side, kind: str) -> tuple[set[str], set[int]]:
    """Empty steps until something is over, as vLLM's loop does."""
    async with asyncio.timeout(5):
        while True:
            side.hooks.begin(StepPlan())
            side.hooks.all_saved()
            results = side.hooks.results(set())
            if getattr(results, kind):
                return getattr(results, kind), results.bad_blocks
            await asyncio.sleep(0.01)


async def test_chunks_land_also_when_only_some_layers_have_a_hook(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    decode.hooks.begin(StepPlan(receives=[receive((7, 3, 5))]))
    prefill.hooks.begin(StepPlan(opens=[open_order(decode, 3)], pushes=[Push(KEY, Chunk(0, (1, 2), is_last=False))]))
    prefill.hooks.layer_saved("b")
    prefill.hooks.layer_saved("b")
    prefill.hooks.layer_saved("a layer without KV")
    prefill.hooks.all_saved()
    assert not prefill.hooks.results(set()).sent
    prefill.hooks.begin(StepPlan(pushes=[Push(KEY, Chunk(2, (9,), is_last=True))]))
    for name in LAYERS:
        prefill.hooks.layer_saved(name)
    prefill.hooks.all_saved()
    assert await results_with(decode, "received") == ({"d"}, set())
    for name in LAYERS:
        assert torch.equal(decode.tensors[name][[7, 3, 5]], prefill.tensors[name][[1, 2, 9]])
    end = await prefill.heard(SendEnded)
    assert isinstance(end, SendEnded)
    assert end.is_landed
    assert not prefill.hooks.results(set()).sent, "reported before vLLM said that the request has ended"
    assert prefill.hooks.results({"p", "another"}).sent == {"p"}
    assert not prefill.hooks.results({"p"}).sent


async def test_kv_that_does_not_come_is_reported_with_its_blocks(sides: tuple[Side, Side]) -> None:
    _, decode = sides
    decode.hooks.begin(StepPlan(receives=[receive((7, 3, 5), timeout_s=0.2)]))
    assert await results_with(decode, "received") == ({"d"}, {7, 3, 5})
    end = await decode.heard(ReceiveEnded)
    assert isinstance(end, ReceiveEnded)
    assert (end.is_landed, end.good_blocks, end.reason) == (False, 0, "timeout")


async def test_a_token_that_is_expected_twice_fails_the_second_request_only(sides: tuple[Side, Side]) -> None:
    _, decode = sides
    decode.hooks.begin(StepPlan(receives=[receive((1, 2))]))
    second = Receive("e", TOKEN, 1, 0, (3, 4), time.monotonic() + 10)
    decode.hooks.begin(StepPlan(receives=[second]))
    assert await results_with(decode, "received") == ({"e"}, {3, 4})


async def test_a_preemption_waits_until_nothing_reads_the_blocks(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    prefill.hooks.begin(StepPlan(opens=[open_order(decode, 3)], pushes=[Push(KEY, Chunk(0, (1, 2), is_last=False))]))
    prefill.hooks.all_saved()
    await asyncio.to_thread(prefill.hooks.preempted, StepPlan(preempted=[KEY]))
    for name in LAYERS:
        prefill.tensors[name].zero_()  # Somebody else's KV.
    decode.hooks.begin(StepPlan(receives=[receive((7, 3, 5), timeout_s=0.5)]))
    received, bad_blocks = await results_with(decode, "received")
    assert (received, bad_blocks) == ({"d"}, {7, 3, 5})
    assert prefill.hooks.results({"p"}).sent == {"p"}


async def test_an_order_that_cannot_be_opened_ends_as_one_that_failed(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    good = open_order(decode, 1)
    order = Open("p", KEY, (), EPOCH, good.fingerprint, 1, good.deadline_s)
    prefill.hooks.begin(StepPlan(opens=[order], pushes=[Push(KEY, Chunk(0, (1,), is_last=True))]))
    prefill.hooks.all_saved()
    end = await prefill.heard(SendEnded)
    assert isinstance(end, SendEnded)
    assert not end.is_landed
    async with asyncio.timeout(5):
        while prefill.hooks.results({"p"}).sent != {"p"}:
            await asyncio.sleep(0.01)


def test_the_hooks_left_no_thread_behind() -> None:
    assert not [thread for thread in threading.enumerate() if thread.name == "kv-handoff"]


def test_equal_tensors_have_equal_fingerprints_and_other_ones_do_not() -> None:
    fingerprint = pool_of(make_tensors(0), FACTS).layout.fingerprint()
    assert pool_of(make_tensors(1), FACTS).layout.fingerprint() == fingerprint
    half = {name: tensor.half() for name, tensor in make_tensors(0).items()}
    assert pool_of(half, FACTS).layout.fingerprint() != fingerprint
    other = ModelFacts("model", "2", "float32", 4, "0", "CPU")
    assert pool_of(make_tensors(0), other).layout.fingerprint() != fingerprint


def test_the_pool_is_the_tensors_themselves_also_when_blocks_lie_apart() -> None:
    packed = torch.zeros(BLOCKS, 2, 2, 4, 6)
    tensors = {"a": packed[:, 0], "b": packed[:, 1]}
    pool = pool_of(tensors, FACTS)
    source = os.urandom(pool.layout.layer_block_bytes[1])
    pool.buffers(1, [3])[0][:] = memoryview(source)
    assert packed[3, 1].numpy().tobytes() == source
    assert not packed[3, 0].any()


def test_layers_that_share_memory_travel_once() -> None:
    tensors = make_tensors(0)
    assert pool_of({**tensors, "alias of a": tensors["a"]}, FACTS).layout.layer_names == LAYERS


def test_scattered_blocks_and_other_shapes_are_refused() -> None:
    tensor = torch.zeros(BLOCKS, 2, 4, 6)
    with pytest.raises(UnfitKv, match="scattered"):
        pool_of({"a": tensor.transpose(1, 2)}, FACTS)
    with pytest.raises(UnfitKv, match="shape"):
        pool_of({"a": tensor.flatten(2)}, FACTS)
    with pytest.raises(UnfitKv, match="several tensors"):
        pool_of({"a": [tensor, tensor]}, FACTS)  # type: ignore[dict-item]  # What vLLM gives for a Mamba layer.
