"""KV in GPU memory: on a GPU where there is one, else the same kernels in Triton's interpreter on the CPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from hocket.transport.base import Cut, DeviceBuffer, Extent
from hocket.transport.layout import KvGroup, KvLayer, KvLayout, KvShape

torch = pytest.importorskip("torch")
HAS_CUDA = torch.cuda.is_available()
with pytest.MonkeyPatch.context() as patch:
    if not HAS_CUDA:
        patch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    from hocket.transport.gpu.pool import CudaKvPool, StagingSlot, host_digest
    from hocket.transport.gpu.tickets import CELLS, GpuTicket


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    """Triton asks again while it runs."""
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_CUDA:
            patch.setenv("TRITON_INTERPRET", "1")
        yield


DEVICE = "cuda" if HAS_CUDA else "cpu"
BLOCKS = 12


def make_layout(
    order: str = "HND", *, layers: Sequence[KvLayer] | None = None, tokens: tuple[int, ...] = (8,)
) -> KvLayout:
    layers = layers or [KvLayer(f"layer.{index}", heads=4, head_bytes=64) for index in range(3)]
    groups = tuple(KvGroup() for _ in tokens)
    shape = KvShape(tokens, order=order)
    return KvLayout("tiny", "1", "bf16", "bf16", tuple(layers), shape, groups, digest="weighted")


def mixed_layout() -> KvLayout:
    """Blocks of 2048, 2048, 4608 (not a power of two), 64 and 16 B."""
    layers = [
        *(KvLayer("a", heads=4, head_bytes=64), KvLayer("b", heads=4, head_bytes=64)),
        *(KvLayer("mla", heads=1, head_bytes=576, parts=1), KvLayer("c", heads=1, head_bytes=16, group=1)),
        KvLayer("d", heads=1, head_bytes=4, group=1),
    ]
    return make_layout(layers=layers, tokens=(8, 4))


class Rig:
    """A pool whose rows lie apart in layers of their own, and the same bytes on the host."""

    def __init__(self, layout: KvLayout, *, seed: int, gap_bytes: int = 48, staging_bytes: int = 1 << 20) -> None:
        random = np.random.default_rng(seed)
        sizes = [layout.block_bytes(layer) for layer in range(len(layout.layers))]
        self.memory = [
            torch.from_numpy(random.integers(0, 256, (BLOCKS, size + gap_bytes), np.uint8)).to(DEVICE) for size in sizes
        ]
        self.layout = layout
        rows = [memory[:, :size] for memory, size in zip(self.memory, sizes, strict=True)]
        self.pool = CudaKvPool(layout, rows, staging_bytes)
        self.before = self.host()

    def host(self) -> list[npt.NDArray[np.uint8]]:
        """All memory, gaps included."""
        return [memory.cpu().numpy().copy() for memory in self.memory]

    def blocks(self, layer: int, block_ids: Sequence[int], *, when: list[npt.NDArray[np.uint8]] | None = None) -> bytes:
        rows = (when or self.host())[layer][:, : self.layout.block_bytes(layer)]
        return b"".join(rows[block].tobytes() for block in block_ids)

    def message(self, extents: Sequence[Extent]) -> bytes:
        """What a message of those extents holds, taken apart a token at a time."""
        return b"".join(b"".join(piece.tobytes() for piece in self.pieces(extent)) for extent in extents)

    def pieces(self, extent: Extent) -> Iterator[npt.NDArray[np.uint8]]:
        rows = self.before[extent.layer][:, : self.layout.block_bytes(extent.layer)]
        if extent.cut is None:
            yield from (rows[block] for block in extent.block_ids)
            return
        layer, tokens = self.layout.layers[extent.layer], self.layout.block_tokens(extent.layer)
        dim = layer.head_bytes // layer.parts
        for part in range(layer.parts):
            for token in range(extent.cut.first_token, extent.cut.first_token + extent.cut.tokens):
                row = rows[extent.block_ids[token // tokens]]
                for head in range(extent.cut.first_head, extent.cut.first_head + extent.cut.heads):
                    of_head, of_token = head * tokens + token % tokens, token % tokens * layer.heads + head
                    at = (of_head if self.layout.shape.order == "HND" else of_token) * layer.head_bytes + part * dim
                    yield row[at : at + dim]

    def slot(self, nbytes: int, *, on_device: bool = True) -> StagingSlot:
        slot = self.pool.reserve(nbytes, on_device=on_device)
        assert slot is not None
        return slot

    def gathered(self, extents: Sequence[Extent], *, on_device: bool = True) -> tuple[StagingSlot, int]:
        slot = self.slot(len(self.message(extents)), on_device=on_device)
        return slot, wait(self.pool.gather(extents, slot))

    def scattered(self, extents: Sequence[Extent], data: bytes, *, on_device: bool = True) -> int:
        slot = self.slot(len(data), on_device=on_device)
        slot.view.copy_(torch.from_numpy(np.frombuffer(bytearray(data), np.uint8)))
        if HAS_CUDA:
            torch.cuda.synchronize()
        digest = wait(self.pool.scatter(extents, slot))
        self.pool.release(slot)
        return digest


def wait(ticket: GpuTicket) -> int:
    deadline = time.monotonic() + 30.0
    while (digest := ticket.poll()) is None:
        assert time.monotonic() < deadline, "the GPU did not finish"
    return digest


def contents(slot: StagingSlot) -> bytes:
    return slot.view.cpu().numpy().tobytes()


EXTENTS = {
    "one block": [Extent(0, (5,))],
    "scattered": [Extent(1, (7, 0, 3, 11, 4))],
    "layers": [Extent(0, (1, 2)), Extent(1, (9, 8)), Extent(0, (3,))],
    "mixed": [Extent(0, (1, 2)), Extent(2, (4, 0, 5)), Extent(3, (11, 1)), Extent(4, (0, 9, 2)), Extent(1, (3,))],
}


@pytest.mark.parametrize("on_device", [True, False], ids=["device", "pinned"])
@pytest.mark.parametrize("name", EXTENTS)
def test_blocks_come_through_a_slot_bit_for_bit_with_their_digest(name: str, on_device: bool) -> None:
    extents = EXTENTS[name]
    source, target = Rig(mixed_layout(), seed=1), Rig(mixed_layout(), seed=2)
    slot, digest = source.gathered(extents, on_device=on_device)
    assert contents(slot) == source.message(extents)
    assert digest == host_digest(source.message(extents))
    assert slot.buffer.nbytes == len(contents(slot))
    assert isinstance(slot.buffer, DeviceBuffer) is on_device
    moved = [Extent(extent.layer, tuple((block + 1) % BLOCKS for block in extent.block_ids)) for extent in extents]
    assert target.scattered(moved, contents(slot), on_device=on_device) == digest
    for extent, there in zip(extents, moved, strict=True):
        assert target.blocks(there.layer, there.block_ids) == source.blocks(extent.layer, extent.block_ids)
    assert source.host()[0].tobytes() == source.before[0].tobytes()
    assert_untouched(target, moved)


def assert_untouched(rig: Rig, written: Sequence[Extent]) -> None:
    """No other block and no gap between rows has changed."""
    for layer, (now, before) in enumerate(zip(rig.host(), rig.before, strict=True)):
        mask = np.ones(now.shape, bool)
        for extent in written:
            if extent.layer == layer:
                mask[list(extent.block_ids), : rig.layout.block_bytes(layer)] = False
        assert (now[mask] == before[mask]).all()


CUTS = {
    "all": (Extent(0, (3, 1), Cut(0, 16, 0, 4)),),
    "some tokens": (Extent(1, (3, 1, 7), Cut(5, 13, 0, 4)),),
    "some heads": (Extent(1, (3, 1, 7), Cut(0, 24, 1, 2)),),
    "one token of one head": (Extent(2, (6,), Cut(7, 1, 3, 1)),),
    "several layers": (Extent(0, (3, 1), Cut(2, 9, 2, 2)), Extent(1, (0, 2), Cut(1, 10, 0, 1))),
    "the same of several layers": (
        *(Extent(0, (3, 1, 7), Cut(6, 15, 1, 2)), Extent(1, (0, 2, 5), Cut(6, 15, 1, 2))),
        *(Extent(2, (0, 2, 11), Cut(6, 15, 1, 2)), Extent(0, (8, 9, 4), Cut(6, 14, 1, 2))),
    ),
    "cut and whole": (Extent(0, (4, 2)), Extent(1, (0, 2), Cut(1, 10, 0, 1)), Extent(2, (9,))),
}


@pytest.mark.parametrize("on_device", [True, False], ids=["device", "pinned"])
@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("order", ["HND", "NHD"])
def test_cuts_are_in_canonical_order_and_write_nothing_beside_them(order: str, name: str, on_device: bool) -> None:
    extents = CUTS[name]
    source, target = Rig(make_layout(order), seed=3), Rig(make_layout(order), seed=4)
    slot, digest = source.gathered(extents, on_device=on_device)
    assert contents(slot) == source.message(extents)
    assert digest == host_digest(source.message(extents))
    assert target.scattered(extents, contents(slot), on_device=on_device) == digest
    after = target.host()
    for extent in extents:  # Put the source's pieces into a copy of the target by hand, then compare all memory.
        for into, piece in zip(target.pieces(extent), source.pieces(extent), strict=True):
            into[:] = piece
    for layer in range(3):
        assert after[layer].tobytes() == target.before[layer].tobytes()


@pytest.mark.parametrize("order", ["HND", "NHD"])
def test_any_cut_of_any_blocks(order: str) -> None:
    source, target, random = Rig(make_layout(order), seed=3), Rig(make_layout(order), seed=4), np.random.default_rng(5)
    for _ in range(25):
        extents = []
        for _ in range(random.integers(1, 4)):
            block_ids = tuple(random.permutation(BLOCKS)[: random.integers(1, 6)].tolist())
            first_token, first_head = (int(random.integers(end)) for end in (8, 4))
            tokens = int(random.integers(1, len(block_ids) * 8 - first_token + 1))
            cut = Cut(first_token, tokens, first_head, int(random.integers(1, 5 - first_head)))
            extents.append(Extent(int(random.integers(3)), block_ids, cut if random.integers(4) else None))
        slot, digest = source.gathered(extents)
        assert contents(slot) == source.message(extents)
        assert digest == host_digest(contents(slot))
        target.before = target.host()
        assert target.scattered(extents, contents(slot)) == digest
        source.pool.release(slot)
        after = target.host()
        for extent in extents:
            for into, piece in zip(target.pieces(extent), source.pieces(extent), strict=True):
                into[:] = piece
        assert [layer.tobytes() for layer in after] == [layer.tobytes() for layer in target.before]


def test_the_orders_of_two_pools_meet_in_the_canonical_one() -> None:
    """Heads 2 and 3 of eight tokens leave an HND pool and enter an NHD pool."""
    source, target = Rig(make_layout("HND"), seed=5), Rig(make_layout("NHD"), seed=6)
    slot, digest = source.gathered([Extent(0, (2,), Cut(0, 8, 2, 2))])
    assert target.scattered([Extent(0, (7, 8), Cut(4, 8, 2, 2))], contents(slot)) == digest
    target.before = target.host()
    assert target.message([Extent(0, (7, 8), Cut(4, 8, 2, 2))]) == source.message([Extent(0, (2,), Cut(0, 8, 2, 2))])


def test_cuts_of_odd_lengths_and_what_follows_them() -> None:
    """Heads of 6 B: parts of 3 B, so nothing after them is aligned, and the message ends within a word."""
    layers = [KvLayer("odd", heads=8, head_bytes=6), KvLayer("even", heads=4, head_bytes=64)]
    layout = make_layout("NHD", layers=layers)
    source, target = Rig(layout, seed=7), Rig(layout, seed=8)
    extents = [Extent(0, (1, 2), Cut(3, 7, 1, 3)), Extent(1, (3, 5)), Extent(0, (4,), Cut(0, 1, 0, 1))]
    slot, digest = source.gathered(extents)
    assert contents(slot) == source.message(extents)
    assert len(contents(slot)) % 8
    assert digest == host_digest(contents(slot))
    assert target.scattered(extents, contents(slot)) == digest
    target.before = target.host()
    assert target.message(extents) == source.message(extents)


def test_a_wrong_byte_in_the_slot_is_in_the_digest_of_the_scatter() -> None:
    source, target = Rig(mixed_layout(), seed=1), Rig(mixed_layout(), seed=2)
    extents = EXTENTS["mixed"]
    slot, digest = source.gathered(extents)
    right, random = contents(slot), np.random.default_rng(9)
    for _ in range(20):
        wrong = bytearray(right)
        wrong[random.integers(len(wrong))] ^= 1 << random.integers(8)
        assert target.scattered(extents, bytes(wrong)) != digest
    swapped = right[2048:4096] + right[:2048] + right[4096:]
    assert target.scattered(extents, swapped) != digest
    assert target.scattered(extents, right) == digest


def test_cells_are_clean_for_the_next_message_and_come_back_unpolled() -> None:
    """More messages than there are cells, none of them polled; then every digest is still the right one."""
    rig = Rig(mixed_layout(), seed=1)
    slots = [rig.slot(64 * (1 + turn % 4)) for turn in range(32)]
    tickets = []
    for turn in range(CELLS + 40):
        extents = [Extent(3, tuple(range(1 + turn % 4)))]
        tickets.append((rig.pool.gather(extents, slots[turn % 32]), host_digest(rig.message(extents))))
    assert [wait(ticket) for ticket, _ in tickets] == [digest for _, digest in tickets]


def test_threads_gather_and_scatter_at_once() -> None:
    rig = Rig(mixed_layout(), seed=1, staging_bytes=1 << 16)
    wrong: list[str] = []

    def work(layer: int, block_ids: tuple[int, ...]) -> None:
        extents = [Extent(layer, block_ids), Extent(4, (block_ids[0],))]
        expected = host_digest(rig.message(extents))
        for turn in range(10):
            slot = rig.slot(len(rig.message(extents)), on_device=turn % 3 > 0)
            rig.pool.fence()
            # What is scattered is what was there, so that nobody reads anything else.
            if wait(rig.pool.gather(extents, slot)) != expected:
                wrong.append(f"gather {layer}")
            if wait(rig.pool.scatter(extents, slot)) != expected:
                wrong.append(f"scatter {layer}")
            rig.pool.release(slot)

    threads = [threading.Thread(target=work, args=item) for item in ((0, (1, 2, 3)), (2, (4, 5)), (1, (6, 7, 8)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100.0)
    assert wrong == []
    assert [now.tobytes() for now in rig.host()] == [before.tobytes() for before in rig.before]


def test_slots_are_as_long_as_asked_and_all_room_comes_back() -> None:
    rig = Rig(make_layout(), seed=1, staging_bytes=1 << 16)
    pool = rig.pool
    assert pool.message_bytes_max == 1 << 16
    for on_device in (True, False):
        slots = [rig.slot(nbytes, on_device=on_device) for nbytes in (1, 300, 4096, 40_000)]
        assert [slot.buffer.nbytes for slot in slots] == [1, 300, 4096, 40_000]
        assert all(slot.address % 256 == slots[0].address % 256 for slot in slots)
        assert pool.reserve(40_000, on_device=on_device) is None
        for slot in slots:
            pool.release(slot)
        with pytest.raises(ValueError, match="no run begins"):
            pool.release(slots[0])
        pool.release(rig.slot(1 << 16, on_device=on_device))
    for nbytes in (0, (1 << 16) + 1):
        with pytest.raises(ValueError, match="a slot of"):
            pool.reserve(nbytes, on_device=True)


def test_a_slot_given_back_while_a_kernel_uses_it_is_reused_only_after_it() -> None:
    rig = Rig(make_layout(), seed=1, staging_bytes=1 << 16)
    slot = rig.slot(1 << 16)
    taken = rig.pool._tickets.take(0)  # A message that nobody has launched yet: under way for as long as we like.
    slot.ticket = taken
    rig.pool.release(slot)
    assert rig.pool.reserve(1, on_device=True) is None
    rig.pool._kernels.digest(0, slot.address, 1 << 16, rig.pool._tickets.report(taken, 4))
    assert wait(taken) == host_digest(contents(slot))
    rig.pool.release(rig.slot(1 << 16))


def test_what_does_not_fit_together_is_refused() -> None:
    rig = Rig(make_layout(), seed=1)
    slot = rig.slot(2048)
    with pytest.raises(ValueError, match="extents of 4096 B for a slot of 2048"):
        rig.pool.gather([Extent(0, (1, 2))], slot)
    with pytest.raises(ValueError, match="extents of 512 B for a slot of 2048"):
        rig.pool.scatter([Extent(0, (1, 2), Cut(0, 2, 0, 4))], slot)
    for block_ids in ((BLOCKS,), (-1,), ()):
        with pytest.raises(IndexError):
            rig.pool.scatter([Extent(0, block_ids)], slot)
        with pytest.raises(IndexError):
            rig.pool.gather([Extent(0, (1,)), Extent(1, block_ids)], slot)
    for cut in (Cut(8, 1, 0, 1), Cut(0, 9, 0, 1), Cut(0, 8, 0, 5), Cut(0, 8, 4, 1), Cut(-1, 1, 0, 1), Cut(0, 0, 0, 1)):
        with pytest.raises(ValueError, match="is not within"):
            rig.pool.gather([Extent(0, (1,), cut)], slot)
    with pytest.raises(ValueError, match="cannot be cut"):
        Rig(make_layout(""), seed=1).pool.gather([Extent(0, (1,), Cut(0, 8, 0, 4))], slot)
    with pytest.raises(TypeError, match="not a slot of this pool"):
        rig.pool.release(DeviceBuffer(0, 0, None))
    rig.pool.close()
    with pytest.raises(OSError, match="closed"):
        rig.pool.reserve(16, on_device=True)
    with pytest.raises(OSError, match="closed"):
        rig.pool.gather([Extent(0, (1,))], slot)


def test_tensors_that_are_not_the_layouts_are_refused() -> None:
    layout = make_layout()
    rows = [torch.zeros((4, 2048), dtype=torch.uint8, device=DEVICE) for _ in range(3)]
    wide = torch.zeros((4, 4096), dtype=torch.uint8, device=DEVICE)
    for layers, text in (
        (rows[:2], "2 tensors for 3 layers"),
        ([*rows[:2], rows[2][:3]], "not uint8"),
        ([*rows[:2], rows[2].view(torch.int8)], "not uint8"),
        ([*rows[:2], wide[:, ::2]], "not contiguous"),
        (
            [*rows[:2], torch.zeros(4 * 2056, dtype=torch.uint8, device=DEVICE).view(4, 2056)[:, :2048]],
            "multiples of 16 B",
        ),
        ([*rows[:2], wide[:, 8:2056]], "multiples of 16 B"),
    ):
        with pytest.raises(ValueError, match=text):
            CudaKvPool(layout, layers, 1 << 16)
    plain = KvLayout("m", "1", "bf16", "bf16", layout.layers, layout.shape)
    with pytest.raises(ValueError, match="weighted"):
        CudaKvPool(plain, rows, 1 << 16)
