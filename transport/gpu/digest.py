"""The "weighted" digest in numpy: what the kernels compute, for bytes in host memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# 2^64 divided by the golden ratio, and an odd constant of splitmix64: successive multiples differ in all bits.
GOLDEN = 0x9E3779B97F4A7C15
SECOND = 0xD1B54A32D192ED03
_PIECE_WORDS = 1 << 16  # temporaries stay in the cache


def host_digest(buffer: npt.NDArray[np.uint8] | bytes | bytearray | memoryview) -> int:
    """64 bits over the 8-byte little-endian words of a message (its end filled with zeros): position counts.

    The sum of low half * a1(i) + high half * a2(i) modulo 2^64, with odd weights of their own for each half of each word
    i: one wrong half is always seen, and so are swapped words, shifts and, but for one case in 2^63 or so, anything else.
    """
    data = np.frombuffer(buffer, np.uint8) if not isinstance(buffer, np.ndarray) else buffer.reshape(-1)
    words = len(data) // 8
    total = 0
    for first in range(0, words, _PIECE_WORDS):
        end = min(words, first + _PIECE_WORDS)
        total += _digest_words(data[first * 8 : end * 8].view(np.uint64), first)
    if len(data) % 8:
        total += _digest_words(np.frombuffer(bytes(data[words * 8 :]).ljust(8, b"\0"), np.uint64), words)
    return total % (1 << 64)


def _digest_words(words: npt.NDArray[np.uint64], first: int) -> int:
    half = np.uint64(32)
    y = np.arange(first + 1, first + 1 + len(words), dtype=np.uint64) * np.uint64(GOLDEN)
    low_weight = (y ^ (y >> half)) | np.uint64(1)
    high_weight = (((y << half) | (y >> half)) ^ np.uint64(SECOND)) | np.uint64(1)
    products = (words & np.uint64(0xFFFFFFFF)) * low_weight + (words >> half) * high_weight
    return int(products.sum(dtype=np.uint64))
