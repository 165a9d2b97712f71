"""Whole hand-offs over each link: every byte is compared."""

from __future__ import annotations

import numpy as np
import pytest
from transport_rig import Pair, differing_blocks

from hocket.transport import SendEnd

SCHEMES = ["inproc", "tcp", "ucx"]


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_every_byte_of_scattered_blocks_arrives(make_pair, scheme: str) -> None:
    pair: Pair = await make_pair(scheme)
    rng = np.random.default_rng(3)
    from_ids, to_ids = rng.permutation(64)[:40].tolist(), rng.permutation(64)[:40].tolist()
    key = pair.key()
    pair.expect(key, to_ids)
    pair.open(key, 40)
    pair.push(key, from_ids)
    await pair.both_ended()
    assert pair.ends.received[0].is_landed
    assert pair.ends.received[0].good_blocks == 40
    assert pair.ends.send_end == SendEnd(key, True, 40 * pair.source.layout.block_bytes)
    assert differing_blocks(pair.source, from_ids, pair.target, to_ids) == []
