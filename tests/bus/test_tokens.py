"""The worker's outbox: every token reaches its router, whatever is lost on the way, and nothing is kept for ever."""

from __future__ import annotations

import asyncio

from hocket.bus import Bus, Delivery, MemoryBroker, MemoryBus, OutboxTimes, RequestId, RouterId, TokenOutbox, WorkerId
from hocket.bus.messages import (
    FINISH_CANCELLED,
    FINISH_ERROR,
    FINISH_LENGTH,
    FINISH_NONE,
    FINISH_STOP,
    EntryDetail,
    FinishAck,
    ReplayRequest,
    TokenFrame,
    TokenLogprob,
    decode_frame,
    encode,
)
from hocket.bus.subjects import tokens as tokens_of
from hocket.bus.token_state import PROBE_S, OutboxState

from .conftest import Rig, until

R1, R2 = RouterId("r1"), RouterId("r2")
W = WorkerId("w1")
TIMES = OutboxTimes(finish_again_s=0.05, finish_give_up_s=0.6, gone_after_s=0.3, grace_s=0.4)


class Reader:
    """What a router's token path does: order by index, drop what it has, remember gaps."""

    def __init__(self) -> None:
        self.frames: list[TokenFrame] = []
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.finished: dict[tuple[int, int], int] = {}
        self.ends_seen = 0
        self.gaps: list[tuple[int, int, int]] = []

    def on_frame(self, delivery: Delivery) -> None:
        self.take(decode_frame(delivery.payload))

    def take(self, frame: TokenFrame) -> None:
        self.frames.append(frame)
        for stream_id, attempt, index, ids, finish in frame.entries:
            held = self.tokens.setdefault((stream_id, attempt), [])
            if index > len(held):
                self.gaps.append((stream_id, attempt, len(held)))
                continue
            held.extend(ids[len(held) - index :])
            if finish != FINISH_NONE:
                self.ends_seen += 1
                self.finished[(stream_id, attempt)] = finish


async def make_outbox(bus: Bus, gone: list[RouterId] | None = None, times: OutboxTimes = TIMES) -> TokenOutbox:
    outbox = TokenOutbox(bus, W, 7, on_router_gone=(gone if gone is not None else []).append, times=times)
    await outbox.start()
    return outbox


def ack(router_id: RouterId, *ends: tuple[int, int]) -> FinishAck:
    return FinishAck(router_id, list(ends))


def ask(first_index: int, *, router_id: RouterId = R1, stream_id: int = 1, attempt: int = 0) -> ReplayRequest:
    return ReplayRequest(router_id, RequestId("q"), stream_id, attempt, first_index)


# ---- over a bus


async def test_all_tokens_of_a_turn_go_in_one_frame_for_each_router(rig: Rig) -> None:
    worker, router = await rig.bus(), await rig.bus()
    reader, other = Reader(), Reader()
    await router.subscribe(tokens_of(R1), reader.on_frame)
    await router.subscribe(tokens_of(R2), other.on_frame)
    outbox = await make_outbox(worker)
    for stream_id in range(1, 4):
        outbox.open(R1, stream_id, 0)
    outbox.open(R2, 1, 0)
    for step in range(3):
        for stream_id in range(1, 4):
            assert outbox.add(R1, stream_id, 0, [step * 10 + stream_id])
        outbox.add(R2, 1, 0, [step])
        await until(lambda step=step: len(reader.frames) == len(other.frames) == step + 1)  # type: ignore[misc]
    assert reader.tokens == {(stream_id, 0): [stream_id, 10 + stream_id, 20 + stream_id] for stream_id in (1, 2, 3)}
    assert other.tokens == {(1, 0): [0, 1, 2]}
    assert [len(frame.entries) for frame in reader.frames] == [3, 3, 3]
    assert (reader.frames[0].worker_id, reader.frames[0].epoch) == (W, 7)
    await outbox.aclose()


async def test_fast_steps_share_a_frame_but_first_tokens_and_ends_do_not_wait(rig: Rig) -> None:
    bus, other = await rig.bus(), await rig.bus()
    reader = Reader()
    await other.subscribe(tokens_of(R1), reader.on_frame)
    outbox = await make_outbox(bus)
    outbox.open(R1, 1, 0)
    outbox.add(R1, 1, 0, [0], detail=EntryDetail(computed_tokens=1))
    await until(lambda: len(reader.frames) == 1)
    for token in range(1, 30):
        outbox.add(R1, 1, 0, [token])
        await asyncio.sleep(0)  # Another turn of the loop: another step of the engine.
    outbox.add(R1, 1, 0, [30], finish=FINISH_LENGTH)
    await until(lambda: (1, 0) in reader.finished)
    assert reader.tokens[(1, 0)] == list(range(31))
    assert len(reader.frames) < 15
    outbox.acknowledge(ack(R1, (1, 0)))
    await outbox.aclose()


async def test_an_end_is_sent_again_until_it_is_acknowledged(rig: Rig) -> None:
    worker, router = await rig.bus(), await rig.bus()
    reader = Reader()
    await router.subscribe(tokens_of(R1), reader.on_frame)
    outbox = await make_outbox(worker)
    outbox.open(R1, 1, 0)
    outbox.add(R1, 1, 0, [5, 6], finish=FINISH_STOP)
    await until(lambda: reader.ends_seen >= 3)
    assert reader.tokens == {(1, 0): [5, 6]}
    assert reader.frames[1].entries == [(1, 0, 2, [], FINISH_STOP)]
    waiting = asyncio.create_task(outbox.wait_acknowledged())
    await asyncio.sleep(0)
    assert not waiting.done()
    outbox.acknowledge(ack(R1, (1, 0)))
    outbox.acknowledge(ack(R1, (1, 0)))
    await waiting
    assert outbox.streams == 0
    worker.publish_nowait(tokens_of(R1), encode(TokenFrame(W, 7, [(99, 0, 0, [1], FINISH_NONE)])))
    await until(lambda: (99, 0) in reader.tokens)  # Behind every end that was on its way.
    seen = reader.ends_seen
    await asyncio.sleep(TIMES.finish_again_s * 3)
    assert reader.ends_seen == seen
    assert not outbox.add(R1, 1, 0, [7])
    await outbox.aclose()


async def test_an_end_nobody_acknowledges_is_given_up(rig: Rig) -> None:
    worker, router = await rig.bus(), await rig.bus()
    await router.subscribe(tokens_of(R1), lambda delivery: None)
    outbox = await make_outbox(worker)
    outbox.open(R1, 1, 0)
    outbox.add(R1, 1, 0, [1], finish=FINISH_LENGTH)
    async with asyncio.timeout(5):
        await outbox.wait_acknowledged()
    assert outbox.streams == 0
    await outbox.aclose()


async def test_a_router_that_nobody_hears_for_is_gone_and_forgotten(rig: Rig) -> None:
    worker = await rig.bus()
    gone: list[RouterId] = []
    outbox = await make_outbox(worker, gone)
    for stream_id in (1, 2):
        outbox.open(R1, stream_id, 0)
        outbox.add(R1, stream_id, 0, [1])
    await until(lambda: bool(gone))
    assert gone == [R1]
    assert outbox.streams == 0
    assert not outbox.add(R1, 1, 0, [2])
    assert outbox.replay(ask(0)) is None
    await outbox.aclose()


async def test_a_router_that_comes_back_in_time_gets_every_token(rig: Rig) -> None:
    worker, router = await rig.bus(), await rig.bus()
    gone: list[RouterId] = []
    reader = Reader()
    outbox = await make_outbox(worker, gone)
    outbox.open(R1, 1, 0)
    outbox.add(R1, 1, 0, [0])
    await asyncio.sleep(0.05)
    outbox.add(R1, 1, 0, [1])
    await router.subscribe(tokens_of(R1), reader.on_frame)
    for token in range(2, 40):
        outbox.add(R1, 1, 0, [token])
        await asyncio.sleep(0.01)
    await until(lambda: len(reader.tokens.get((1, 0), ())) == 40)
    assert reader.tokens[(1, 0)] == list(range(40))
    assert not reader.gaps
    assert gone == []
    await outbox.aclose()


async def test_tokens_made_while_disconnected_arrive_after_it(rig: Rig) -> None:
    worker, router = await rig.bus(), await rig.bus()
    gone: list[RouterId] = []
    reader = Reader()
    await router.subscribe(tokens_of(R1), reader.on_frame)
    outbox = await make_outbox(worker, gone)
    outbox.open(R1, 1, 0)
    outbox.open(R1, 2, 0)
    for token in range(5):
        outbox.add(R1, 1, 0, [token])
    await until(lambda: len(reader.tokens.get((1, 0), ())) == 5)
    await rig.stop()
    await until(lambda: not worker.is_connected)
    for token in range(5, 200):
        outbox.add(R1, 1, 0, [token])
        await asyncio.sleep(0)
    outbox.add(R1, 2, 0, [1, 2, 3], finish=FINISH_STOP)
    await rig.start()
    await until(lambda: (2, 0) in reader.finished and len(reader.tokens[(1, 0)]) == 200)
    assert reader.tokens == {(1, 0): list(range(200)), (2, 0): [1, 2, 3]}
    assert gone == []
    await outbox.aclose()


async def test_what_a_router_missed_is_replayed(rig: Rig) -> None:
    worker, router = await rig.bus(), await rig.bus()
    reader, frames = Reader(), 0

    def lossy(delivery: Delivery) -> None:
        nonlocal frames
        frames += 1
        if frames not in (3, 4, 8):
            reader.on_frame(delivery)

    await router.subscribe(tokens_of(R1), lossy)
    outbox = await make_outbox(worker)
    outbox.open(R1, 1, 0)
    for token in range(8):
        outbox.add(R1, 1, 0, [token], finish=FINISH_STOP if token == 7 else FINISH_NONE)
        await until(lambda token=token: frames > token)  # type: ignore[misc]
        for stream_id, attempt, index in reader.gaps:
            frame = outbox.replay(ask(index, stream_id=stream_id, attempt=attempt))
            assert frame is not None
            reader.take(frame)
        reader.gaps.clear()
    assert reader.tokens[(1, 0)] == list(range(7))
    await until(lambda: bool(reader.gaps))  # The end that comes again shows that the last token is missing.
    frame = outbox.replay(ask(7))
    assert frame is not None
    reader.take(frame)
    assert reader.tokens[(1, 0)] == list(range(8))
    assert reader.finished == {(1, 0): FINISH_STOP}
    await outbox.aclose()


async def test_a_large_turn_is_split_into_frames_of_64_kib(rig: Rig) -> None:
    worker, router = await rig.bus(), await rig.bus()
    reader, lengths = Reader(), []

    def on_frame(delivery: Delivery) -> None:
        lengths.append(len(delivery.payload))
        reader.on_frame(delivery)

    await router.subscribe(tokens_of(R1), on_frame)
    outbox = await make_outbox(worker)
    detail = EntryDetail(logprobs=(TokenLogprob(-1.0, tuple((index, -2.0) for index in range(20))),))
    for stream_id in range(1000):
        outbox.open(R1, stream_id, 0)
        outbox.add(R1, stream_id, 0, [stream_id], detail=detail if stream_id % 2 else None)
    await until(lambda: len(reader.tokens) == 1000)
    assert max(lengths) <= 64 << 10
    for frame in reader.frames:
        for position, entry in enumerate(frame.entries):
            assert (position in frame.details) == bool(entry[0] % 2)
    await outbox.aclose()


async def test_nothing_runs_on_after_aclose() -> None:
    broker = MemoryBroker()
    bus = MemoryBus(broker)
    await bus.connect()
    reader = Reader()
    await bus.subscribe(tokens_of(R1), reader.on_frame)
    outbox = await make_outbox(bus)
    outbox.open(R1, 1, 0)
    outbox.add(R1, 1, 0, [1], finish=FINISH_STOP)
    await outbox.aclose()
    await asyncio.sleep(TIMES.finish_again_s * 3)
    assert len(reader.frames) == 1
    await bus.aclose()


# ---- the decisions alone


def state_with(router_id: RouterId = R1, *streams: int) -> OutboxState:
    state = OutboxState(W, 7, TIMES)
    for stream_id in streams or (1,):
        state.open(router_id, stream_id, 0)
    return state


def entries(frame: TokenFrame | None) -> list[tuple[int, int, int, list[int], int]]:
    assert frame is not None
    return frame.entries


def test_an_open_stream_without_tokens_is_replayed_as_nothing() -> None:
    assert entries(state_with().replay(ask(0))) == []
    assert state_with().replay(ask(0, attempt=1)) is None
    assert state_with().replay(ask(0, router_id=R2)) is None


def test_a_replay_starts_where_it_is_asked_to() -> None:
    state = state_with()
    state.add((R1, 1, 0), [1, 2, 3], FINISH_NONE, None, 0.0)
    state.add((R1, 1, 0), [4], FINISH_LENGTH, None, 0.0)
    assert entries(state.replay(ask(0))) == [(1, 0, 0, [1, 2, 3, 4], FINISH_LENGTH)]
    assert entries(state.replay(ask(3))) == [(1, 0, 3, [4], FINISH_LENGTH)]
    assert entries(state.replay(ask(4))) == [(1, 0, 4, [], FINISH_LENGTH)]


def logprobs(*values: float) -> EntryDetail:
    return EntryDetail(logprobs=tuple(TokenLogprob(value) for value in values))


def test_log_probabilities_stay_with_their_tokens_in_a_replay() -> None:
    state = state_with()
    first = EntryDetail(logprobs=(TokenLogprob(-1.0), TokenLogprob(-2.0)), computed_tokens=9, cached_tokens=3)
    state.add((R1, 1, 0), [1, 2], FINISH_NONE, first, 0.0)
    state.add((R1, 1, 0), [3], FINISH_NONE, None, 0.0)
    state.add((R1, 1, 0), [4], FINISH_NONE, logprobs(-4.0), 0.0)
    whole = state.replay(ask(0))
    assert entries(whole) == [(1, 0, 0, [1, 2], 0), (1, 0, 2, [3], 0), (1, 0, 3, [4], 0)]
    assert whole is not None
    assert whole.details == {0: first, 2: logprobs(-4.0)}
    later = state.replay(ask(1))
    assert entries(later)[0] == (1, 0, 1, [2], 0)
    assert later is not None
    assert later.details[0] == logprobs(-2.0)
    assert decode_frame(encode(later)) == later


def test_the_detail_of_an_end_comes_with_every_copy_of_it() -> None:
    state = state_with(R1, 1, 2)
    failed = EntryDetail(error_code="engine_error", error="it broke")
    stopped = EntryDetail(logprobs=(TokenLogprob(-1.0),), stop_token=2)
    state.add((R1, 1, 0), [8], FINISH_NONE, logprobs(-3.0), 0.0)
    state.add((R1, 1, 0), [], FINISH_ERROR, failed, 0.0)
    state.add((R1, 2, 0), [9], FINISH_STOP, stopped, 0.0)
    frame = state.take(R1, 0.0)
    assert frame is not None
    assert frame.entries == [(1, 0, 0, [8], 0), (1, 0, 1, [], FINISH_ERROR), (2, 0, 0, [9], FINISH_STOP)]
    assert frame.details == {0: logprobs(-3.0), 1: failed, 2: stopped}
    again = state.take(R1, TIMES.finish_again_s)
    assert again is not None
    assert again.entries == [(1, 0, 1, [], FINISH_ERROR), (2, 0, 1, [], FINISH_STOP)]
    assert again.details == {0: failed, 1: EntryDetail(stop_token=2)}


def test_nothing_is_added_after_an_end_or_to_what_was_never_opened() -> None:
    state = state_with()
    assert state.add((R1, 1, 0), [1], FINISH_CANCELLED, None, 0.0)
    assert not state.add((R1, 1, 0), [2], FINISH_NONE, None, 0.0)
    assert not state.add((R1, 9, 0), [2], FINISH_NONE, None, 0.0)
    assert not state.add((R2, 1, 0), [2], FINISH_NONE, None, 0.0)


def test_a_frame_that_could_not_be_queued_is_owed_again() -> None:
    state = state_with(R1, 1, 2)
    state.add((R1, 1, 0), [1], FINISH_NONE, None, 0.0)
    state.take(R1, 0.0)
    state.add((R1, 1, 0), [2], FINISH_NONE, None, 0.0)
    state.add((R1, 2, 0), [7], FINISH_STOP, None, 0.0)
    frame = state.take(R1, 0.0)
    state.not_sent(R1, entries(frame), 0.02)
    state.add((R1, 1, 0), [3], FINISH_NONE, None, 0.01)
    assert state.due(0.01) == []
    assert state.next_at() == 0.02
    assert sorted(entries(state.take(R1, 0.02))) == [(1, 0, 1, [2, 3], 0), (2, 0, 0, [7], FINISH_STOP)]


def test_a_router_is_gone_only_after_a_row_of_refusals() -> None:
    state = state_with()
    state.add((R1, 1, 0), [1], FINISH_NONE, None, 0.0)
    now, refusals = 0.0, 0
    while True:
        assert state.take(R1, now) is not None
        refusals += 1
        if state.on_refused(R1, now):
            break
        assert state.due(now) == []
        now += PROBE_S
    assert now >= TIMES.gone_after_s
    assert refusals == 4


def test_a_probe_that_nobody_refuses_ends_the_suspicion() -> None:
    state = state_with()
    state.add((R1, 1, 0), [1], FINISH_NONE, None, 0.0)
    state.take(R1, 0.0)
    assert not state.on_refused(R1, 0.0)
    assert entries(state.take(R1, 0.1)) == [(1, 0, 0, [1], 0)]
    state.add((R1, 1, 0), [2], FINISH_NONE, None, 0.15)
    assert state.take(R1, 0.15) is None
    assert entries(state.take(R1, 0.21)) == [(1, 0, 1, [2], 0)]
    state.add((R1, 1, 0), [3], FINISH_NONE, None, 0.22)
    assert entries(state.take(R1, 0.22)) == [(1, 0, 2, [3], 0)]
    assert not state.on_refused(R1, 5.0)


def test_no_router_is_gone_just_after_our_own_reconnection() -> None:
    state = state_with()
    state.add((R1, 1, 0), [1], FINISH_NONE, None, 0.0)
    state.take(R1, 0.0)
    assert not state.on_refused(R1, 0.0)
    state.on_connected(10.0)
    assert state.take(R1, 10.0) is not None
    assert not state.on_refused(R1, 10.0)
    assert not state.on_refused(R1, 10.35)
    assert state.on_refused(R1, 10.45)


def test_a_reconnection_starts_a_second_before_where_it_broke() -> None:
    state = state_with(R1, 1, 2)
    state.add((R1, 2, 0), [9], FINISH_STOP, None, 0.0)
    state.take(R1, 0.0)
    state.acknowledge(ack(R1, (2, 0)))
    for step in range(100):
        state.add((R1, 1, 0), [step], FINISH_NONE, None, step / 10)
        state.take(R1, step / 10)
    state.on_connected(60.0)
    assert entries(state.take(R1, 60.0)) == [(1, 0, 89, list(range(89, 100)), 0)]


def test_everything_a_refused_frame_held_is_sent_again() -> None:
    state = state_with(R1, 1, 2)
    state.add((R1, 1, 0), list(range(500)), FINISH_NONE, None, 0.0)
    state.add((R1, 2, 0), [1], FINISH_STOP, None, 0.0)
    frame = state.take(R1, 0.0)
    state.on_refused(R1, 0.001)
    assert state.take(R1, 0.2) == frame
