"""KV pools in host memory, finding transports, and both loops."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import numpy as np
import pytest
import uvloop
import xxhash
from shm_ring import make_shm_pool
from transport_rig import (
    BLOCK_TOKENS,
    DECODE_EPOCH,
    chunk,
    differing_blocks,
    expectation,
    make_layout,
    make_pool,
    make_transport,
    send_order,
)

from hocket.transport import (
    Extent,
    HandoffEndpoint,
    HandoffKey,
    HostKvPool,
    KvLayer,
    KvLayout,
    KvShape,
    ReceiveEnd,
    TransportUnavailable,
    open_transports,
)
from hocket.transport.pool import digest_of
from hocket.transport.registry import installed_schemes, schemes_for, start_transports


def test_neighbouring_blocks_come_as_one_view_and_a_digest_does_not_see_where_blocks_lie() -> None:
    layout = make_layout(layers=2, block_bytes=64)
    pool, other = make_pool(layout, 10, seed=1), make_pool(layout, 10)
    assert [view.nbytes for view in pool.buffers([Extent(0, (4, 5, 6, 9, 8, 1))])] == [192, 64, 64, 64]
    for layer in range(2):
        for source, target in zip([4, 5, 6, 9, 8, 1], [0, 9, 3, 4, 5, 2], strict=True):
            other.buffers([Extent(layer, (target,))])[0][:] = pool.buffers([Extent(layer, (source,))])[0]
        assert pool.digest([Extent(layer, (4, 5, 6, 9, 8, 1))]) == other.digest([Extent(layer, (0, 9, 3, 4, 5, 2))])
        assert pool.digest([Extent(layer, (4, 5))]) != pool.digest([Extent(layer, (5, 4))])
    assert not pool.buffers([Extent(0, ())])


def test_whole_blocks_are_packed_and_unpacked_in_their_order() -> None:
    layout = make_layout(layers=2, block_bytes=64)
    pool, other = make_pool(layout, 10, seed=1), make_pool(layout, 10)
    from_ids, to_ids = (4, 5, 9, 0), (7, 1, 2, 3)
    packed = np.zeros(2 * 4 * 64, np.uint8)
    pool.pack([Extent(layer, from_ids) for layer in range(2)], packed)
    other.unpack([Extent(layer, to_ids) for layer in range(2)], packed)
    assert differing_blocks(pool, from_ids, other, to_ids) == []
    assert [bytes(rows.data) for rows in other.buffers([Extent(0, (0, 4, 5, 6, 8, 9))])] == [
        bytes(64),
        bytes(192),
        bytes(128),
    ]
    assert digest_of([packed]) == pool.digest([Extent(layer, from_ids) for layer in range(2)])
    for wrong in (-1, 10):
        with pytest.raises(IndexError):
            pool.pack([Extent(0, (0, wrong))], packed[:128])
        with pytest.raises(IndexError):
            other.unpack([Extent(0, (0, wrong))], packed[:128])


def test_a_digest_is_the_same_by_whatever_way_it_is_made() -> None:
    sizes = (32 << 10, 192 << 10, 48 << 10)  # short, long and odd parts of the memory that blocks are put together in
    layers = tuple(KvLayer(f"layer.{number}", 1, size // BLOCK_TOKENS) for number, size in enumerate(sizes))
    pool = make_pool(KvLayout("test/model", "main", "float32", "float32", layers, KvShape((BLOCK_TOKENS,))), 80, seed=3)
    block_ids = tuple(np.random.default_rng(5).permutation(80)[:70].tolist())
    extents = [Extent(layer, block_ids) for layer in range(3)]
    assert pool.is_scattered(extents, 128 << 10)
    blocks = (bytes(pool.buffers([Extent(layer, (block,))])[0]) for layer in range(3) for block in block_ids)
    assert pool.digest(extents) == xxhash.xxh3_64_intdigest(b"".join(blocks))


def test_blocks_are_scattered_when_their_runs_are_short() -> None:
    pool = make_pool(make_layout(layers=2, block_bytes=64), 10)
    assert pool.is_scattered([Extent(0, (4, 6, 8, 1))], 65)
    assert pool.is_scattered([Extent(0, (4, 5, 6, 7)), Extent(1, (9, 8, 7, 6))], 128)
    assert not pool.is_scattered([Extent(0, (4, 5, 6, 7)), Extent(1, (4, 5, 6, 7))], 256)
    apart = np.zeros((10, 256), np.uint8)
    assert not HostKvPool(make_layout(layers=1, block_bytes=64), [apart[:, :64]]).is_scattered([Extent(0, (4, 6))], 128)


def test_a_view_is_the_pool_itself() -> None:
    pool = make_pool(make_layout(layers=1, block_bytes=8, block_tokens=2), 4)
    pool.buffers([Extent(0, (1, 2))])[0][:] = 5
    assert bytes(pool.buffers([Extent(0, (0, 1, 2, 3))])[0]) == bytes(8) + b"\5" * 16 + bytes(8)


@pytest.mark.parametrize("block_ids", [[-1], [4], [0, 1, 7]])
def test_a_block_outside_of_the_pool_is_an_index_error(block_ids: list[int]) -> None:
    pool = make_pool(make_layout(layers=1, block_bytes=8, block_tokens=2), 4)
    with pytest.raises(IndexError):
        pool.buffers([Extent(0, tuple(block_ids))])


def test_rows_that_lie_apart_are_fine_and_scattered_rows_are_refused() -> None:
    layout = make_layout(layers=1, block_bytes=8, block_tokens=2)
    memory = np.arange(4 * 24, dtype=np.uint8).reshape(4, 24)
    pool = HostKvPool(layout, [memory[:, 8:16]])
    assert [bytes(view) for view in pool.buffers([Extent(0, (1, 2))])] == [
        bytes(range(32, 40)),
        bytes(range(56, 64)),
    ]
    with pytest.raises(ValueError, match="not contiguous"):
        HostKvPool(layout, [memory[:, ::3]])
    with pytest.raises(ValueError, match="not uint8"):
        HostKvPool(layout, [memory])
    with pytest.raises(ValueError, match="2 arrays for 1 layers"):
        HostKvPool(layout, [memory[:, :8]] * 2)
    memory.setflags(write=False)
    with pytest.raises(ValueError, match="read-only"):
        HostKvPool(layout, [memory[:, :8]])


def test_transports_are_found_by_their_scheme_in_the_order_given() -> None:
    assert {"inproc", "tcp", "ucx"} <= set(installed_schemes())
    assert [transport.scheme for transport in open_transports("tcp, inproc")] == ["tcp", "inproc"]
    with pytest.raises(ValueError, match=r"no transport for 'pigeon'; installed: .*inproc.*tcp"):
        open_transports("tcp,pigeon")
    with pytest.raises(ValueError, match="no transport named"):
        open_transports("")


class Unavailable:
    """A transport whose package is missing."""

    scheme = "rdma"

    async def start(self) -> None:
        raise TransportUnavailable("no libibverbs")


@pytest.mark.skipif(
    "cuda_ipc" not in installed_schemes(), reason="installed before it had this transport: install again"
)
def test_kv_in_gpu_memory_goes_over_cuda_ipc_first_unless_others_are_named() -> None:
    on_gpu, on_host = make_shm_pool(make_layout(), 1), make_pool(make_layout(), 1)
    assert schemes_for("ucx,tcp", on_gpu) == "cuda_ipc,ucx,tcp"
    assert schemes_for("ucx,tcp", on_host) == "ucx,tcp"
    assert schemes_for("tcp", on_gpu) == "tcp"


async def test_a_transport_that_cannot_run_is_left_out_while_another_can(caplog: pytest.LogCaptureFixture) -> None:
    tcp = make_transport("tcp")
    assert await start_transports([Unavailable(), tcp]) == [tcp]
    assert "no libibverbs" in caplog.text
    with pytest.raises(TransportUnavailable, match="rdma: no libibverbs"):
        await start_transports([Unavailable()])


@pytest.mark.parametrize("scheme", ["tcp", "ucx"])
@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_both_event_loops_carry_a_hand_off(scheme: str, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    layout = make_layout(layers=3, block_bytes=128 << 10)
    source, target = make_pool(layout, 32, seed=1), make_pool(layout, 32)

    async def run() -> ReceiveEnd:
        decode = HandoffEndpoint(target, [make_transport(scheme)], worker_name="d", epoch=DECODE_EPOCH)
        prefill = HandoffEndpoint(source, [make_transport(scheme)], worker_name="p", epoch=1, listens=False)
        await decode.start()
        await prefill.start()
        landed = asyncio.get_running_loop().create_future()
        key = HandoffKey(os.urandom(16), 1, 1)
        decode.expect(expectation(key.token, 1, 0, tuple(range(0, 32, 2)), 10.0), landed.set_result)
        order = send_order(key, decode.addresses, layout.fingerprint(), 16, epoch=DECODE_EPOCH, timeout_s=10.0)
        prefill.open(order, lambda _: None)
        prefill.announce(key, chunk(0, tuple(range(16))))
        for layer in range(3):
            prefill.layer_ready(key, layer)
        async with asyncio.timeout(10.0):
            end: ReceiveEnd = await landed
        await prefill.aclose()
        await decode.aclose()
        assert not asyncio.all_tasks() - {asyncio.current_task()}, "a task was left behind"
        return end

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(run()).is_landed
    assert differing_blocks(source, range(16), target, range(0, 32, 2)) == []
