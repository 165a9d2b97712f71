"""A worker whose KV lies in several tensor-parallel ranks.

A hand-off of such a worker is one hand-off for every pair of ranks that share heads. Each rank has its own endpoint and
each pair a token of its own, so the state machines see ordinary hand-offs. The worker's hand-off has landed when all have;
what is good of it is good in all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

import xxhash

from .base import (
    Chunk,
    Expectation,
    HandoffEndpointLike,
    HandoffKey,
    ReceiveEnd,
    SendEnd,
    SendOrder,
    SendReleased,
)
from .endpoint import EndpointStats
from .errors import HandoffRefused
from .layout import KvLayout
from .probe import ProbeReport
from .wire import senders_of

T = TypeVar("T")
BUSY_TRIES = 20
BUSY_S = 0.1


def pair_token(token: bytes, from_rank: int, to_rank: int) -> bytes:
    """The token of one pair of ranks; nobody without the worker's token can make it."""
    return xxhash.xxh3_128_digest(token + bytes([from_rank >> 8, from_rank & 255, to_rank >> 8, to_rank & 255]))


def incoming(layout: KvLayout, token: bytes, from_ranks: int, to_rank: int) -> list[bytes]:
    """The tokens that the decode rank `to_rank` of a worker like `layout` expects, when `from_ranks` prefill ranks send."""
    if from_ranks == layout.shape.tp_size == 1:
        return [token]
    senders = senders_of(layout, from_ranks, layout.shape.tp_size, to_rank)
    return [pair_token(token, rank, to_rank) for rank in senders]


def outgoing(layout: KvLayout, key: HandoffKey, to_ranks: int, from_rank: int) -> list[tuple[int, HandoffKey]]:
    """The decode ranks that the prefill rank `from_rank` sends to, and under which key."""
    if to_ranks == layout.shape.tp_size == 1:
        return [(0, key)]
    return [
        (to_rank, HandoffKey(pair_token(key.token, from_rank, to_rank), key.attempt, key.delivery))
        for to_rank in range(to_ranks)
        if from_rank in senders_of(layout, layout.shape.tp_size, to_ranks, to_rank)
    ]


def addresses_of(addresses: Sequence[str], ranks: int, rank: int) -> tuple[str, ...]:
    """One rank's share of a worker's addresses, which are those of each rank in turn, equally many. Raises ValueError."""
    if ranks < 1 or not addresses or len(addresses) % ranks:
        raise ValueError(f"{len(addresses)} addresses for {ranks} ranks")
    share = len(addresses) // ranks
    return tuple(addresses[rank * share : (rank + 1) * share])


async def probe_after_another(probe: Callable[[], Awaitable[T]]) -> T:
    """The result of `probe`. Who measured before may just be letting go of the endpoint that is measured now, so try again."""
    for _ in range(BUSY_TRIES):
        try:
            return await probe()
        except HandoffRefused as error:
            if error.reason != "busy":
                raise
            await asyncio.sleep(BUSY_S)
    return await probe()


class ReceiveJoin:
    """The ends of a worker's expectation on its ranks, as one."""

    def __init__(self, token: bytes, tokens: Iterable[bytes], end_token: int) -> None:
        self._open = set(tokens)
        self._end = ReceiveEnd(token, True, end_token, 0)

    def add(self, end: ReceiveEnd) -> ReceiveEnd | None:
        """The worker's end when this was the last one."""
        self._open.discard(end.token)
        joined = self._end
        self._end = replace(
            joined,
            is_landed=joined.is_landed and end.is_landed,
            good_token=min(joined.good_token, end.good_token),
            kv_bytes=joined.kv_bytes + end.kv_bytes,
            reason=joined.reason or end.reason,
        )
        return None if self._open else self._end


class SendJoin:
    """The ends of a worker's order on its ranks, as one."""

    def __init__(self, key: HandoffKey, keys: Iterable[HandoffKey]) -> None:
        self._held = set(keys)
        self._open = set(self._held)
        self._end = SendEnd(key, True, 0)

    def add(self, event: SendReleased | SendEnd) -> SendReleased | SendEnd | None:
        """The worker's event when this was the last one of its kind."""
        if isinstance(event, SendReleased):
            self._held.discard(event.key)
            return None if self._held else SendReleased(self._end.key)
        self._open.discard(event.key)
        joined = self._end
        self._end = replace(
            joined,
            is_landed=joined.is_landed and event.is_landed,
            kv_bytes=joined.kv_bytes + event.kv_bytes,
            reason=joined.reason or event.reason,
        )
        return None if self._open else self._end


class RankEndpoint(HandoffEndpointLike, Protocol):
    """An endpoint whose layout is known, and so which rank it is of how many."""

    @property
    def layout(self) -> KvLayout: ...

    @property
    def stats(self) -> EndpointStats: ...

    def gather_ahead(self, keys: Iterable[HandoffKey], layers: Sequence[int], stream: object) -> None: ...

    async def probe(self, addresses: Sequence[str], *, decode_epoch: int) -> ProbeReport: ...


@dataclass(frozen=True, slots=True)
class RankProbe:
    """The link between one rank of each of two workers."""

    from_rank: int
    to_rank: int
    report: ProbeReport


@dataclass(frozen=True, slots=True)
class _Sub:
    """One pair of an order."""

    rank: int
    key: HandoffKey


class RankedEndpoint:
    """The ranks of one worker that live in this process, all or some, as one endpoint. All calls on one loop."""

    def __init__(self, ranks: Sequence[RankEndpoint]) -> None:
        self._ranks = list(ranks)
        self._expected: dict[bytes, list[tuple[int, bytes]]] = {}
        self._orders: dict[HandoffKey, list[_Sub]] = {}

    @property
    def addresses(self) -> tuple[str, ...]:
        """Those of each rank in turn."""
        return tuple(address for rank in self._ranks for address in rank.addresses)

    @property
    def stats(self) -> EndpointStats:
        """Of all ranks; a hand-off of the worker counts once for each of its pairs."""
        return EndpointStats.sum(rank.stats for rank in self._ranks)

    async def start(self) -> None:
        for rank in self._ranks:
            await rank.start()
        if len({len(rank.addresses) for rank in self._ranks}) > 1:
            raise ValueError("the ranks listen in different ways")

    async def aclose(self) -> None:
        for rank in self._ranks:
            await rank.aclose()

    def expect(self, expectation: Expectation, on_end: Callable[[ReceiveEnd], None], *, prefill_ranks: int = 1) -> None:
        """As an endpoint's; `prefill_ranks` is the tensor-parallel size of who sends."""
        token = expectation.token
        pairs = [
            (index, part)
            for index, rank in enumerate(self._ranks)
            for part in incoming(rank.layout, token, prefill_ranks, rank.layout.shape.tp_rank)
        ]
        join = ReceiveJoin(token, (part for _, part in pairs), expectation.end_token)

        def ended(end: ReceiveEnd) -> None:
            if not end.is_landed:
                self.cancel(token)  # What the others bring helps nobody.
            if joined := join.add(end):
                self._expected.pop(token, None)
                on_end(joined)

        self._expected[token] = pairs
        for index, part in pairs:
            self._ranks[index].expect(replace(expectation, token=part), ended)

    def cancel(self, token: bytes) -> None:
        for index, part in self._expected.get(token, ()):
            self._ranks[index].cancel(part)

    def open(
        self, order: SendOrder, on_event: Callable[[SendReleased | SendEnd], None], *, decode_ranks: int = 1
    ) -> None:
        """As an endpoint's; the addresses are those of each of the `decode_ranks` in turn."""
        if order.key in self._orders:
            raise ValueError("this key is open already")
        pairs = [
            (_Sub(index, key), addresses_of(order.addresses, decode_ranks, to_rank))
            for index, rank in enumerate(self._ranks)
            for to_rank, key in outgoing(rank.layout, order.key, decode_ranks, rank.layout.shape.tp_rank)
        ]
        if not pairs:  # Another rank has the same heads and sends them.
            on_event(SendReleased(order.key))
            on_event(SendEnd(order.key, True, 0))
            return
        join = SendJoin(order.key, (sub.key for sub, _ in pairs))

        def happened(event: SendReleased | SendEnd) -> None:
            joined = join.add(event)
            if isinstance(event, SendEnd) and not event.is_landed:
                self.abort(order.key, event.reason)
            if isinstance(joined, SendEnd):
                self._orders.pop(order.key, None)
            if joined:
                on_event(joined)

        self._orders[order.key] = [sub for sub, _ in pairs]
        for sub, addresses in pairs:
            self._ranks[sub.rank].open(replace(order, key=sub.key, addresses=addresses), happened)

    def announce(self, key: HandoffKey, chunk: Chunk) -> None:
        for sub in self._orders.get(key, ()):
            self._ranks[sub.rank].announce(sub.key, chunk)

    def gather_ahead(self, keys: Iterable[HandoffKey], layers: Sequence[int], stream: object) -> None:
        """From any thread; see `HandoffEndpoint.gather_ahead`."""
        subs = [sub for key in keys for sub in self._orders.get(key, ())]
        for index, rank in enumerate(self._ranks):
            rank.gather_ahead([sub.key for sub in subs if sub.rank == index], layers, stream)

    def layer_ready(self, key: HandoffKey, layer: int) -> None:
        for sub in self._orders.get(key, ()):
            self._ranks[sub.rank].layer_ready(sub.key, layer)

    def layers_ready(self, key: HandoffKey, layers: Iterable[int]) -> None:
        layers = frozenset(layers)
        for sub in self._orders.get(key, ()):
            self._ranks[sub.rank].layers_ready(sub.key, layers)

    async def probe(self, addresses: Sequence[str], *, decode_epoch: int, decode_ranks: int = 1) -> list[RankProbe]:
        """Measure every link that a hand-off to this worker would take, one after the other. Raises as an endpoint's."""
        nobody = HandoffKey(bytes(16), 0, 0)
        probes: list[RankProbe] = []
        measured: set[int] = set()
        for rank in self._ranks:
            from_rank = rank.layout.shape.tp_rank
            for to_rank, _ in outgoing(rank.layout, nobody, decode_ranks, from_rank):
                share = addresses_of(addresses, decode_ranks, to_rank)
                probe = partial(rank.probe, share, decode_epoch=decode_epoch)
                report = await (probe_after_another(probe) if to_rank in measured else probe())
                measured.add(to_rank)
                probes.append(RankProbe(from_rank, to_rank, report))
        return probes

    def abort(self, key: HandoffKey, reason: str) -> None:
        for sub in self._orders.get(key, ()):
            self._ranks[sub.rank].abort(sub.key, reason)
