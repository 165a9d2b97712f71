"""The digest of KV in GPU memory, in numpy: what goes wrong on a link is seen."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hocket.transport.gpu.digest import host_digest

MASK = (1 << 64) - 1
MESSAGES = st.binary(min_size=16, max_size=4096)


def plain_digest(data: bytes) -> int:
    """As it is written down, a word at a time."""
    total = 0
    for index in range(-(-len(data) // 8)):
        word = int.from_bytes(data[index * 8 : index * 8 + 8].ljust(8, b"\0"), "little")
        y = (index + 1) * 0x9E3779B97F4A7C15 & MASK
        low_weight = (y ^ (y >> 32)) | 1
        high_weight = (((y << 32) | (y >> 32)) & MASK ^ 0xD1B54A32D192ED03) | 1
        total += (word & 0xFFFFFFFF) * low_weight + (word >> 32) * high_weight
    return total & MASK


@given(st.binary(max_size=4096))
@settings(deadline=None)
def test_it_is_the_sum_of_weighted_halves(data: bytes) -> None:
    assert host_digest(data) == plain_digest(data)
    assert host_digest(np.frombuffer(data, np.uint8)) == plain_digest(data)


def test_a_message_of_several_pieces_is_one_run_of_words() -> None:
    data = np.random.default_rng(1).integers(0, 256, (3 << 19) + 5, np.uint8)
    assert host_digest(data) == plain_digest(data.tobytes())


@given(MESSAGES, st.data())
@settings(deadline=None)
def test_a_flipped_bit_is_seen(data: bytes, draw: st.DataObject) -> None:
    bit = draw.draw(st.integers(0, len(data) * 8 - 1))
    wrong = bytearray(data)
    wrong[bit // 8] ^= 1 << bit % 8
    assert host_digest(bytes(wrong)) != host_digest(data)


@given(MESSAGES, st.data())
@settings(deadline=None)
def test_any_wrong_half_of_a_word_is_seen(data: bytes, draw: st.DataObject) -> None:
    half = draw.draw(st.integers(0, len(data) // 4 - 1)) * 4
    put = draw.draw(st.binary(min_size=4, max_size=4))
    assume(put != data[half : half + 4])
    assert host_digest(data[:half] + put + data[half + 4 :]) != host_digest(data)


@pytest.fixture
def message() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(7).integers(0, 256, 1 << 16, np.uint8)


def test_the_top_bits_of_two_words_do_not_cancel(message: npt.NDArray[np.uint8]) -> None:
    """With one odd weight a word they would, for every pair."""
    right = host_digest(message)
    for other in range(1, 200):
        wrong = message.copy()
        wrong[7] ^= 0x80
        wrong[other * 8 + 7] ^= 0x80
        assert host_digest(wrong) != right


def test_swaps_shifts_and_zeroed_tails_are_seen(message: npt.NDArray[np.uint8]) -> None:
    right = host_digest(message)
    random = np.random.default_rng(8)
    words = message.view(np.uint64)
    for _ in range(400):
        first, second = random.integers(0, len(words), 2)
        wrong = words.copy()
        wrong[[first, second]] = wrong[[second, first]]
        assert host_digest(wrong.view(np.uint8)) != right or first == second
    blocks = message.reshape(16, -1)
    assert host_digest(blocks[[1, 0, *range(2, 16)]].reshape(-1)) != right
    assert host_digest(np.roll(message, 8)) != right
    assert host_digest(np.concatenate([message[:-4096], np.zeros(4096, np.uint8)])) != right
    assert host_digest(np.concatenate([message, message[:8]])) != right
