"""What every bus owes: core messages, requests, connections, the registry. Jobs are in test_jobs.py."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from hocket.bus import Bus, BusDisconnected, BusError, Delivery, NoResponders, RequestTimeout, SettingChanged, WorkerId
from hocket.bus.messages import WorkerCard

from .conftest import Rig, until


def card(worker_id: str, *, epoch: int = 1) -> WorkerCard:
    return WorkerCard(WorkerId(worker_id), "decode", epoch, "demo", "f1", 16, 100, 4, 2048, ("tcp://127.0.0.1:1",))


async def echo(bus: Bus, subject: str, *, queue: str = "") -> list[bytes]:
    """Answer every message on `subject` with its payload; what came."""
    got: list[bytes] = []

    def answer(delivery: Delivery) -> None:
        got.append(delivery.payload)
        if delivery.reply:
            bus.publish_nowait(delivery.reply, delivery.payload)

    await bus.subscribe(subject, answer, queue=queue)
    return got


async def test_messages_arrive_in_the_order_they_were_published(rig: Rig) -> None:
    publisher, subscriber = await rig.bus(), await rig.bus()
    got: list[Delivery] = []
    await subscriber.subscribe("a.b", got.append)
    for number in range(100):
        assert publisher.publish_nowait("a.b", b"%d" % number, reply="r" if number == 7 else "")
    await until(lambda: len(got) == 100)
    assert [delivery.payload for delivery in got] == [b"%d" % number for number in range(100)]
    assert {delivery.subject for delivery in got} == {"a.b"}
    assert [delivery.reply for delivery in got[6:9]] == ["", "r", ""]


async def test_a_star_stands_for_one_token_and_an_angle_for_the_rest(rig: Rig) -> None:
    bus = await rig.bus()
    got: list[tuple[str, str]] = []
    for pattern in ("a.*", "a.>", "*.b", "a.b"):
        await bus.subscribe(pattern, lambda delivery, pattern=pattern: got.append((pattern, delivery.subject)))  # type: ignore[misc]
    for subject in ("a.b", "a.b.c", "x.b", "a"):
        bus.publish_nowait(subject, b"")
    await until(lambda: len(got) == 6)
    assert sorted(got) == [
        ("*.b", "a.b"),
        ("*.b", "x.b"),
        ("a.*", "a.b"),
        ("a.>", "a.b"),
        ("a.>", "a.b.c"),
        ("a.b", "a.b"),
    ]


async def test_payloads_of_every_length_arrive_whole(rig: Rig) -> None:
    bus = await rig.bus()
    got: list[bytes] = []
    await bus.subscribe("big", lambda delivery: got.append(delivery.payload))
    payloads = [bytes([length % 251]) * length for length in (0, 1, 1000, 65_535, 65_536, 262_144, 3_000_000, 5)]
    for payload in payloads:
        assert bus.publish_nowait("big", payload)
    await until(lambda: len(got) == len(payloads))
    assert got == payloads


async def test_a_payload_with_protocol_lines_in_it_is_only_a_payload(rig: Rig) -> None:
    bus = await rig.bus()
    got = await echo(bus, "a")
    nasty = b"\r\nMSG a 1 5\r\nhello\r\n-ERR 'no'\r\nPING\r\n"
    bus.publish_nowait("a", nasty)
    await until(lambda: bool(got))
    assert got == [nasty]


async def test_each_message_goes_to_one_member_of_a_queue_group(rig: Rig) -> None:
    first, second, publisher = await rig.bus(), await rig.bus(), await rig.bus()
    one, two = await echo(first, "work", queue="g"), await echo(second, "work", queue="g")
    everybody = await echo(publisher, "work")
    for number in range(60):
        publisher.publish_nowait("work", b"%d" % number)
    await until(lambda: len(everybody) == 60 and len(one) + len(two) == 60)
    assert sorted(one + two) == sorted(everybody)
    assert one
    assert two


async def test_nothing_arrives_after_unsubscribe(rig: Rig) -> None:
    bus = await rig.bus()
    got: list[bytes] = []
    kept = await echo(bus, "a")
    subscription = await bus.subscribe("a", lambda delivery: got.append(delivery.payload))
    bus.publish_nowait("a", b"1")
    await until(lambda: len(got) == 1)
    bus.publish_nowait("a", b"2")
    await subscription.unsubscribe()
    await subscription.unsubscribe()
    bus.publish_nowait("a", b"3")
    await until(lambda: len(kept) == 3)
    assert b"3" not in got


async def test_a_request_gets_its_answer(rig: Rig) -> None:
    client, service = await rig.bus(), await rig.bus()
    await echo(service, "echo")
    assert await client.request("echo", b"hello", timeout_s=2) == b"hello"


async def test_many_requests_at_once_get_their_own_answers(rig: Rig) -> None:
    client, service = await rig.bus(), await rig.bus()
    await echo(service, "echo")
    async with asyncio.TaskGroup() as tasks:
        answers = [tasks.create_task(client.request("echo", b"%d" % number, timeout_s=5)) for number in range(200)]
    assert [answer.result() for answer in answers] == [b"%d" % number for number in range(200)]


async def test_a_request_that_nobody_hears_fails_at_once(rig: Rig) -> None:
    bus = await rig.bus()
    start = time.monotonic()
    with pytest.raises(NoResponders, match="nobody"):
        await bus.request("nobody.here", b"", timeout_s=5)
    assert time.monotonic() - start < 1


async def test_a_request_that_nobody_answers_times_out(rig: Rig) -> None:
    bus = await rig.bus()
    await bus.subscribe("silent", lambda delivery: None)
    with pytest.raises(RequestTimeout, match="silent in 0.05 s"):
        await bus.request("silent", b"", timeout_s=0.05)


async def test_a_late_or_second_answer_harms_no_other_request(rig: Rig) -> None:
    bus = await rig.bus()
    held: list[str] = []

    def twice(delivery: Delivery) -> None:
        bus.publish_nowait(delivery.reply, b"first")
        bus.publish_nowait(delivery.reply, b"second")
        held.append(delivery.reply)

    await bus.subscribe("twice", twice)
    assert await bus.request("twice", b"", timeout_s=2) == b"first"
    bus.publish_nowait(held[0], b"much later")
    assert await bus.request("twice", b"", timeout_s=2) == b"first"


async def test_a_cancelled_request_leaves_the_bus_working(rig: Rig) -> None:
    bus = await rig.bus()
    await bus.subscribe("silent", lambda delivery: None)
    await echo(bus, "echo")
    task = asyncio.create_task(bus.request("silent", b"", timeout_s=5))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await bus.request("echo", b"still", timeout_s=2) == b"still"


async def test_a_message_for_nobody_comes_back_on_its_reply_subject(rig: Rig) -> None:
    bus = await rig.bus()
    got: list[Delivery] = []
    inbox = bus.new_inbox()
    await bus.subscribe(inbox, got.append)
    bus.publish_nowait("nobody.here", b"token", reply=inbox)
    await until(lambda: bool(got))
    assert got[0].is_no_responders
    assert got[0].subject == inbox
    assert got[0].payload == b""


async def test_inboxes_are_never_the_same(rig: Rig) -> None:
    one, two = await rig.bus(), await rig.bus()
    assert len({bus.new_inbox() for bus in (one, two) for _ in range(100)}) == 200


async def test_a_handler_that_raises_costs_no_other_message(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    bus = await rig.bus()
    got: list[bytes] = []

    def handle(delivery: Delivery) -> None:
        if delivery.payload == b"bad":
            raise RuntimeError("a bug")
        got.append(delivery.payload)

    await bus.subscribe("a", handle)
    with caplog.at_level(logging.CRITICAL):
        for payload in (b"1", b"bad", b"2"):
            bus.publish_nowait("a", payload)
        await until(lambda: len(got) == 2)
    assert got == [b"1", b"2"]
    assert bus.is_connected


@pytest.mark.parametrize("subject", ["", "a b", "a\r\nPUB x 1", "a\n"])
async def test_a_subject_that_could_inject_protocol_is_refused(rig: Rig, subject: str) -> None:
    bus = await rig.bus()
    with pytest.raises(ValueError, match="not a subject"):
        bus.publish_nowait(subject, b"x")
    with pytest.raises(ValueError, match="not a subject"):
        bus.publish_nowait("a", b"x", reply=subject or " ")


async def test_a_payload_past_the_limit_is_refused_and_the_connection_stays(rig: Rig) -> None:
    bus = await rig.bus()
    with pytest.raises(ValueError, match="max_payload"):
        bus.publish_nowait("a", b"x" * (9 << 20))
    assert bus.is_connected


# ---- connections


async def test_what_is_in_flight_fails_at_once_when_the_server_goes(rig: Rig) -> None:
    bus = await rig.bus()
    seen: list[bool] = []
    bus.on_connection(seen.append)
    await bus.subscribe("silent", lambda delivery: None)
    task = asyncio.create_task(bus.request("silent", b"", timeout_s=30))
    await asyncio.sleep(0.05)
    await rig.stop()
    with pytest.raises(BusDisconnected):
        async with asyncio.timeout(5):
            await task
    assert not bus.is_connected
    assert seen == [False]
    assert not bus.publish_nowait("a", b"lost")
    with pytest.raises(BusDisconnected):
        await bus.request("a", b"", timeout_s=1)


async def test_subscriptions_live_on_after_the_server_was_away(rig: Rig) -> None:
    client, service = await rig.bus(), await rig.bus()
    seen: list[bool] = []
    client.on_connection(seen.append)
    got = await echo(service, "echo")
    gone = await service.subscribe("echo", lambda delivery: pytest.fail("unsubscribed before"))
    await rig.stop()
    await until(lambda: not client.is_connected and not service.is_connected)
    await gone.unsubscribe()
    await rig.start()
    await until(lambda: client.is_connected and service.is_connected)
    assert await client.request("echo", b"back", timeout_s=5) == b"back"
    assert got == [b"back"]
    assert seen == [False, True]


async def test_nothing_published_before_a_disconnect_comes_after_it(rig: Rig) -> None:
    bus = await rig.bus()
    got = await echo(bus, "a")
    await rig.stop()
    await until(lambda: not bus.is_connected)
    assert not bus.publish_nowait("a", b"old")
    await rig.start()
    await until(lambda: bus.is_connected)
    bus.publish_nowait("a", b"new")
    await until(lambda: bool(got))
    assert got == [b"new"]


async def test_a_subscription_made_while_disconnected_works_after_it(rig: Rig) -> None:
    bus = await rig.bus()
    await rig.stop()
    await until(lambda: not bus.is_connected)
    task = asyncio.create_task(echo(bus, "late"))
    await asyncio.sleep(0.05)
    assert not task.done()
    await rig.start()
    async with asyncio.timeout(10):
        await task
    assert await bus.request("late", b"1", timeout_s=5) == b"1"


async def test_connect_says_what_it_could_not_reach(rig: Rig) -> None:
    bus = rig.make("lost")
    await rig.stop()
    start = time.monotonic()
    with pytest.raises(BusError, match="cannot reach") as caught:
        await bus.connect()
    assert time.monotonic() - start < 7
    assert "hocket:" not in str(caught.value)


async def test_a_close_sends_what_was_published(rig: Rig) -> None:
    leaving, staying = rig.make("leaving"), await rig.bus()
    await leaving.connect()
    got = await echo(staying, "last")
    for number in range(50):
        leaving.publish_nowait("last", b"%d" % number)
    await leaving.aclose()
    await until(lambda: len(got) == 50)
    assert not leaving.is_connected


# ---- registry


async def test_the_registry_keeps_the_last_card_of_each_worker(rig: Rig) -> None:
    worker, router = await rig.bus(), await rig.bus()
    assert await router.registry.list() == []
    assert await router.registry.get(WorkerId("w1")) is None
    await worker.registry.put(card("w2"))
    await worker.registry.put(card("w1"))
    await worker.registry.put(card("w1", epoch=2))
    assert await router.registry.list() == [card("w1", epoch=2), card("w2")]
    assert await router.registry.get(WorkerId("w1")) == card("w1", epoch=2)


async def test_a_deleted_card_is_gone_and_can_be_put_again(rig: Rig) -> None:
    bus = await rig.bus()
    await bus.registry.put(card("w1"))
    await bus.registry.delete(WorkerId("w1"))
    await bus.registry.delete(WorkerId("w1"))
    assert await bus.registry.list() == []
    await bus.registry.put(card("w1"))
    assert await bus.registry.list() == [card("w1")]


async def test_cards_outlive_a_restart_of_the_server(rig: Rig) -> None:
    bus = await rig.bus()
    await bus.registry.put(card("w1"))
    await rig.stop()
    await rig.start()
    await until(lambda: bus.is_connected)
    assert await bus.registry.list() == [card("w1")]


# ---- settings


async def test_a_setting_is_replaced_only_by_who_has_read_it(rig: Rig) -> None:
    one, two = await rig.bus(), await rig.bus()
    assert await one.settings.get("main") is None
    first = await one.settings.put("main", b"1", after=None)
    other = await one.settings.put("other", b"x", after=None)
    second = await two.settings.put("main", b"2", after=first)
    assert second > first
    for stale in (None, first, other):
        with pytest.raises(SettingChanged, match="main"):
            await one.settings.put("main", b"3", after=stale)
    stored = await one.settings.get("main")
    assert stored is not None
    assert (stored.value, stored.revision) == (b"2", second)


async def test_of_two_who_set_at_once_one_is_refused(rig: Rig) -> None:
    buses = [await rig.bus() for _ in range(4)]

    async def put(bus: Bus, number: int) -> int | None:
        try:
            await bus.settings.put("main", b"%d" % number, after=None)
        except SettingChanged:
            return None
        return number

    async with asyncio.TaskGroup() as tasks:
        done = [tasks.create_task(put(bus, number)) for number, bus in enumerate(buses)]
    [winner] = [task.result() for task in done if task.result() is not None]
    stored = await buses[0].settings.get("main")
    assert stored is not None
    assert stored.value == b"%d" % winner


async def test_settings_outlive_a_restart_of_the_server_and_say_when_it_is_away(rig: Rig) -> None:
    bus = await rig.bus()
    revision = await bus.settings.put("main", b"1", after=None)
    await rig.stop()
    await until(lambda: not bus.is_connected)
    with pytest.raises(BusDisconnected):
        await bus.settings.get("main")
    with pytest.raises(BusDisconnected):
        await bus.settings.put("main", b"2", after=revision)
    await rig.start()
    await until(lambda: bus.is_connected)
    stored = await bus.settings.get("main")
    assert stored is not None
    assert (stored.value, stored.revision) == (b"1", revision)


async def test_a_key_is_one_token_of_a_subject(rig: Rig) -> None:
    bus = await rig.bus()
    with pytest.raises(ValueError, match="token"):
        await bus.settings.put("a.b", b"1", after=None)
    with pytest.raises(ValueError, match="token"):
        await bus.settings.get("a.*")
