"""The worker side of the connector on real tensors and a real link, its hooks called as vLLM calls them; no engine."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hocket.transport.base import Chunk, Cut, Extent, GroupBlocks, HandoffKey
from hocket.transport.errors import HandoffRefused, LinkLost
from hocket.transport.layout import KvGroup
from hocket.workers.engines.vllm.kv_tensors import KvGroupFacts, ModelFacts, UnfitKv, pool_of
from hocket.workers.engines.vllm.link_probes import ProbeQuestions
from hocket.workers.engines.vllm.scheduler import Open, Push, Receive, StepPlan
from hocket.workers.engines.vllm.side_channel import (
    FrontEnd,
    Note,
    ProbeAsked,
    ProbeEnded,
    RankFailed,
    Ready,
    ReceiveEnded,
    SendEnded,
)
from hocket.workers.engines.vllm.worker_side import HandoffSettings, WorkerSide

LAYERS = ("a", "b", "c")
BLOCKS = 12
BLOCK_TOKENS = 4
FULL = KvGroupFacts(KvGroup(), BLOCK_TOKENS, frozenset(LAYERS), frozenset())
FACTS = ModelFacts("model", "1", "float32", (FULL,), "0", "CPU", kv_heads=2)
WINDOWED = replace(
    FACTS,
    groups=(
        KvGroupFacts(KvGroup("window", 6), BLOCK_TOKENS, frozenset("a"), frozenset()),
        KvGroupFacts(KvGroup(), BLOCK_TOKENS, frozenset("bc"), frozenset()),
    ),
)
EPOCH = 5
TOKEN = b"t" * 16
KEY = HandoffKey(TOKEN, 1, 1)


def make_tensors(fill: float) -> dict[str, torch.Tensor]:
    """(blocks, heads, tokens, 2 x head size), as vLLM's layout HND."""
    return {name: torch.rand(BLOCKS, 2, 4, 6) + fill for name in LAYERS}


class Side:
    """One engine's worker side and what its front end heard."""

    def __init__(
        self, is_decode: bool, path: Path, facts: ModelFacts = FACTS, *, reports_failed_loads: bool = True
    ) -> None:
        self.facts = facts
        self.notes: list[Note] = []
        self.notes_listener: Callable[[Note], None] = lambda note: None
        self.front_end = FrontEnd(self.on_note, lambda side: None)
        self.path = str(path)
        self.tensors = make_tensors(10.0 if is_decode else 0.0)
        self._settings = HandoffSettings(
            is_decode, "tcp", "127.0.0.1", "side", EPOCH, 64 << 20, False, reports_failed_loads
        )

    def on_note(self, note: Note) -> None:
        self.notes.append(note)
        self.notes_listener(note)

    async def start(self) -> None:
        await self.front_end.start(self.path)
        self.hooks = await asyncio.to_thread(WorkerSide, self._settings, self.path)
        await asyncio.to_thread(self.hooks.register, self.tensors, self.facts)
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
    fingerprint = decode.ready.layout.fingerprint()
    return Open("p", KEY, decode.ready.addresses, EPOCH, fingerprint, blocks * BLOCK_TOKENS, deadline_s, 0)


def push(first_block: int, *rows: tuple[int, ...]) -> Push:
    """Whole blocks, of each group the last ones."""
    end_block = first_block + max(map(len, rows))
    groups = tuple(GroupBlocks(end_block - len(row), row) for row in rows)
    return Push(KEY, Chunk(first_block * BLOCK_TOKENS, end_block * BLOCK_TOKENS, groups))


def receive(*rows: tuple[int, ...], timeout_s: float = 10.0, request_id: str = "d", token: bytes = TOKEN) -> Receive:
    end_block = max(map(len, rows))
    groups = tuple(GroupBlocks(end_block - len(row), row) for row in rows)
    return Receive(request_id, token, 1, groups, 0, end_block * BLOCK_TOKENS, time.monotonic() + timeout_s)


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
    prefill.hooks.begin(StepPlan(opens=[open_order(decode, 3)], pushes=[push(0, (1, 2))]))
    prefill.hooks.layer_saved("b")
    prefill.hooks.layer_saved("b")
    prefill.hooks.layer_saved("a layer without KV")
    prefill.hooks.all_saved()
    assert not prefill.hooks.results(set()).sent
    prefill.hooks.begin(StepPlan(pushes=[push(2, (9,))]))
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
    assert (end.is_landed, end.valid_token, end.reason) == (False, 0, "timeout")


async def heard_in_time(side: Side) -> None:
    """What was sent to this side before has been read."""
    side.front_end.send(ProbeAsked(1, ("tcp://127.0.0.1:1",), EPOCH, 1))
    await side.heard(ProbeEnded)


@pytest.mark.parametrize("is_early", [True, False])
async def test_a_receive_that_failed_in_another_rank_is_given_up_here(sides: tuple[Side, Side], is_early: bool) -> None:
    _, decode = sides
    expected = StepPlan(receives=[receive((7, 3, 5))])
    if not is_early:
        decode.hooks.begin(expected)
    decode.front_end.send(RankFailed(TOKEN, "digest"))
    await heard_in_time(decode)
    if is_early:
        decode.hooks.begin(expected)
    assert await results_with(decode, "received") == ({"d"}, {7, 3, 5})
    end = await decode.heard(ReceiveEnded)
    assert isinstance(end, ReceiveEnded)
    assert (end.is_landed, end.reason) == (False, "cancelled")


@pytest.mark.parametrize("is_early", [True, False])
async def test_a_send_that_failed_in_another_rank_is_given_up_here(sides: tuple[Side, Side], is_early: bool) -> None:
    prefill, decode = sides
    opened = StepPlan(opens=[open_order(decode, 3)], pushes=[push(0, (1, 2))])
    if not is_early:
        prefill.hooks.begin(opened)
    prefill.front_end.send(RankFailed(KEY, "link_lost"))
    await heard_in_time(prefill)
    if is_early:
        prefill.hooks.begin(opened)
    end = await prefill.heard(SendEnded)
    assert isinstance(end, SendEnded)
    assert (end.is_landed, end.reason) == (False, "link_lost")
    async with asyncio.timeout(5):
        while prefill.hooks.results({"p"}).sent != {"p"}:
            await asyncio.sleep(0.01)


async def test_a_token_that_is_expected_twice_fails_the_second_request_only(sides: tuple[Side, Side]) -> None:
    _, decode = sides
    decode.hooks.begin(StepPlan(receives=[receive((1, 2))]))
    second = receive((3, 4), request_id="e")
    decode.hooks.begin(StepPlan(receives=[second]))
    assert await results_with(decode, "received") == ({"e"}, {3, 4})


async def test_a_preemption_waits_until_nothing_reads_the_blocks(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    prefill.hooks.begin(StepPlan(opens=[open_order(decode, 3)], pushes=[push(0, (1, 2))]))
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
    order = replace(good, addresses=())
    prefill.hooks.begin(StepPlan(opens=[order], pushes=[push(0, (1,))]))
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
    other = replace(FACTS, revision="2")
    assert pool_of(make_tensors(0), other).layout.fingerprint() != fingerprint


# Several groups: each layer has blocks of its own group only.


@pytest.fixture
async def windowed_sides(tmp_path: Path) -> AsyncIterator[tuple[Side, Side]]:
    prefill, decode = Side(False, tmp_path / "p", WINDOWED), Side(True, tmp_path / "d", WINDOWED)
    await prefill.start()
    await decode.start()
    yield prefill, decode
    await prefill.aclose()
    await decode.aclose()


async def test_each_group_gets_its_own_blocks_and_no_more_than_its_window(windowed_sides: tuple[Side, Side]) -> None:
    prefill, decode = windowed_sides
    before = {name: tensor.clone() for name, tensor in decode.tensors.items()}
    decode.hooks.begin(StepPlan(receives=[receive((3,), (7, 5, 9))]))
    prefill.hooks.begin(StepPlan(opens=[open_order(decode, 3)], pushes=[push(0, (4, 8), (1, 2))]))
    prefill.hooks.all_saved()
    prefill.hooks.begin(StepPlan(pushes=[push(2, (6,), (10,))]))
    prefill.hooks.all_saved()
    assert await results_with(decode, "received") == ({"d"}, set())
    wanted = {"a": ([3], [6]), "b": ([7, 5, 9], [1, 2, 10]), "c": ([7, 5, 9], [1, 2, 10])}
    for name, (to_ids, from_ids) in wanted.items():
        before[name][to_ids] = prefill.tensors[name][from_ids]
        assert torch.equal(decode.tensors[name], before[name])


async def test_a_block_that_is_wanted_and_not_there_ends_the_hand_off(windowed_sides: tuple[Side, Side]) -> None:
    prefill, decode = windowed_sides
    decode.hooks.begin(StepPlan(receives=[receive((3, 4), (7, 5, 9), timeout_s=0.5)]))
    prefill.hooks.begin(StepPlan(opens=[open_order(decode, 3)], pushes=[push(0, (6,), (1, 2, 10))]))
    prefill.hooks.all_saved()
    end = await prefill.heard(SendEnded)
    assert isinstance(end, SendEnded)
    assert (end.is_landed, end.reason) == (False, "missing_blocks")


async def test_with_windows_a_failed_load_is_told_of_the_request_and_of_no_block(
    windowed_sides: tuple[Side, Side],
) -> None:
    _, decode = windowed_sides
    decode.hooks.begin(StepPlan(receives=[receive((3,), (7, 5, 9), timeout_s=0.2)]))
    async with asyncio.timeout(5):
        while not (results := decode.hooks.results(set())).received:
            await asyncio.sleep(0.01)
    assert (results.received, results.failed, results.bad_blocks) == ({"d"}, {"d"}, set())


async def test_a_failed_load_that_cannot_be_told_waits_for_the_end_of_its_request(tmp_path: Path) -> None:
    decode = Side(True, tmp_path / "d", WINDOWED, reports_failed_loads=False)
    await decode.start()
    try:
        lost, cancelled = receive((3,), (7, 5), timeout_s=0.1), receive((4,), (8, 6), request_id="e", token=b"e" * 16)
        decode.hooks.begin(StepPlan(receives=[lost, cancelled]))
        await decode.heard(ReceiveEnded)
        assert not decode.hooks.results(set()).received
        decode.hooks.begin(StepPlan(cancels=[lost.token, cancelled.token]))
        received: set[str] = set()
        async with asyncio.timeout(5):
            while received != {"d", "e"}:
                received |= decode.hooks.results(set()).received
                await asyncio.sleep(0.01)
    finally:
        await decode.aclose()


async def test_a_load_of_nothing_is_reported_to_nobody(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    nothing = replace(receive(()), is_waiting=False)
    decode.hooks.begin(StepPlan(receives=[nothing]))
    prefill.hooks.begin(StepPlan(opens=[open_order(decode, 3)], pushes=[push(0, (1, 2))]))
    end = await prefill.heard(SendEnded)
    assert isinstance(end, SendEnded)
    assert (end.is_landed, end.kv_bytes) == (True, 0)
    results = decode.hooks.results(set())
    assert (results.received, results.failed) == (set(), set())
    assert not [note for note in decode.notes if isinstance(note, ReceiveEnded)]


def test_the_pool_is_the_tensors_themselves_also_when_blocks_lie_apart() -> None:
    packed = torch.zeros(BLOCKS, 2, 2, 4, 6)
    tensors = {"a": packed[:, 0], "b": packed[:, 1]}
    pool = pool_of(tensors, replace(FACTS, groups=(replace(FULL, layer_names=frozenset("ab")),)))
    source = os.urandom(pool.layout.block_bytes(1))
    pool.buffers([Extent(1, (3,))])[0][:] = memoryview(source)
    assert packed[3, 1].numpy().tobytes() == source
    assert not packed[3, 0].any()


def test_layers_that_share_memory_travel_once() -> None:
    tensors = make_tensors(0)
    pool = pool_of({**tensors, "alias of a": tensors["a"]}, FACTS)
    assert [layer.name for layer in pool.layout.layers] == list(LAYERS)
    named = replace(FACTS, groups=(replace(FULL, layer_names=frozenset([*LAYERS, "alias of a"])),))
    pool = pool_of({**tensors, "alias of a": tensors["a"]}, named)
    assert [layer.name for layer in pool.layout.layers] == list(LAYERS)


def test_groups_that_take_turns_in_the_same_memory_are_layers_of_their_own() -> None:
    shared = make_tensors(0)["a"]
    pool = pool_of({"a": shared, "b": shared, "c": make_tensors(1)["c"]}, WINDOWED)
    assert [(layer.name, layer.group) for layer in pool.layout.layers] == [("a", 0), ("b", 1), ("c", 1)]
    assert pool.layout.groups == (KvGroup("window", 6), KvGroup())


def test_blocks_of_another_size_or_order_have_the_same_fingerprint() -> None:
    reference = pool_of(make_tensors(0), FACTS).layout
    larger = {name: torch.zeros(BLOCKS, 2, 8, 6) for name in LAYERS}
    layout = pool_of(larger, replace(FACTS, groups=(replace(FULL, block_tokens=8),))).layout
    assert layout.fingerprint() == reference.fingerprint()
    assert layout.shape.block_tokens == (8,)
    turned = {name: torch.zeros(BLOCKS, 4, 2, 6).transpose(1, 2) for name in LAYERS}
    layout = pool_of(turned, FACTS).layout
    assert layout.fingerprint() == reference.fingerprint()
    assert (reference.shape.order, layout.shape.order) == ("HND", "NHD")


def test_blocks_that_are_packed_in_an_unknown_way_fit_only_equal_ones() -> None:
    unknown = pool_of(make_tensors(0), replace(FACTS, packed_order="")).layout
    larger = {name: torch.zeros(BLOCKS, 2, 8, 6) for name in LAYERS}
    groups = (replace(FULL, block_tokens=8),)
    other = pool_of(larger, replace(FACTS, groups=groups, packed_order="")).layout
    assert unknown.fingerprint() != other.fingerprint()
    assert pool_of(make_tensors(0), FACTS).layout.fingerprint() != unknown.fingerprint()


def test_tokens_of_blocks_with_k_transposed_are_cut_out_as_of_any_other() -> None:
    plain, source = {name: torch.rand(BLOCKS, 2, 4, 6) for name in LAYERS}, {}
    for name, tensor in plain.items():
        keys, values = tensor[..., :3].transpose(2, 3), tensor[..., 3:]
        packed = torch.cat([keys.reshape(BLOCKS, 2, -1), values.reshape(BLOCKS, 2, -1)], dim=2)
        source[name] = packed.reshape(tensor.shape).contiguous()
    extents = [Extent(layer, (3, 7, 5), Cut(2, 7, 1, 1)) for layer in range(len(LAYERS))]
    canonical, out = (np.zeros(7 * 24 * len(LAYERS), np.uint8) for _ in range(2))
    pool_of(plain, FACTS).pack(extents, canonical)
    transposed = replace(FACTS, packed_order="HKtV4")
    pool_of(source, transposed).pack(extents, out)
    assert np.array_equal(out, canonical)
    target = {name: torch.zeros_like(tensor) for name, tensor in source.items()}
    into = pool_of(target, transposed)
    into.unpack(extents, out)
    again = np.zeros_like(out)
    into.pack(extents, again)
    assert np.array_equal(again, canonical)
    assert sum(int(tensor.count_nonzero()) for tensor in target.values()) == 7 * 6 * len(LAYERS)


def test_a_window_of_another_length_is_another_fingerprint() -> None:
    other = replace(WINDOWED, groups=(replace(WINDOWED.groups[0], kind=KvGroup("window", 7)), WINDOWED.groups[1]))
    fingerprints = {pool_of(make_tensors(0), facts).layout.fingerprint() for facts in (FACTS, WINDOWED, other)}
    assert len(fingerprints) == 3


def test_the_bytes_of_a_block_that_lies_tokens_first_are_those_in_memory() -> None:
    tensors = {name: torch.rand(BLOCKS, 4, 2, 6).transpose(1, 2) for name in LAYERS}
    (view,) = pool_of(tensors, FACTS).buffers([Extent(0, (5,))])
    assert view.tobytes() == tensors["a"][5].transpose(0, 1).contiguous().numpy().tobytes()


def test_scattered_blocks_and_other_shapes_are_refused() -> None:
    tensor = torch.zeros(BLOCKS, 2, 4, 6)
    facts = replace(FACTS, groups=(replace(FULL, layer_names=frozenset("a")),))
    with pytest.raises(UnfitKv, match="scattered"):
        pool_of({"a": torch.zeros(BLOCKS, 2, 4, 12)[..., ::2]}, facts)
    with pytest.raises(UnfitKv, match="shape"):
        pool_of({"a": tensor.flatten(2)}, facts)
    with pytest.raises(UnfitKv, match="blocks of 2 tokens in memory"):
        pool_of({"a": tensor[:, :, :2]}, facts)
    with pytest.raises(UnfitKv, match="several tensors"):
        pool_of({"a": [tensor, tensor]}, facts)  # type: ignore[dict-item]  # What vLLM gives for a Mamba layer.
    with pytest.raises(UnfitKv, match="in no KV group"):
        pool_of({"a": tensor, "z": torch.zeros(BLOCKS, 2, 4, 6)}, facts)


def test_the_latent_of_mla_is_one_head_in_one_part() -> None:
    facts = replace(FACTS, groups=(replace(FULL, layer_names=frozenset("a"), mla_names=frozenset("a")),), kv_heads=16)
    (layer,) = pool_of({"a": torch.zeros(BLOCKS, 1, BLOCK_TOKENS, 6)}, facts).layout.layers
    assert (layer.heads, layer.parts, layer.head_bytes) == (1, 1, 24)


async def test_the_front_end_has_a_link_measured(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    assert isinstance(decode.ready, Ready)
    prefill.front_end.send(ProbeAsked(7, decode.ready.addresses, EPOCH, 1))
    note = await prefill.heard(ProbeEnded)
    assert isinstance(note, ProbeEnded)
    assert (note.number, note.refusal, note.detail) == (7, "", "")
    (probe,) = note.probes
    assert (probe.from_rank, probe.to_rank, probe.report.transport) == (0, 0, "tcp")
    assert all(rate.bytes_per_s > 0 for rate in probe.report.rates)


async def test_the_front_end_hears_why_a_link_was_not_measured(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    assert isinstance(decode.ready, Ready)
    questions = ProbeQuestions(prefill.front_end.send)

    def pump(note: Note) -> None:
        if isinstance(note, ProbeEnded):
            questions.on_ended(note)

    prefill.notes_listener = pump
    with pytest.raises(HandoffRefused, match="wrong_epoch"):
        await asyncio.wait_for(questions.ask(decode.ready.addresses, EPOCH + 1, 1), 10)
    with pytest.raises(LinkLost):
        await asyncio.wait_for(questions.ask(("tcp://127.0.0.1:1",), EPOCH, 1), 10)
    assert (await asyncio.wait_for(questions.ask(decode.ready.addresses, EPOCH, 1), 10))[0].report.rates
    asking = asyncio.create_task(questions.ask(decode.ready.addresses, EPOCH, 1))
    await asyncio.sleep(0)
    questions.fail("the engine is dead")
    with pytest.raises(LinkLost, match="the engine is dead"):
        await asking
