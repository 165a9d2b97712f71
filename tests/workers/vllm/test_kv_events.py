"""vLLM's KV events in Hocket's hashes."""

from __future__ import annotations

import msgspec

from hocket.bus.block_hash import block_hashes_of
from hocket.bus.messages import AllBlocksCleared, BlockRemoved, BlockStored
from hocket.workers.engines.vllm.kv_events import Translator

BLOCK = 4
PROMPT = list(range(12))
OWN = block_hashes_of(PROMPT, BLOCK)


def batch(*events: dict[str, object]) -> bytes:
    """As vLLM's publisher encodes it: an array of time, tagged maps and the data parallel rank."""
    return msgspec.msgpack.encode([1.0, list(events), 0])


def stored(hashes: list[object], parent: object, tokens: list[int], group: int | None = None) -> dict[str, object]:
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": tokens,
        "block_size": BLOCK,
        "lora_id": None,
        "medium": "GPU",
        "group_idx": group,
    }


def removed(*hashes: object, group: int | None = None) -> dict[str, object]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU", "group_idx": group}


def test_a_chain_that_is_stored_in_parts_has_the_hashes_of_the_whole_prompt() -> None:
    translator = Translator()
    assert translator.translate(0, batch(stored([91, 92], None, PROMPT[:8]))) == [BlockStored(OWN[:2], None)]
    assert translator.translate(1, batch(stored([93], 92, PROMPT[8:]))) == [BlockStored(OWN[2:], OWN[1])]


def test_hashes_may_be_bytes() -> None:
    translator = Translator()
    assert translator.translate(0, batch(stored([b"\x01" * 32], None, PROMPT[:4]))) == [BlockStored(OWN[:1], None)]
    assert translator.translate(1, batch(removed(b"\x01" * 32))) == [BlockRemoved(OWN[:1])]


def test_a_removed_block_is_forgotten() -> None:
    translator = Translator()
    translator.translate(0, batch(stored([91, 92], None, PROMPT[:8])))
    assert translator.translate(1, batch(removed(92))) == [BlockRemoved([OWN[1]])]
    assert translator.translate(2, batch(removed(92))) == []
    assert len(translator) == 1


def test_a_gap_empties_the_cache_and_orphans_are_left_out() -> None:
    translator = Translator()
    translator.translate(0, batch(stored([91], None, PROMPT[:4])))
    events = translator.translate(2, batch(stored([93], 91, PROMPT[4:8]), stored([94], None, PROMPT[:4])))
    assert events == [AllBlocksCleared(), BlockStored(OWN[:1], None)]


def test_a_reset_cache_is_empty() -> None:
    translator = Translator()
    translator.translate(0, batch(stored([91], None, PROMPT[:4])))
    assert translator.translate(1, batch({"type": "AllBlocksCleared"})) == [AllBlocksCleared()]
    assert len(translator) == 0


def test_of_several_groups_only_the_one_with_whole_prefixes_counts() -> None:
    translator = Translator(group=2)
    events = translator.translate(
        0,
        batch(
            stored([92], 91, PROMPT[4:8], 0), stored([91, 92], None, PROMPT[:8], 2), stored([91], None, PROMPT[:4], 1)
        ),
    )
    assert events == [BlockStored(OWN[:2], None)]
    assert translator.translate(1, batch(removed(91, 92, group=0))) == []
    assert translator.translate(2, batch(removed(92, group=2))) == [BlockRemoved([OWN[1]])]
