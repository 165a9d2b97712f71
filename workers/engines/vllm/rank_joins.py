"""What the tensor-parallel ranks of one engine report, as the engine's own word: no I/O, no vLLM.

Each rank has an endpoint in a process of its own and reports each hand-off once. A hand-off has landed when it has in every
rank; where one fails the others are told to give up, for what they bring helps nobody. vLLM itself counts the ranks in which
a request was sent or received, and takes the blocks that any of them calls bad.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from ....transport.base import HandoffKey
from .kv_tensors import UnfitKv
from .side_channel import RankFailed, Ready, ReceiveEnded, SendEnded

Ended = SendEnded | ReceiveEnded


def joined_ready(ranks: Sequence[Ready]) -> Ready:
    """The engine's own: addresses of each rank in turn. Raises UnfitKv when its ranks do not fit together."""
    ranks = sorted(ranks, key=lambda ready: ready.layout.shape.tp_rank)
    if len({ready.layout.fingerprint() for ready in ranks}) != 1:
        raise UnfitKv("the tensor-parallel ranks lay their KV out differently")
    if len({len(ready.addresses) for ready in ranks}) != 1:
        listens = "; ".join(" ".join(ready.addresses) or "nowhere" for ready in ranks)
        raise UnfitKv(f"the tensor-parallel ranks do not listen in the same ways: {listens}")
    addresses = tuple(address for ready in ranks for address in ready.addresses)
    return Ready(addresses, ranks[0].layout, min(ready.blocks for ready in ranks))


@dataclass(slots=True)
class _Join:
    missing: int
    end: Ended


@dataclass(slots=True)
class RankJoins:
    """Of one engine, which starts with `ready`."""

    _ready: dict[int, Ready] = field(default_factory=dict)
    _open: dict[HandoffKey | bytes, _Join] = field(default_factory=dict)
    _ranks: int = 1

    def ready(self, note: Ready) -> Ready | None:
        """The engine's when this was the last rank. Raises UnfitKv."""
        self._ranks = note.layout.shape.tp_size
        self._ready[note.layout.shape.tp_rank] = note
        return joined_ready(list(self._ready.values())) if len(self._ready) == self._ranks else None

    def ended(self, note: Ended) -> tuple[Ended | None, RankFailed | None]:
        """(The hand-off's end when this was the last rank, what to tell the other ranks)."""
        name = note.key if isinstance(note, SendEnded) else note.token
        join = self._open.get(name)
        was_failing = join is not None and not join.end.is_landed
        if join is None:
            join = self._open[name] = _Join(self._ranks, note)
        else:
            join.end = _joined(join.end, note)
        join.missing -= 1
        if not join.missing:
            del self._open[name]
            return join.end, None
        return None, None if note.is_landed or was_failing else RankFailed(name, note.reason)


def _joined(one: Ended, other: Ended) -> Ended:
    is_landed, reason = one.is_landed and other.is_landed, one.reason or other.reason
    kv_bytes = one.kv_bytes + other.kv_bytes
    joined = msgspec.structs.replace(one, is_landed=is_landed, reason=reason, kv_bytes=kv_bytes)
    if isinstance(joined, ReceiveEnded) and isinstance(other, ReceiveEnded):
        return msgspec.structs.replace(joined, valid_token=min(joined.valid_token, other.valid_token))
    return joined
