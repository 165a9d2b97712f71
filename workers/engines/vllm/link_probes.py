"""Measuring links for `hocket doctor`: the front end asks, the endpoint beside the KV tensors measures."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from functools import partial

import msgspec

from ....transport.errors import HandoffRefused, LinkLost, TransportError
from ....transport.ranks import RankedEndpoint, RankProbe, probe_after_another
from .side_channel import ProbeAsked, ProbeEnded


class ProbeQuestions:
    """The front end's side."""

    def __init__(self, send: Callable[[ProbeAsked], None]) -> None:
        self._send = send
        self._numbers = itertools.count(1)
        self._waits: dict[int, asyncio.Future[ProbeEnded]] = {}

    async def ask(
        self, addresses: tuple[str, ...], decode_epoch: int, decode_ranks: int, *, ranks: int = 1
    ) -> list[RankProbe]:
        """Each of this engine's `ranks` in turn: they would share what is measured. Raises LinkLost, HandoffRefused."""
        probes: list[RankProbe] = []
        for rank in range(ranks):
            ask = partial(self._ask, ProbeAsked(0, addresses, decode_epoch, decode_ranks, rank))
            probes += await (probe_after_another(ask) if rank else ask())
        return probes

    async def _ask(self, question: ProbeAsked) -> tuple[RankProbe, ...]:
        number = next(self._numbers)
        answer = self._waits[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(msgspec.structs.replace(question, number=number))
            ended = await answer
        finally:
            del self._waits[number]
        if ended.refusal:
            raise HandoffRefused(ended.refusal, ended.detail)
        if ended.detail:
            raise LinkLost(ended.detail)
        probes: tuple[RankProbe, ...] = ended.probes
        return probes

    def on_ended(self, note: ProbeEnded) -> None:
        if (answer := self._waits.get(note.number)) and not answer.done():
            answer.set_result(note)

    def fail(self, why: str) -> None:
        """The engine is dead."""
        for number in self._waits:
            self.on_ended(ProbeEnded(number, detail=why))


class ProbeAnswers:
    """The side of the endpoint; on its loop."""

    def __init__(self, endpoint: RankedEndpoint, send: Callable[[ProbeEnded], None]) -> None:
        self._endpoint = endpoint
        self._send = send
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, note: ProbeAsked) -> None:
        """Measure and answer; the endpoint ends it when it closes."""
        task = asyncio.get_running_loop().create_task(self._measure(note), name="probe")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _measure(self, note: ProbeAsked) -> None:
        try:
            probes = await self._endpoint.probe(
                note.addresses, decode_epoch=note.decode_epoch, decode_ranks=note.decode_ranks
            )
        except HandoffRefused as error:
            self._send(ProbeEnded(note.number, refusal=error.reason, detail=error.detail))
        except (TransportError, ValueError) as error:
            self._send(ProbeEnded(note.number, detail=str(error) or "the link was lost"))
        else:
            self._send(ProbeEnded(note.number, tuple(probes)))
