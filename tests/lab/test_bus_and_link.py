"""What the lab's bus and links do to who relies on them: as measured on a real nats-server, and as bad as a link may be."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from hocket.bus import Delivery, JobLimits, NoResponders, QueueUnavailable, subjects
from hocket.lab.bus import LabBroker, LabBus
from hocket.lab.link import LabLink, LabTransport, Network, Wire
from hocket.lab.log import EventLog
from hocket.lab.loop import Process, VirtualLoop, run
from hocket.transport.base import Place

LANE = subjects.prefill_jobs("test")


class Town:
    """A server and two processes with a bus each."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.broker = LabBroker(loop, random.Random(1), EventLog(loop.time), jobs=JobLimits(ack_wait_s=2.0))
        self.here = LabBus(self.broker, Process(loop, "here"))
        self.there = LabBus(self.broker, Process(loop, "there"))
        self.got: list[bytes] = []

    async def connect(self) -> None:
        await self.here.connect()
        await self.there.connect()
        await self.there.subscribe("a.b", self._on_message)

    def _on_message(self, delivery: Delivery) -> None:
        self.got.append(delivery.payload)
        if delivery.reply:
            self.there.publish_nowait(delivery.reply, b"yes")

    def say(self, *numbers: int) -> None:
        for number in numbers:
            assert self.here.publish_nowait("a.b", b"%d" % number)

    def heard(self) -> list[int]:
        return [int(payload) for payload in self.got]


def in_town(story: Callable[[Town], Awaitable[None]]) -> None:
    async def main(loop: VirtualLoop) -> None:
        town = Town(loop)
        await town.connect()
        await story(town)

    run(main)


def test_what_is_on_its_way_when_the_server_dies_is_lost_without_a_word():
    async def story(town: Town) -> None:
        town.say(1)
        await asyncio.sleep(0.1)
        town.say(2)
        town.broker.stop()
        await asyncio.sleep(1.0)
        assert not town.here.is_connected
        town.broker.start()
        await asyncio.sleep(1.0)
        town.say(3)
        await asyncio.sleep(0.1)
        assert town.heard() == [1, 3]

    in_town(story)


def test_a_short_partition_delays_and_a_long_one_loses():
    async def story(town: Town) -> None:
        town.broker.partition(town.there)
        town.say(1, 2)
        await asyncio.sleep(5.0)
        assert town.heard() == []
        town.broker.heal(town.there)
        await asyncio.sleep(0.1)
        assert town.heard() == [1, 2]
        assert town.there.is_connected
        town.broker.partition(town.there)
        town.say(3)
        await asyncio.sleep(20.0)
        assert not town.there.is_connected  # Two pings were not answered.
        town.broker.heal(town.there)
        await asyncio.sleep(1.0)
        town.say(4)
        await asyncio.sleep(0.1)
        assert town.heard() == [1, 2, 4]

    in_town(story)


def test_who_does_not_read_is_cut_off_reads_what_came_before_and_comes_back():
    async def story(town: Town) -> None:
        town.broker.faults.pending_max = 3
        town.there.process.pause()
        town.say(1, 2, 3, 4, 5)
        await asyncio.sleep(1.0)
        with pytest.raises(NoResponders):
            await town.here.request("a.b", b"6", timeout_s=1.0)
        town.there.process.resume()
        await asyncio.sleep(0)
        assert town.heard() == [1, 2]
        await asyncio.sleep(1.0)
        assert await town.here.request("a.b", b"7", timeout_s=1.0) == b"yes"
        assert town.heard() == [1, 2, 7]

    in_town(story)


def test_without_a_leader_nothing_is_stored_and_messages_go_on():
    async def story(town: Town) -> None:
        town.broker.lose_leader()
        before_s = town.loop.time()
        with pytest.raises(QueueUnavailable):
            await town.here.jobs.publish(LANE, b"job", job_id="1", ttl_s=60)
        assert town.loop.time() - before_s < 1.1
        town.say(1)
        await asyncio.sleep(0.1)
        assert town.heard() == [1]
        town.broker.elect()
        assert await town.here.jobs.publish(LANE, b"job", job_id="1", ttl_s=60) == 1
        assert town.broker.store.jobs == 1

    in_town(story)


def test_a_job_whose_confirmation_was_lost_is_stored_once():
    async def story(town: Town) -> None:
        town.broker.faults.loss = 1.0
        with pytest.raises(QueueUnavailable):
            await town.here.jobs.publish(LANE, b"job", job_id="1", ttl_s=60)
        town.broker.faults.loss = 0.0
        assert town.broker.store.jobs == 1
        assert await town.here.jobs.publish(LANE, b"job", job_id="1", ttl_s=60) == 1

    in_town(story)


def test_a_killed_workers_job_comes_again_and_a_late_ack_of_the_first_delivery_succeeds():
    async def story(town: Town) -> None:
        await town.here.jobs.publish(LANE, b"job", job_id="1", ttl_s=60)
        first = await (await town.here.jobs.puller(LANE)).pull()
        again = await (await town.there.jobs.puller(LANE)).pull()
        assert (first.delivery, again.delivery) == (1, 2)
        await first.ack()
        assert town.broker.store.jobs == 0
        await again.ack()

    in_town(story)


def test_a_new_leader_repeats_deliveries_under_their_number():
    async def story(town: Town) -> None:
        for number in range(20):
            await town.here.jobs.publish(LANE, b"%d" % number, job_id=str(number), ttl_s=60)
        puller = await town.here.jobs.puller(LANE)
        held = [await puller.pull() for _ in range(20)]
        town.broker.lose_leader()
        town.broker.elect()
        again = await puller.pull()
        assert again.delivery == 1
        assert again.payload in {job.payload for job in held}

    in_town(story)


# ---- links


class Ends:
    """The two ends of one link, and what they reported."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.net = Network(loop, random.Random(1))
        self.near_process, self.far_process = Process(loop, "near"), Process(loop, "far")
        self.near: LabLink
        self.far: LabLink
        self.done: list[tuple[str, BaseException | None]] = []
        self.lost: list[str] = []

    async def join(self) -> None:
        accepted: list[LabLink] = []
        listener = await LabTransport(self.net, self.far_process).listen("", accepted.append)
        self.near = await LabTransport(self.net, self.near_process).connect(listener.address, timeout_s=1.0)
        await asyncio.sleep(0.01)
        [self.far] = accepted
        self.near.start(lambda _: None, lambda _: self.lost.append("near"))
        self.far.start(lambda _: None, lambda _: self.lost.append("far"))

    @property
    def wire(self) -> Wire:
        return self.near.wire

    def send(self, source: np.ndarray, target: np.ndarray) -> None:
        self.far.post_receive(1, Place.of([target]), lambda error: self.done.append(("received", error)))
        self.near.post_send(1, [source], lambda error: self.done.append(("sent", error)))


def between_ends(story: Callable[[Ends], Awaitable[None]]) -> None:
    async def main(loop: VirtualLoop) -> None:
        ends = Ends(loop)
        await ends.join()
        await story(ends)

    run(main)


def test_a_message_takes_as_long_as_its_bytes_and_half_of_it_is_there_before():
    async def story(ends: Ends) -> None:
        ends.wire.bytes_per_s = 1000.0
        source, target = np.full(1000, 7, np.uint8), np.zeros(1000, np.uint8)
        ends.send(source, target)
        await asyncio.sleep(0.75)
        assert (int(target.sum()), ends.done) == (500 * 7, [])
        source[:] = 9  # It is read when it goes out: too early for whoever changes it now.
        await asyncio.sleep(0.3)
        assert int(target.sum()) == 500 * 7 + 500 * 9
        assert ends.done == [("received", None), ("sent", None)]

    between_ends(story)


def test_a_wire_that_writes_late_writes_until_the_abort_is_over_and_not_after():
    async def story(ends: Ends) -> None:
        ends.net.faults.abort_s = 1.0
        ends.wire.writes_late = True
        ends.wire.stall()
        target = np.zeros(1000, np.uint8)
        ends.send(np.full(1000, 7, np.uint8), target)
        await asyncio.sleep(5.0)
        assert (int(target.sum()), ends.done) == (0, [])
        await ends.far.abort()
        assert target.any()  # While it was under way.
        assert [what for what, _ in ends.done] == ["received"]
        target[:] = 0
        ends.wire.resume()
        await asyncio.sleep(1.0)
        assert not target.any()
        assert ends.lost == ["far", "near"]

    between_ends(story)


def test_a_corrupted_message_arrives_changed_in_one_byte():
    async def story(ends: Ends) -> None:
        ends.wire.corrupt_messages = 1
        target = np.zeros(100, np.uint8)
        ends.send(np.full(100, 7, np.uint8), target)
        await asyncio.sleep(0.1)
        assert int((target != 7).sum()) == 1
        assert ends.done == [("received", None), ("sent", None)]

    between_ends(story)


def test_the_peer_of_a_killed_process_sees_the_end_and_the_peer_of_a_paused_one_sees_nothing():
    async def story(ends: Ends) -> None:
        ends.near_process.pause()
        ends.send(np.full(100, 7, np.uint8), np.zeros(100, np.uint8))
        await asyncio.sleep(100.0)
        assert ends.lost == []
        ends.near_process.kill()
        ends.net.on_killed(ends.near_process)
        await asyncio.sleep(0.1)
        assert ends.lost == ["far"]

    between_ends(story)
