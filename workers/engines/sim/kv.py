"""The simulator's KV and how it makes tokens: every cell is a function of the whole prefix, every token of all cells.

A cell is 8 bytes for one (layer, position). A `state` is the hash of the tokens up to a position; its cells follow from
it alone. An `answer` is what reading the cells of all positions gives; the next token follows from it alone. So the KV of
another prompt, of another position, of an older time, or with one bit changed, gives another token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from ....bus.messages import FINISH_LENGTH, FINISH_STOP, SamplingParams, TokenLogprob
from ....transport.layout import KvLayout
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


def cells_of(states: Sequence[int], layers: int) -> U64:
    """The right cells, (layers, positions)."""
    offsets = np.array([(layer + 1) * _GOLDEN & _MASK for layer in range(layers)], np.uint64)
    return _mix(np.array(states, np.uint64)[None, :] + offsets[:, None])


def _position_digests(cells: U64) -> U64:
    """One digest for each position over the cells (layers, positions) found there."""
    salts = np.array([(layer + 1) * _FACTOR & _MASK for layer in range(len(cells))], np.uint64)
    digests: U64 = _mix(cells ^ salts[:, None]).sum(axis=0, dtype=np.uint64)
    return digests


def fold(answers: U64, cells: U64) -> U64:
    """Each answer after one more position, whose cells are the columns of (layers, answers)."""
    return answers * np.uint64(_FACTOR) + _position_digests(cells)


def read_answer(cells: U64) -> int:
    """The answer that reading the cells (layers, positions) of a whole prefix gives: `fold` from 0, position by position."""
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
    token_ids: Sequence[int], sampling: SamplingParams, *, layers: int, vocabulary: range, max_model_len: int = 1 << 31
) -> list[int]:
    """The right answer to a prompt, from the prompt alone: what a cluster of simulators must say."""
    states = next_states(ROOT_STATE, token_ids)
    state = states[-1]
    answer = read_answer(cells_of(states, layers))
    tokens_max = min(sampling.max_tokens, max_model_len - len(token_ids))
    made: list[int] = []
    while True:
        token_id = choose(answer, sampling, vocabulary)
        made.append(token_id)
        if finish_of(token_id, len(made), tokens_max, sampling):
            return made
        (state,) = next_states(state, [token_id])
        answer = int(fold(np.array([answer], np.uint64), cells_of([state], layers))[0])


def sim_layout(model: str, *, block_tokens: int, layers: int) -> KvLayout:
    """What prefill and decode simulators must agree on."""
    return KvLayout(
        model=model,
        revision="sim",
        dtype="uint64",
        kv_dtype="uint64",
        block_tokens=block_tokens,
        layer_names=tuple(f"sim.{layer}" for layer in range(layers)),
        layer_block_bytes=(CELL_BYTES * block_tokens,) * layers,
        kv_heads=1,
        head_size=1,
    )


class SimKv:
    """The paged cells of one engine: (layers, blocks, block_tokens), and the pool that the transport moves them by."""

    def __init__(self, layout: KvLayout, blocks: int) -> None:
        self.layers = len(layout.layer_names)
        self.block_tokens = layout.block_tokens
        self._cells: U64 = np.full((self.layers, blocks, layout.block_tokens), 0xDEADBEEF, np.uint64)
        self.pool = HostKvPool(layout, list(self._cells.view(np.uint8)))

    def write(self, layer: int, block_ids: Sequence[int], cells: U64) -> None:
        """Fill one layer of these blocks from their start (the last one perhaps not to its end)."""
        places = np.arange(len(cells))
        blocks = np.array(block_ids)[places // self.block_tokens]
        self._cells[layer, blocks, places % self.block_tokens] = cells

    def append(
        self, blocks: Sequence[int], offsets: Sequence[int], states: Sequence[int], answers: Sequence[int]
    ) -> U64:
        """Write one token for each of many requests and fold in what is read back; their new answers."""
        where = (slice(None), np.array(blocks), np.array(offsets))
        self._cells[where] = cells_of(states, self.layers)
        return fold(np.array(answers, np.uint64), self._cells[where])

    def read(self, block_ids: Sequence[int], positions: int) -> int:
        """The answer that the bytes of these blocks give."""
        found = self._cells[:, np.array(block_ids)].reshape(self.layers, -1)[:, :positions]
        return read_answer(found)
