"""The kernels: blocks to slot, slot to blocks, cuts alike, and a digest of a slot; each adds to its message's digest.

A message may take several launches on one stream (one for each block size or cut). They share a cell of two words in
device memory, the running digest and the count of finished programs; the last program of the message sets both back to
zero, so that nobody has to clear a cell, writes the digest into pinned host memory and, behind a system-wide fence, the
message's sequence number beside it. The host polls that number: 14-17 us after the launch of 8 MiB, where an event takes 16-19.
With TRITON_INTERPRET=1 the same source runs on the CPU, in Triton's interpreter.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from ..errors import TransportUnavailable
from .digest import GOLDEN, SECOND
from .launch import Launcher

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise TransportUnavailable(
        "KV in GPU memory needs triton, which is not installed (it comes with torch for CUDA)"
    ) from error

INTERPRETED = bool(triton.knobs.runtime.interpret)
TILE_WORDS = 2048  # 16 KiB a program, 4 warps: the best or within 5 % of it from 16 to 128 KiB, on an H200 and an H100
CUT_TILE_WORDS = 1024
LIST_TILE_WORDS = 1024
_INTERPRETED = tl.constexpr(INTERPRETED)
_GOLDEN, _SECOND = tl.constexpr(GOLDEN), tl.constexpr(SECOND)
_interpreter = threading.Lock()  # Triton's interpreter patches its own module while it runs


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _weighted(words: tl.tensor, first: tl.tensor) -> tl.tensor:
    """`host_digest` of int64 words, the first of them word `first` (uint64) of the message."""
    bits = words.to(tl.uint64, bitcast=True)
    y = (first + tl.arange(0, words.shape[0]).to(tl.uint64) + 1) * _GOLDEN
    low_weight = (y ^ (y >> 32)) | 1
    high_weight = (((y << 32) | (y >> 32)) ^ _SECOND) | 1
    return tl.sum((bits & 0xFFFFFFFF) * low_weight + (bits >> 32) * high_weight)


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _finish(part: tl.tensor, cell: tl.tensor, programs: tl.tensor, flag: tl.tensor, sequence: tl.tensor) -> None:
    """Add this program's part; the last of the message's `programs` tells the host."""
    i64p = tl.pointer_type(tl.int64)
    sums = cell.to(i64p)
    tl.atomic_add(sums, part.to(tl.int64, bitcast=True), sem="relaxed")
    tl.debug_barrier()  # all of this program's stores come before its count
    finished = tl.atomic_add(sums + 1, 1, sem="acq_rel")
    if finished == programs - 1:
        digest = tl.atomic_xchg(sums, 0, sem="relaxed")
        tl.atomic_xchg(sums + 1, 0, sem="relaxed")
        told = flag.to(i64p)
        tl.store(told + 1, digest)
        tl.debug_barrier()
        if _INTERPRETED:
            tl.store(told, sequence)
        else:
            tl.inline_asm_elementwise(
                "fence.acq_rel.sys; st.relaxed.sys.global.b64 [$1], $2; mov.b32 $0, 0;",
                "=r,l,l",
                [flag, sequence],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


_MOVE_RUNTIME = [
    *("ids", "layers", "layer_step", "list_step", "staged", "first_word"),
    *("cell", "programs", "flag", "sequence", "extent_blocks"),
]
_CUT_RUNTIME = [
    *_MOVE_RUNTIME[:-1],
    *("blocks", "parts", "block_tokens", "first_token", "tokens", "first_head", "heads"),
    *("part_words", "head_words", "token_words"),
]
_DIGEST_RUNTIME = ["staged", "words", "last_mask", "cell", "programs", "flag", "sequence"]


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _address(ids: tl.tensor, layers: tl.tensor, block: tl.tensor) -> tl.tensor:
    """Of a block: its layer's base and stride are the two words at `layers`, its id is word `block` of `ids`."""
    i64p = tl.pointer_type(tl.int64)
    layer = layers.to(i64p)
    return tl.load(layer) + tl.load(ids.to(i64p) + block) * tl.load(layer + 1)


@triton.jit(do_not_specialize=_MOVE_RUNTIME)  # type: ignore[untyped-decorator]  # triton has no types
def _move_blocks(
    ids: tl.int64,
    layers: tl.int64,
    layer_step: tl.int64,
    list_step: tl.int64,
    staged: tl.int64,
    first_word: tl.int64,
    cell: tl.int64,
    programs: tl.int64,
    flag: tl.int64,
    sequence: tl.int64,
    extent_blocks: tl.int64,
    GATHER: tl.constexpr,  # noqa: N803  # the kernel language's style for constants
    BLOCK_WORDS: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
) -> None:
    """One tile of one block a program; block b of the launch is the slot's block b from `staged` on."""
    i64p = tl.pointer_type(tl.int64)
    tiles: tl.constexpr = (BLOCK_WORDS + TILE - 1) // TILE
    program = tl.program_id(0)
    block = program // tiles
    inside = (program % tiles) * TILE
    word = tl.arange(0, TILE)
    at = block.to(tl.int64) * BLOCK_WORDS + inside
    extent = block // extent_blocks
    address = _address(ids, layers + extent * layer_step, extent * list_step + block % extent_blocks)
    paged = tl.multiple_of((address + inside.to(tl.int64) * 8).to(i64p), 16)
    slot = tl.multiple_of((staged + at * 8).to(i64p), 16)
    source, target = slot, paged
    if GATHER:
        source, target = paged, slot
    if BLOCK_WORDS % TILE == 0:
        words = tl.load(source + word)
        tl.store(target + word, words)
    else:
        mask = word < BLOCK_WORDS - inside
        words = tl.load(source + word, mask=mask, other=0)
        tl.store(target + word, words, mask=mask)
    _finish(_weighted(words, (first_word + at).to(tl.uint64)), cell, programs, flag, sequence)


@triton.jit(do_not_specialize=_CUT_RUNTIME)  # type: ignore[untyped-decorator]  # triton has no types
def _move_cut(
    ids: tl.int64,
    layers: tl.int64,
    layer_step: tl.int64,
    list_step: tl.int64,
    staged: tl.int64,
    first_word: tl.int64,
    cell: tl.int64,
    programs: tl.int64,
    flag: tl.int64,
    sequence: tl.int64,
    blocks: tl.int32,
    parts: tl.int32,
    block_tokens: tl.int32,
    first_token: tl.int32,
    tokens: tl.int32,
    first_head: tl.int32,
    heads: tl.int32,
    part_words: tl.int32,
    head_words: tl.int32,
    token_words: tl.int32,
    GATHER: tl.constexpr,  # noqa: N803  # the kernel language's style for constants
    TILE: tl.constexpr,  # noqa: N803
) -> None:
    """One tile of one part of one block of one extent a program: its tokens are one run of the slot.

    In the slot an extent is (parts, tokens, heads, part_words). In a block the next head is `head_words` on, the next
    token `token_words`, the next part `part_words`: both orders. The divisions are of 32 bits, two for each word.
    """
    i64p = tl.pointer_type(tl.int64)
    token_run = heads * part_words
    tiles = (block_tokens * token_run + TILE - 1) // TILE
    program = tl.program_id(0)
    run = program // tiles
    block = run % blocks
    part = run // blocks % parts
    extent = run // blocks // parts
    before = block * block_tokens - first_token  # tokens of the cut in earlier blocks; below 0: not from the first on
    begin = tl.maximum(-before, 0)
    count = tl.minimum(block_tokens, tokens - before) - begin
    first = (program % tiles) * TILE
    word = first + tl.arange(0, TILE)
    mask = word < count * token_run
    piece = word // part_words
    token = begin + piece // heads
    inside = (first_head + piece % heads) * head_words + token * token_words + part * part_words + word % part_words
    at = ((extent * parts + part).to(tl.int64) * tokens + tl.maximum(before, 0)) * token_run + first
    paged = _address(ids, layers + extent * layer_step, extent * list_step + block).to(i64p) + inside
    slot = staged.to(i64p) + at + tl.arange(0, TILE)
    source, target = slot, paged
    if GATHER:
        source, target = paged, slot
    words = tl.load(source, mask=mask, other=0)
    tl.store(target, words, mask=mask)
    _finish(_weighted(words, (first_word + at).to(tl.uint64)), cell, programs, flag, sequence)


@triton.jit(do_not_specialize=_DIGEST_RUNTIME)  # type: ignore[untyped-decorator]  # triton has no types
def _digest_run(
    staged: tl.int64,
    words: tl.int64,
    last_mask: tl.int64,
    cell: tl.int64,
    programs: tl.int64,
    flag: tl.int64,
    sequence: tl.int64,
    TILE: tl.constexpr,  # noqa: N803  # the kernel language's style for constants
) -> None:
    """The digest of `words` words from `staged` on; of the last one only the bits of `last_mask` count."""
    i64p = tl.pointer_type(tl.int64)
    first = tl.program_id(0).to(tl.int64) * TILE
    at = first + tl.arange(0, TILE)
    run = tl.multiple_of((staged + first * 8).to(i64p), 16)
    found = tl.load(run + tl.arange(0, TILE), mask=at < words, other=0)
    found = tl.where(at == words - 1, found & last_mask, found)
    _finish(_weighted(found, first.to(tl.uint64)), cell, programs, flag, sequence)


@triton.jit(do_not_specialize=["source", "target", "words"])  # type: ignore[untyped-decorator]  # triton has no types
def _fetch_list(
    source: tl.int64,
    target: tl.int64,
    words: tl.int64,
    TILE: tl.constexpr,  # noqa: N803  # the kernel language's style for constants
) -> None:
    """Copy a list of blocks from pinned memory, for the launches behind it."""
    i64p = tl.pointer_type(tl.int64)
    word = tl.program_id(0) * TILE + tl.arange(0, TILE)
    found = tl.load(source.to(i64p) + word, mask=word < words, other=0)
    tl.store(target.to(i64p) + word, found, mask=word < words)


class Report(NamedTuple):
    """Where a message's launches add up, and what they tell the host when all programs are through."""

    cell: int  # address of two int64 words in device memory, both zero
    programs: int  # of all launches of the message
    flag: int  # address of two int64 words in pinned memory: sequence, digest
    sequence: int


class Cutting(NamedTuple):
    """Some tokens and heads of blocks of one shape, for one or more extents (their blocks one after the other)."""

    blocks: int  # of each extent
    parts: int
    block_tokens: int
    first_token: int  # within the first block
    tokens: int
    first_head: int
    heads: int
    part_words: int  # of one token and head
    head_words: int  # from one head to the next within a block
    token_words: int  # from one token to the next


class Listed(NamedTuple):
    """Where a launch reads where its blocks are. Each extent has a layer, and a list that may be the last one's too."""

    ids: int  # address of int64 block ids
    layers: int  # address of two int64 words: address of the first extent's layer, bytes from one block to the next
    layer_step: int  # bytes from an extent's words there to the next extent's
    list_step: int  # ids from an extent's first to the next extent's first; 0: they have one list


class Staged(NamedTuple):
    """Where a launch's bytes are in the slot and in the message."""

    address: int
    first_word: int


class Launch(NamedTuple):
    """What every launch of a message needs to know."""

    stream: int  # CUDA handle
    listed: Listed
    staged: Staged
    report: Report


class Whole(NamedTuple):
    """Whole blocks of one size."""

    block_bytes: int
    blocks: int  # of all extents of the launch
    extent_blocks: int


def tile_words(block_words: int) -> int:
    """Words a program moves: the largest power of two, 256 to 2048, that leaves under a quarter of the lanes idle."""
    tile = TILE_WORDS
    while tile > 256 and -(-block_words // tile) * tile * 4 > block_words * 5:
        tile //= 2
    return tile


def move_programs(block_bytes: int, blocks: int) -> int:
    """Programs that move so many blocks of that size."""
    words = block_bytes // 8
    return blocks * -(-words // tile_words(words))


def digest_programs(nbytes: int) -> int:
    """Programs of a digest over so many bytes."""
    return -(-nbytes // (8 * TILE_WORDS))


def cut_programs(cutting: Cutting) -> int:
    """Programs that move one extent of that cut."""
    words = cutting.block_tokens * cutting.heads * cutting.part_words
    return cutting.blocks * cutting.parts * -(-words // CUT_TILE_WORDS)


class Kernels:
    """The kernels compiled for the current device and some block sizes. Thread-safe."""

    def __init__(self, block_bytes: Iterable[int]) -> None:
        # Compiled ones: `kernel[grid](...)` of the public interface costs 21-48 us a call, a compiled one 6-10.
        self._whole: dict[tuple[bool, int], Any] = {}  # triton's CompiledKernel has no type
        self._direct: dict[object, Launcher] = {}  # by the same, and None: the digest
        for size in sorted(set(block_bytes)):
            for is_gather in (True, False):
                kernel = _compiled(_move_blocks, len(_MOVE_RUNTIME), *_constants(is_gather, size))
                self._whole[is_gather, size] = kernel
                if not INTERPRETED and (direct := Launcher.of(kernel, len(_MOVE_RUNTIME))):
                    self._direct[is_gather, size] = direct
        self._cut = {
            is_gather: _compiled(_move_cut, len(_CUT_RUNTIME), is_gather, CUT_TILE_WORDS) for is_gather in (True, False)
        }
        self._digest = _compiled(_digest_run, len(_DIGEST_RUNTIME), TILE_WORDS)
        if not INTERPRETED and (direct := Launcher.of(self._digest, len(_DIGEST_RUNTIME))):
            self._direct[None] = direct
        self._fetch = _compiled(_fetch_list, 3, LIST_TILE_WORDS)

    def fetch(self, stream: int, source: int, target: int, words: int) -> None:
        """Launch a copy of a list from pinned memory into device memory."""
        _launch(self._fetch, -(-words // LIST_TILE_WORDS), stream, (source, target, words, LIST_TILE_WORDS))

    def move(self, launch: Launch, whole: Whole, *, is_gather: bool) -> None:
        """Launch one pass over whole blocks."""
        stream, listed, staged, report = launch
        arguments = (*listed, *staged, *report, whole.extent_blocks)
        programs = move_programs(whole.block_bytes, whole.blocks)
        if direct := self._direct.get((is_gather, whole.block_bytes)):
            direct(programs, stream, arguments)
            return
        constants = _constants(is_gather, whole.block_bytes)
        _launch(self._whole[is_gather, whole.block_bytes], programs, stream, (*arguments, *constants))

    def move_cut(self, launch: Launch, cutting: Cutting, extents: int, *, is_gather: bool) -> None:
        """Launch one pass over so many extents of one cut."""
        stream, listed, staged, report = launch
        arguments = (*listed, *staged, *report, *cutting, is_gather, CUT_TILE_WORDS)
        _launch(self._cut[is_gather], cut_programs(cutting) * extents, stream, arguments)

    def digest(self, stream: int, staged: int, nbytes: int, report: Report) -> None:
        """Launch a digest over the bytes at `staged`, as a message of their own."""
        words = -(-nbytes // 8)
        spare_bits = words * 64 - nbytes * 8
        last_mask = -1 if not spare_bits else (1 << (64 - spare_bits)) - 1
        arguments, programs = (staged, words, last_mask, *report), digest_programs(nbytes)
        if direct := self._direct.get(None):
            direct(programs, stream, arguments)
        else:
            _launch(self._digest, programs, stream, (*arguments, TILE_WORDS))


def _constants(is_gather: bool, block_bytes: int) -> tuple[bool, int, int]:
    return is_gather, block_bytes // 8, tile_words(block_bytes // 8)


def _compiled(kernel: Any, parameters: int, *constants: int) -> Any:
    if INTERPRETED:
        return kernel
    compiled = kernel.warmup(*([0] * parameters), *constants, grid=(1,), num_warps=4)
    compiled[(1, 1, 1)]  # Loads the code into the GPU now, not at the first message.
    return compiled


def _launch(kernel: Any, programs: int, stream: int, arguments: tuple[int, ...]) -> None:
    if not INTERPRETED:
        kernel[(programs, 1, 1)](*arguments, stream=stream)
        return
    with _interpreter, np.errstate(over="ignore"):  # The digest is arithmetic modulo 2^64.
        kernel[(programs,)](*arguments)
