"""What travels between ranks of any two shapes: everything once, nothing else, and both sides agree on it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.transport import (
    Extent,
    GroupBlocks,
    HandoffKey,
    HostKvPool,
    KvGroup,
    KvLayer,
    KvLayout,
    KvShape,
    ReceiveEnd,
    SendEnd,
    SendReleased,
)
from hocket.transport.layout import heads_of
from hocket.transport.ranks import ReceiveJoin, SendJoin, addresses_of, incoming, outgoing, pair_token
from hocket.transport.wire import Wire, senders_of

DIM_BYTES = 2


def layout_of(heads: int, shape: KvShape, *, parts: int = 2, groups: tuple[KvGroup, ...] = (KvGroup(),)) -> KvLayout:
    layers = tuple(
        KvLayer(str(index), heads, parts * DIM_BYTES, parts, group=index % len(groups)) for index in range(3)
    )
    return KvLayout("m", "r", "u8", "u8", layers, shape, groups)


def pool_of(layout: KvLayout, blocks: int) -> HostKvPool:
    rows = [np.zeros((blocks, layout.block_bytes(layer)), np.uint8) for layer in range(len(layout.layers))]
    return HostKvPool(layout, rows)


def truth(layer: int, token: int, head: int, part: int) -> list[int]:
    """The bytes that belong there, whoever keeps them."""
    return [(101 * layer + 37 * token + 11 * head + 5 * part + index) % 251 + 1 for index in range(DIM_BYTES)]


def block_view(pool: HostKvPool, layer: int, block: int) -> np.ndarray:
    """One block as (tokens, heads, parts, dim), written out by the definition of its order."""
    layout = pool.layout
    tokens, heads, parts = layout.block_tokens(layer), len(layout.rank_heads(layer)), layout.layers[layer].parts
    flat = pool.buffers([Extent(layer, (block,))])[0]
    if layout.shape.order == "HND":
        return flat.reshape(heads, tokens, parts, DIM_BYTES).swapaxes(0, 1)
    return flat.reshape(tokens, heads, parts, DIM_BYTES)


def fill(pool: HostKvPool, layer: int, blocks: GroupBlocks, tokens: int) -> None:
    size = pool.layout.block_tokens(layer)
    for index, block in enumerate(blocks.block_ids):
        view = block_view(pool, layer, block)
        for offset in range(size):
            token = (blocks.first_block + index) * size + offset
            for local, head in enumerate(pool.layout.rank_heads(layer)):
                for part in range(pool.layout.layers[layer].parts):
                    view[offset, local, part] = truth(layer, token, head, part) if token < tokens else 0


def shapes(tp: int, groups: int) -> st.SearchStrategy[list[KvShape]]:
    order = st.sampled_from(["HND", "NHD"])
    sizes = st.tuples(*[st.sampled_from([1, 2, 3, 4, 8])] * groups)
    return st.builds(lambda o, b: [KvShape(b, o, tp, rank) for rank in range(tp)], order, sizes)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_head_and_token_arrives_once_at_its_place(data: st.DataObject) -> None:
    heads = data.draw(st.sampled_from([1, 2, 4]))
    parts = data.draw(st.sampled_from([1, 2])) if heads == 1 else 2
    groups = data.draw(st.sampled_from([(KvGroup(),), (KvGroup(), KvGroup("window", 4))]))
    senders = data.draw(shapes(data.draw(st.sampled_from([1, 2, 4])), len(groups)))
    receivers = data.draw(shapes(data.draw(st.sampled_from([1, 2, 4])), len(groups)))
    tokens = data.draw(st.integers(1, 20))
    first_blocks = [data.draw(st.integers(0, tokens // size)) for size in receivers[0].block_tokens]
    borders = sorted({0, tokens, *data.draw(st.lists(st.integers(1, tokens), max_size=3))})
    for to_shape in receivers:
        mine = layout_of(heads, to_shape, parts=parts, groups=groups)
        target = pool_of(mine, 64)
        to_blocks = tuple(
            GroupBlocks(first, tuple(data.draw(st.permutations(range(64)))[: -(-tokens // size) - first]))
            for first, size in zip(first_blocks, to_shape.block_tokens, strict=True)
        )
        firsts = [first * size for first, size in zip(first_blocks, to_shape.block_tokens, strict=True)]
        written = [np.zeros((tokens, heads), int) for _ in mine.layers]
        for rank in senders_of(mine, len(senders), len(receivers), to_shape.tp_rank):
            theirs = layout_of(heads, senders[rank], parts=parts, groups=groups)
            assert theirs.fingerprint() == mine.fingerprint()
            source = pool_of(theirs, 64)
            from_blocks = tuple(GroupBlocks(0, tuple(range(-(-tokens // size)))) for size in senders[rank].block_tokens)
            for layer in range(3):
                fill(source, layer, from_blocks[theirs.layers[layer].group], tokens)
            out = Wire(theirs, to_shape, i_send=True)
            into = Wire(mine, senders[rank], i_send=False)
            assert out.is_native == into.is_native == (senders[rank] == to_shape)
            start = min(tokens, *firsts)
            for end in [border for border in borders if border > start]:
                if not out.is_border(end, tokens):
                    continue
                per_message = data.draw(st.integers(1, 3))
                sent, received = (wire.messages(firsts, start, end, per_message) for wire in (out, into))
                assert sent == received
                for message in sent:
                    move(source, out.extents(message, from_blocks), target, into.extents(message, to_blocks))
                    assert out.nbytes(message) == into.nbytes(message)
                    for part in message.parts:
                        own = set(mine.rank_heads(part.layer)) & set(theirs.rank_heads(part.layer))
                        written[part.layer][part.first_token : part.end_token, sorted(own)] += 1
                start = end
        check(mine, target, to_blocks, firsts, tokens)
        for layer, counts in enumerate(written):
            wanted = counts[firsts[mine.layers[layer].group] : tokens, list(mine.rank_heads(layer))]
            assert (wanted >= 1).all()


def move(source: HostKvPool, out: tuple[Extent, ...], target: HostKvPool, into: tuple[Extent, ...]) -> None:
    if out[0].cut is None:
        for view, place in zip(bytes_of(source, out), bytes_of(target, into), strict=True):
            place[:] = view
        return
    nbytes = sum(
        extent.cut.tokens * extent.cut.heads * source.layout.layers[extent.layer].head_bytes
        for extent in out
        if extent.cut
    )
    message = np.zeros(nbytes, np.uint8)
    source.pack(out, message)
    target.unpack(into, message)


def bytes_of(pool: HostKvPool, extents: tuple[Extent, ...]) -> list[np.ndarray]:
    return [pool.buffers([Extent(extent.layer, (block,))])[0] for extent in extents for block in extent.block_ids]


def check(layout: KvLayout, pool: HostKvPool, groups: tuple[GroupBlocks, ...], firsts: list[int], tokens: int) -> None:
    for layer in range(len(layout.layers)):
        group, size = layout.layers[layer].group, layout.block_tokens(layer)
        for token in range(firsts[group], tokens):
            block = groups[group].block_ids[token // size - groups[group].first_block]
            view = block_view(pool, layer, block)
            for local, head in enumerate(layout.rank_heads(layer)):
                for part in range(layout.layers[layer].parts):
                    assert view[token % size, local, part].tolist() == truth(layer, token, head, part)


def test_a_message_names_a_block_that_is_not_there() -> None:
    layout = layout_of(1, KvShape((4,)))
    wire = Wire(layout, layout.shape, i_send=True)
    (message,) = wire.messages([0], 0, 8, 3)
    with pytest.raises(LookupError):
        wire.extents(message, (GroupBlocks(1, (5,)),))
    with pytest.raises(LookupError):
        wire.extents(message, (GroupBlocks(0, (5,)),))


def test_layouts_that_cannot_be_cut_only_understand_their_like() -> None:
    known, other = layout_of(1, KvShape((4,))), layout_of(1, KvShape((8,), "NHD", 2, 1))
    assert known.fingerprint() == other.fingerprint()
    opaque = layout_of(1, KvShape((4,), ""))
    assert len({known.fingerprint(), opaque.fingerprint(), layout_of(1, KvShape((8,), "")).fingerprint()}) == 3
    assert Wire(opaque, opaque.shape, i_send=True).is_native
    with pytest.raises(ValueError, match="shapes differ"):
        Wire(opaque, KvShape((8,), ""), i_send=True)
    with pytest.raises(ValueError, match="KV groups"):
        Wire(known, KvShape((8, 8)), i_send=True)
    with pytest.raises(ValueError, match="rank 3 of 2"):
        Wire(known, KvShape((8,), "HND", 2, 3), i_send=True)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"shape": KvShape((0,))}, "at least one token"),
        ({"shape": KvShape((4, 4))}, "2 block sizes for 1"),
        ({"shape": KvShape((4,), tp_size=2, tp_rank=2)}, "rank 2 of 2"),
        ({"layers": ()}, "0 layers"),
        ({"layers": (KvLayer("a", 0, 4),)}, "0 heads"),
        ({"layers": (KvLayer("a", 1, 3),)}, "not 2 equal parts"),
        ({"layers": (KvLayer("a", 1, 4, group=1),)}, "group 1"),
    ],
)
def test_a_wrong_layout_is_refused(change: dict[str, object], what: str) -> None:
    fields: dict[str, object] = {"layers": (KvLayer("a", 1, 4),), "shape": KvShape((4,))}
    with pytest.raises(ValueError, match=what):
        KvLayout("m", "r", "u8", "u8", **(fields | change))  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize(("from_size", "to_size"), [(1, 1), (1, 2), (2, 1), (2, 4), (4, 2), (8, 2), (2, 8), (4, 4)])
def test_both_sides_of_a_worker_name_the_same_pairs(heads: int, from_size: int, to_size: int) -> None:
    token = b"t" * 16
    senders = [layout_of(heads, KvShape((4,), "HND", from_size, rank)) for rank in range(from_size)]
    receivers = [layout_of(heads, KvShape((4,), "HND", to_size, rank)) for rank in range(to_size)]
    said = {
        (to_rank, key.token)
        for rank, layout in enumerate(senders)
        for to_rank, key in outgoing(layout, HandoffKey(token, 1, 1), to_size, rank)
    }
    expected = {
        (rank, part) for rank, layout in enumerate(receivers) for part in incoming(layout, token, from_size, rank)
    }
    assert said == expected
    assert len({heads_of(heads, to_size, rank) for rank in range(to_size)}) == min(heads, to_size)


def test_pair_tokens_differ_and_addresses_are_shared_out() -> None:
    tokens = {pair_token(token, a, b) for token in (b"a" * 16, b"b" * 16) for a in range(3) for b in range(300)}
    assert len(tokens) == 2 * 3 * 300
    assert addresses_of(("a", "b", "c", "d"), 2, 1) == ("c", "d")
    for addresses, ranks in ((("a",), 2), ((), 1), (("a",), 0)):
        with pytest.raises(ValueError, match="addresses for"):
            addresses_of(addresses, ranks, 0)


def test_ends_of_ranks_are_joined() -> None:
    join = ReceiveJoin(b"w", [b"a", b"b"], 30)
    assert join.add(ReceiveEnd(b"a", True, 30, 5)) is None
    assert join.add(ReceiveEnd(b"b", False, 20, 3, "stalled")) == ReceiveEnd(b"w", False, 20, 8, "stalled")
    keys = [HandoffKey(name, 1, 1) for name in (b"w", b"a", b"b")]
    send = SendJoin(keys[0], keys[1:])
    assert send.add(SendReleased(keys[1])) is None
    assert send.add(SendEnd(keys[1], True, 4)) is None
    assert send.add(SendReleased(keys[2])) == SendReleased(keys[0])
    assert send.add(SendEnd(keys[2], True, 6)) == SendEnd(keys[0], True, 10)
