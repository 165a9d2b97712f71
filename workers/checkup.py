"""A worker's answers to `hocket doctor`: what its machine is like, and of a prefill worker how fast a link of its is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine

from ..bus.base import Bus, BusError, Delivery
from ..bus.messages import (
    DescribeHost,
    HostReport,
    LinkReport,
    Message,
    ProbeLink,
    RankLink,
    WorkerCard,
    encode,
)
from ..transport.errors import HandoffRefused, LinkLost
from ..transport.ranks import RankProbe
from .engines.base import Engine, ProbesLinks
from .host_facts import host_facts
from .presence import ControlHandler

log = logging.getLogger(__name__)
LINK_PROBE_S = 30.0  # for all ranks of a pair; one takes about a second
QUESTIONS_MAX = 4  # at once; each is a copy of 32 MiB or a probe


class Checkup:
    """Answers while `run` runs. Other control messages go to `otherwise`."""

    def __init__(self, bus: Bus, card: WorkerCard, engine: Engine, *, transports: str) -> None:
        self._bus = bus
        self._card = card
        self._engine = engine
        self._transports = transports
        self._tasks: asyncio.TaskGroup | None = None
        self._open = 0
        self._is_probing = False
        self.is_draining = False
        self.otherwise: ControlHandler | None = None

    async def run(self) -> None:
        """Until cancelled; then no measurement is left."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                await asyncio.Event().wait()
        finally:
            self._tasks = None

    def on_control(self, message: Message, delivery: Delivery) -> None:
        """For `Presence`."""
        match message:
            case DescribeHost():
                self._start(self._describe(delivery))
            case ProbeLink():
                self._start(self._measure(message, delivery))
            case _ if self.otherwise is not None:
                self.otherwise(message, delivery)
            case _:
                log.warning("dropped a %s: not for a %s worker", type(message).__name__, self._card.role)

    def _start(self, answer: Coroutine[None, None, None]) -> None:
        if self._tasks is None or self._open == QUESTIONS_MAX:
            answer.close()  # The doctor asks again.
            return
        self._open += 1
        self._tasks.create_task(answer, name="checkup").add_done_callback(self._on_answered)

    def _on_answered(self, _: asyncio.Task[None]) -> None:
        self._open -= 1

    def _reply(self, delivery: Delivery, answer: Message) -> None:
        if delivery.reply:
            self._bus.publish_nowait(delivery.reply, encode(answer))

    async def _describe(self, delivery: Delivery) -> None:
        facts = await asyncio.to_thread(host_facts, self._transports)
        self._reply(delivery, HostReport(self._card.worker_id, self._card.epoch, facts))

    async def _measure(self, question: ProbeLink, delivery: Delivery) -> None:
        card = self._card
        links, failure, detail = await self._links(question)
        report = LinkReport(card.worker_id, card.epoch, question.decode_worker, links, failure, detail)
        self._reply(delivery, report)

    async def _links(self, question: ProbeLink) -> tuple[tuple[RankLink, ...], str, str]:
        """The measured links, or a failure of LinkReport with its detail."""
        if self.is_draining:
            return (), "draining", ""
        if self._card.role != "prefill" or not isinstance(self._engine, ProbesLinks):
            return (), "unsupported", f"{self._card.engine} measures no links"
        if self._is_probing:
            return (), "busy", "this worker measures a link already"
        self._is_probing = True
        try:
            return await self._probe(self._engine, question)
        finally:
            self._is_probing = False

    async def _probe(self, engine: ProbesLinks, question: ProbeLink) -> tuple[tuple[RankLink, ...], str, str]:
        try:
            card = await self._bus.registry.get(question.decode_worker)
            if card is None or card.role != "decode":
                return (), "unknown_worker", "the registry has no such decode worker"
            if card.epoch != question.decode_epoch:
                return (), "wrong_epoch", "the registry has another incarnation of it"
            async with asyncio.timeout(LINK_PROBE_S):
                probes = await engine.probe_links(
                    card.handoff_addresses, decode_epoch=card.epoch, decode_ranks=card.tp_size
                )
        except HandoffRefused as error:
            return (), error.reason, error.detail
        except TimeoutError:
            return (), "unreachable", f"not measured within {LINK_PROBE_S:g} s"
        except (LinkLost, ValueError, BusError) as error:
            return (), "unreachable", str(error)
        return tuple(map(rank_link, probes)), "", ""


def rank_link(probe: RankProbe) -> RankLink:
    """As it travels."""
    report = probe.report
    return RankLink(
        from_rank=probe.from_rank,
        to_rank=probe.to_rank,
        address=report.peer,
        transport=report.transport,
        moves_device_memory=report.moves_device_memory,
        kv_memory=report.kv_memory,
        dial_ms=None if report.dial_s is None else report.dial_s * 1e3,
        round_trip_us=report.round_trip_s * 1e6,
        rates=tuple((rate.message_bytes, rate.bytes_per_s / 1e9) for rate in report.rates),
    )
