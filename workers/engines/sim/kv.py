"""The simulator's KV and how it makes tokens: every cell is a function of the whole prefix, every token of all cells.

A cell is 8 bytes for one (layer, head, position); a plane is one (layer, head). A `state` is the hash of the tokens up
to a position; its cells follow from it alone. An `answer` is what reading the cells of all positions gives; the next token
follows from it alone. So the KV of another prompt, of another position, of an older time, or with one bit changed, gives
another token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from ....bus.messages import FINISH_LENGTH, FINISH_STOP, SamplingParams, TokenLogprob
from ....transport.host_memory import SharedPages
from ....transport.layout import KvLayer, KvLayout, KvShape
from ....transport.pool import HostKvPool

U64 = npt.NDArray[np.uint64]
CELL_BYTES = 8
ROOT_STATE = 0x53494D
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # the constants of splitmix64
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_FACTOR = 0xD1342543DE82EF95  # odd: no cell's difference is lost when later positions are folded in
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)


def _mix(values: U64) -> U64:
    """splitmix64's finalizer, on each element."""
    values = (values ^ (values >> _SHIFT_1)) * _MIX_1
    values = (values ^ (values >> _SHIFT_2)) * _MIX_2
    return values ^ (values >> _SHIFT_3)


def next_states(state: int, token_ids: Sequence[int]) -> list[int]:
    """The state after each of these tokens, that follow `state`."""
    digest = xxhash.xxh3_64_intdigest
    states = []
    for token_id in token_ids:
        state = digest(token_id.to_bytes(4, "little"), seed=state)
        states.append(state)
    return states


def cells_of(states: Sequence[int], planes: int) -> U64:
    """The right cells, (planes, positions)."""
    offsets = np.array([(plane + 1) * _GOLDEN & _MASK for plane in range(planes)], np.uint64)
    return _mix(np.array(states, np.uint64)[None, :] + offsets[:, None])


def _position_digests(cells: U64) -> U64:
    """One digest for each position over the cells (planes, positions) found there."""
    salts = np.array([(plane + 1) * _FACTOR & _MASK for plane in range(len(cells))], np.uint64)
    digests: U64 = _mix(cells ^ salts[:, None]).sum(axis=0, dtype=np.uint64)
    return digests


def fold(answers: U64, cells: U64) -> U64:
    """Each answer after one more position, whose cells are the columns of (planes, answers)."""
    return answers * np.uint64(_FACTOR) + _position_digests(cells)


def read_answer(cells: U64) -> int:
    """The answer that reading the cells (planes, positions) of a whole prefix gives: `fold` from 0, position by position."""
    positions = cells.shape[1]
    factors = np.full(positions, _FACTOR, np.uint64)
    factors[-1:] = 1
    weights = np.multiply.accumulate(factors[::-1])[::-1]
    return int((_position_digests(cells) * weights).sum(dtype=np.uint64))


def choose(answer: int, sampling: SamplingParams, vocabulary: range) -> int:
    """The next token id. Greedy at temperature 0; else the seed takes part (none counts as 0)."""
    seed = (sampling.seed or 0) & _MASK if sampling.temperature > 0 else 0
    return vocabulary[xxhash.xxh3_64_intdigest(answer.to_bytes(8, "little"), seed=seed) % len(vocabulary)]


def logprob_of(answer: int, token_id: int, count: int, vocabulary: range) -> TokenLogprob:
    """A believable log probability of the chosen token and of the `count` likeliest ones, the chosen one first."""
    best = -0.3 - (answer & 0xFFFF) / 0x10000
    chosen = vocabulary.index(token_id)
    top = tuple((vocabulary[(chosen + rank) % len(vocabulary)], best - 1.5 * rank) for rank in range(count))
    return TokenLogprob(best, top)


def finish_of(token_id: int, made: int, tokens_max: int, sampling: SamplingParams) -> int:
    """FINISH_* after `token_id` as the answer's token number `made` (from 1) of at most `tokens_max`; 0 to go on."""
    if token_id in sampling.stop_token_ids and made >= sampling.min_tokens:
        return FINISH_STOP
    return FINISH_LENGTH if made >= tokens_max else 0


def expected_tokens(
    token_ids: Sequence[int], sampling: SamplingParams, *, planes: int, vocabulary: range, max_model_len: int = 1 << 31
) -> list[int]:
    """The right answer to a prompt, from the prompt alone: what a cluster of simulators of so many planes must say."""
    states = next_states(ROOT_STATE, token_ids)
    state = states[-1]
    answer = read_answer(cells_of(states, planes))
    tokens_max = min(sampling.max_tokens, max_model_len - len(token_ids))
    made: list[int] = []
    while True:
        token_id = choose(answer, sampling, vocabulary)
        made.append(token_id)
        if finish_of(token_id, len(made), tokens_max, sampling):
            return made
        (state,) = next_states(state, [token_id])
        answer = int(fold(np.array([answer], np.uint64), cells_of([state], planes))[0])


def sim_layouts(
    model: str, *, block_tokens: int, layers: int, heads: int = 1, tp_size: int = 1, order: str = "HND"
) -> list[KvLayout]:
    """The ranks of one simulator; what prefill and decode must agree on is in every one's fingerprint."""
    kv_layers = tuple(KvLayer(f"sim.{layer}", heads, CELL_BYTES) for layer in range(layers))
    shapes = [KvShape((block_tokens,), order, tp_size, rank) for rank in range(tp_size)]
    return [KvLayout(model, "sim", "uint64", "uint64", kv_layers, shape) for shape in shapes]


class _Rank:
    """One rank's cells, and the pool that the transport moves them by."""

    def __init__(self, layout: KvLayout, blocks: int) -> None:
        self.heads = layout.rank_heads(0)
        shape = (len(self.heads), layout.block_tokens(0))
        is_by_head = layout.shape.order == "HND"
        cells_shape = (len(layout.layers), blocks, *(shape if is_by_head else shape[::-1]))
        memory = SharedPages(8 * math.prod(cells_shape), touch=True).array
        cells: U64 = memory.view(np.uint64).reshape(cells_shape)
        cells[:] = 0xDEADBEEF
        by_block: U64 = cells if is_by_head else cells.swapaxes(2, 3)
        self.cells: U64 = by_block.swapaxes(1, 2)  # (layers, heads, blocks, block_tokens), in place
        self.pool = HostKvPool(layout, list(cells.reshape(len(layout.layers), blocks, -1).view(np.uint8)))


class SimKv:
    """The paged cells of one engine, in one or several ranks."""

    def __init__(self, layouts: Sequence[KvLayout], blocks: int) -> None:
        self.layers = len(layouts[0].layers)
        self.heads = layouts[0].layers[0].heads
        self.planes = self.layers * self.heads
        self.block_tokens = layouts[0].block_tokens(0)
        self.blocks = blocks
        self._ranks = [_Rank(layout, blocks) for layout in layouts]
        self.pools = [rank.pool for rank in self._ranks]

    def write(self, layer: int, block_ids: Sequence[int], cells: U64) -> None:
        """Fill one layer of these blocks from their start (the last one perhaps not to its end); cells (heads, positions)."""
        places = np.arange(cells.shape[1])
        blocks = np.array(block_ids)[places // self.block_tokens]
        for rank in self._ranks:
            rank.cells[layer][:, blocks, places % self.block_tokens] = cells[rank.heads.start : rank.heads.stop]

    def append(
        self, blocks: Sequence[int], offsets: Sequence[int], states: Sequence[int], answers: Sequence[int]
    ) -> U64:
        """Write one token for each of many requests and fold in what is read back; their new answers."""
        where = (slice(None), slice(None), np.array(blocks), np.array(offsets))
        cells = cells_of(states, self.planes).reshape(self.layers, self.heads, -1)
        for rank in self._ranks:
            rank.cells[where] = cells[:, rank.heads.start : rank.heads.stop]
        return fold(np.array(answers, np.uint64), self._found([rank.cells[where] for rank in self._ranks]))

    def read(self, block_ids: Sequence[int], positions: int) -> int:
        """The answer that the bytes of these blocks give."""
        blocks = np.array(block_ids)
        shape = (self.layers, -1, len(block_ids) * self.block_tokens)
        return read_answer(
            self._found([rank.cells[:, :, blocks].reshape(shape)[:, :, :positions] for rank in self._ranks])
        )

    def _found(self, ranks: list[U64]) -> U64:
        """The cells (planes, ...) of all ranks; where two have the same head, a difference between them shows."""
        if len(ranks) == 1:
            return ranks[0].reshape(self.planes, -1)
        found: U64 = np.zeros((self.layers, self.heads, ranks[0].shape[-1]), np.uint64)
        seen: set[int] = set()
        for rank, cells in zip(self._ranks, ranks, strict=True):
            for index, head in enumerate(rank.heads):
                if head in seen:
                    found[:, head] += found[:, head] != cells[:, index]
                else:
                    found[:, head] = cells[:, index]
                seen.add(head)
        return found.reshape(self.planes, -1)
