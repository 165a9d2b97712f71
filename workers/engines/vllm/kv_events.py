"""vLLM's KV events, in Hocket's own block hashes.

A model with several KV groups tells of each group's blocks, under the same hashes. Only one group's count here, that of
full attention: it keeps whole prefixes, while a window's blocks come and go behind it. A prefix that is told is therefore an
upper bound of the hit: the engine also needs the window before its end, which may have been taken back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import msgspec

from ....bus.block_hash import block_hashes_of
from ....bus.messages import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent
from .versions import Unchecked

log = logging.getLogger(__name__)
EngineHash = int | bytes


class _Event(msgspec.Struct, tag_field="type"):
    """vllm.distributed.kv_events; fields that are not needed are left out."""


class _Stored(_Event, tag="BlockStored"):
    block_hashes: list[EngineHash]
    parent_block_hash: EngineHash | None
    token_ids: list[int]
    block_size: int
    group_idx: int | None = None


class _Removed(_Event, tag="BlockRemoved"):
    block_hashes: list[EngineHash]
    group_idx: int | None = None


class _Cleared(_Event, tag="AllBlocksCleared"):
    pass


class _Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[_Stored | _Removed | _Cleared]


_decoder: msgspec.msgpack.Decoder[_Batch] = msgspec.msgpack.Decoder(_Batch)


class Translator:
    """Keeps which engine hash is which of ours: as many as the engine has blocks, for it says when one leaves."""

    def __init__(self, group: int = 0) -> None:
        self._group = group  # the one that counts
        self._own: dict[EngineHash, int] = {}
        self._next_seq = 0

    def __len__(self) -> int:
        return len(self._own)

    def translate(self, seq: int, payload: bytes) -> list[KvEvent]:
        """One published batch. After a gap the cache counts as empty: what was lost may have been a removal."""
        events: list[KvEvent] = []
        if seq != self._next_seq:
            log.warning("missed KV event batches %d to %d of the engine", self._next_seq, seq - 1)
            self._own.clear()
            events.append(AllBlocksCleared())
        self._next_seq = seq + 1
        for event in _decoder.decode(payload).events:
            events += self._event(event)
        return events

    def _event(self, event: _Stored | _Removed | _Cleared) -> Sequence[KvEvent]:
        match event:
            case _Stored() | _Removed() if event.group_idx not in (None, self._group):
                return []
            case _Stored():
                return self._stored(event)
            case _Removed():
                known = [self._own.pop(block) for block in event.block_hashes if block in self._own]
                return [BlockRemoved(known)] if known else []
            case _Cleared():
                self._own.clear()
                return [AllBlocksCleared()]

    def _stored(self, event: _Stored) -> Sequence[KvEvent]:
        parent = None
        if event.parent_block_hash is not None:
            parent = self._own.get(event.parent_block_hash)
            if parent is None:
                return []  # Its chain was lost in a gap: nobody could find it by a prompt.
        hashes = block_hashes_of(event.token_ids, event.block_size, parent=parent)
        self._own.update(zip(event.block_hashes, hashes, strict=True))
        return [BlockStored(hashes, parent)]


class Subscription:
    """vLLM's event publisher in another process, over its ipc socket."""

    def __init__(self, endpoint: str, group: int) -> None:
        from zmq.asyncio import Context  # vLLM brings it.
        from zmq.constants import SocketOption, SocketType

        self._translator = Translator(group)
        self._context: Unchecked = Context()
        self._socket: Unchecked = self._context.socket(SocketType.SUB)
        self._socket.setsockopt(SocketOption.SUBSCRIBE, b"")
        self._socket.setsockopt(SocketOption.RCVHWM, 0)  # A lost event costs the whole index.
        # May come before the publisher binds: nothing is published before the first request.
        self._socket.connect(endpoint)

    async def run(self, handle: Callable[[list[KvEvent]], None]) -> None:
        """Give every batch to `handle`, until cancelled."""
        while True:
            _, seq, payload = await self._socket.recv_multipart()
            events = self._translator.translate(int.from_bytes(seq, "big"), payload)
            if events:
                handle(events)

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()
