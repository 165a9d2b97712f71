"""What workers answer to `hocket doctor`."""

from __future__ import annotations

import asyncio

import pytest
from workers_rig import Cluster

from hocket.bus import subjects
from hocket.bus.ids import WorkerId
from hocket.bus.messages import (
    DescribeHost,
    HostReport,
    LinkReport,
    Message,
    ProbeLink,
    WorkerCard,
    decode,
    encode,
)


async def ask(cluster: Cluster, card: WorkerCard, question: Message) -> Message:
    subject = subjects.control(cluster.pool, card.worker_id)
    return decode(await cluster.router.bus.request(subject, encode(question), timeout_s=20.0))


async def links(cluster: Cluster, prefill: WorkerCard, decode_worker: WorkerId, epoch: int) -> LinkReport:
    report = await ask(cluster, prefill, ProbeLink(decode_worker, epoch))
    assert isinstance(report, LinkReport)
    assert (report.worker_id, report.epoch, report.decode_worker) == (prefill.worker_id, prefill.epoch, decode_worker)
    return report


async def test_every_worker_describes_its_machine(cluster: Cluster):
    for role in ("prefill", "decode"):
        _, card = await cluster.worker(role)
        report = await ask(cluster, card, DescribeHost())
        assert isinstance(report, HostReport)
        assert (report.worker_id, report.epoch) == (card.worker_id, card.epoch)
        assert report.facts.host_id
        assert report.facts.copy_gb_per_s > 0
        assert report.facts.transports == "inproc"


@pytest.mark.parametrize("transports", ["inproc", "tcp"])
async def test_a_prefill_worker_measures_its_link(cluster: Cluster, transports: str):
    _, prefill = await cluster.worker("prefill", transports=transports)
    _, card = await cluster.worker("decode", transports=transports)
    report = await links(cluster, prefill, card.worker_id, card.epoch)
    assert report.failure == ""
    (link,) = report.links
    assert (link.from_rank, link.to_rank, link.transport, link.kv_memory) == (0, 0, transports, "host")
    assert link.address == card.handoff_addresses[0]
    assert link.dial_ms is not None
    assert link.round_trip_us > 0
    assert [message_bytes for message_bytes, _ in link.rates] == [64 << 10, 1 << 20, 16 << 20]
    assert all(rate > 0 for _, rate in link.rates)


@pytest.mark.parametrize(
    ("tp", "pairs"), [((2, 4), [(0, 0), (0, 1), (1, 2), (1, 3)]), ((4, 2), [(0, 0), (1, 0), (2, 1), (3, 1)])]
)
async def test_every_pair_of_ranks_is_measured(cluster: Cluster, tp: tuple[int, int], pairs: list[tuple[int, int]]):
    _, prefill = await cluster.worker("prefill", tp=tp[0], sim_heads=4)
    _, card = await cluster.worker("decode", tp=tp[1], sim_heads=4)
    report = await links(cluster, prefill, card.worker_id, card.epoch)
    assert [(link.from_rank, link.to_rank) for link in report.links] == pairs
    assert {link.address for link in report.links} == set(card.handoff_addresses)


async def test_who_cannot_be_measured_is_told_why(cluster: Cluster):
    _, prefill = await cluster.worker("prefill")
    _, card = await cluster.worker("decode")
    assert (await links(cluster, prefill, WorkerId("nobody"), 1)).failure == "unknown_worker"
    assert (await links(cluster, prefill, prefill.worker_id, prefill.epoch)).failure == "unknown_worker"
    assert (await links(cluster, prefill, card.worker_id, card.epoch + 1)).failure == "wrong_epoch"
    report = await ask(cluster, card, ProbeLink(card.worker_id, card.epoch))
    assert isinstance(report, LinkReport)
    assert report.failure == "unsupported"


async def test_a_worker_measures_one_link_at_a_time(cluster: Cluster):
    _, prefill = await cluster.worker("prefill")
    _, card = await cluster.worker("decode")
    reports = [asyncio.create_task(links(cluster, prefill, card.worker_id, card.epoch)) for _ in range(2)]
    await asyncio.wait(reports)
    assert sorted(task.result().failure for task in reports) == ["", "busy"]


async def test_a_decode_worker_that_has_died_is_unreachable(cluster: Cluster):
    _, prefill = await cluster.worker("prefill")
    member, card = await cluster.worker("decode")
    await member.engine.endpoint.aclose()
    assert (await links(cluster, prefill, card.worker_id, card.epoch)).failure == "unreachable"
