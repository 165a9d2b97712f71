"""The token path alone: order, repeats, gaps, attempts, late ends, whatever frames do on their way."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.bus.base import Delivery
from hocket.bus.ids import WorkerId
from hocket.bus.messages import FINISH_LENGTH, FINISH_NONE, FINISH_STOP, EntryDetail, TokenFrame, TokenLogprob, encode
from hocket.router.api.stream import ShownToken, Stream, TokenPath
from hocket.router.generation import Failure

WORKER = WorkerId("decode-1-abc")


class Kept:
    """A writer that keeps what it is given, and in which order the streams were written."""

    def __init__(self, order: list[Kept] | None = None) -> None:
        self.text = b""
        self.writes = 0
        self.shown: list[int] = []
        self.ends: list[object] = []
        self.order = order if order is not None else []

    def write(self, parts: list[bytes], logprobs: Sequence[ShownToken]) -> None:
        assert not self.ends
        self.order.append(self)
        self.writes += 1
        self.text += b"".join(parts)
        self.shown += [token.token_id for token in logprobs]

    def end(self, parts: list[bytes], logprobs: Sequence[ShownToken], finish_reason: str, output_tokens: int) -> None:
        self.write(parts, logprobs)
        self.ends.append((finish_reason, output_tokens))

    def fail(self, failure: Failure) -> None:
        assert not self.ends
        self.ends.append(failure.code)


class Heard:
    """StreamEvents, kept."""

    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []

    def on_first_token(self, stream_id: int, detail: EntryDetail | None) -> None:
        self.events.append(("first", stream_id))

    def on_gap(self, stream_id: int, next_index: int) -> None:
        self.events.append(("gap", stream_id, next_index))

    def on_end(self, stream_id: int, finish: int, output_tokens: int, detail: EntryDetail | None) -> None:
        self.events.append(("end", stream_id, finish, output_tokens))

    def on_stop_string(self, stream_id: int, output_tokens: int) -> None:
        self.events.append(("stop", stream_id, output_tokens))

    def on_late_end(self, worker: WorkerId, stream_id: int, attempt: int) -> None:
        self.events.append(("late", stream_id, attempt))


class Rig:
    """A TokenPath with one or more streams."""

    def __init__(self, text, streams: int = 1, stops: Sequence[str] = ()) -> None:
        self.text = text
        self.heard = Heard()
        self.path = TokenPath(self.heard, text.table)
        self.order: list[Kept] = []
        self.kept = [Kept(self.order) for _ in range(streams)]
        self.ids = [self.path.open(Stream(text.detokenizer([]), kept, stops)) for kept in self.kept]

    def send(
        self,
        index: int,
        ids: Sequence[int],
        finish: int = FINISH_NONE,
        *,
        stream: int = 0,
        attempt: int = 0,
        detail=None,
    ) -> None:
        details = {} if detail is None else {0: detail}
        frame = TokenFrame(WORKER, 1, [(self.ids[stream], attempt, index, list(ids), finish)], details)
        self.path.on_frame(Delivery("tok", "", encode(frame)))

    def events(self, kind: str) -> list[tuple[object, ...]]:
        return [event for event in self.heard.events if event[0] == kind]


@pytest.fixture
def ids(text) -> list[int]:
    """Twenty tokens, characters split across some of them."""
    words = "the fox 世界 🎉"
    return text.prompts._encode([words], False)[0][:20]  # The same as `encode`, without waiting.


async def test_a_closed_stream_is_not_written_again(text, ids) -> None:
    rig = Rig(text)
    rig.send(0, ids[:1])
    assert rig.path.close(rig.ids[0])
    await asyncio.sleep(0)
    assert (rig.kept[0].writes, rig.kept[0].ends) == (0, [])
    assert not rig.path.close(rig.ids[0])


async def test_tokens_of_one_turn_leave_in_one_write(text, ids) -> None:
    rig = Rig(text)
    for index in range(3):
        rig.send(index, ids[index : index + 1])
    await asyncio.sleep(0)
    assert (rig.kept[0].writes, rig.kept[0].text.decode()) == (1, text.decode(ids[:3]))


async def test_repeated_and_overlapping_entries_are_shown_once(text, ids) -> None:
    rig = Rig(text)
    rig.send(0, ids[:2])
    rig.send(0, ids[:2])
    rig.send(1, ids[1:4])
    rig.send(0, ids[:1])
    rig.send(4, ids[4:], FINISH_LENGTH)
    rig.path.flush()
    assert rig.kept[0].text.decode() == text.decode(ids)
    assert rig.kept[0].ends == [("length", len(ids))]
    assert rig.path.repeated_entries == 2
    await asyncio.sleep(0)


async def test_a_gap_is_reported_once_a_turn_and_closed_by_a_replay(text, ids) -> None:
    rig = Rig(text)
    rig.send(0, ids[:1])
    rig.send(2, ids[2:3])
    rig.send(3, ids[3:4])
    assert rig.events("gap") == [("gap", 1, 1)]
    await asyncio.sleep(0)
    rig.send(4, ids[4:5])
    assert rig.events("gap") == [("gap", 1, 1)] * 2
    rig.send(1, ids[1:])
    rig.send(len(ids), [], FINISH_STOP)
    rig.path.flush()
    assert rig.kept[0].text.decode() == text.decode(ids)
    await asyncio.sleep(0)


async def test_an_end_behind_a_gap_waits_for_the_gap(text, ids) -> None:
    rig = Rig(text)
    rig.send(1, ids[1:], FINISH_LENGTH)
    assert not rig.events("end")
    rig.send(0, ids, FINISH_LENGTH)
    assert rig.events("end") == [("end", 1, FINISH_LENGTH, len(ids))]
    await asyncio.sleep(0)


async def test_an_end_that_comes_again_is_late_and_acknowledged_again(text, ids) -> None:
    rig = Rig(text)
    rig.send(0, ids, FINISH_LENGTH)
    rig.send(0, ids, FINISH_LENGTH)
    rig.send(0, ids[:1])
    assert rig.events("late") == [("late", 1, 0)]
    rig.path.flush()
    assert rig.kept[0].ends == [("length", len(ids))]
    await asyncio.sleep(0)


async def test_only_the_bound_attempt_counts(text, ids) -> None:
    rig = Rig(text)
    rig.send(0, ids[:2])
    rig.path.rebind(1, 1)
    rig.send(2, ids[2:3], FINISH_LENGTH)  # The old attempt's end is acknowledged and not shown.
    rig.send(2, ids[2:3], FINISH_LENGTH, attempt=2)  # A coming attempt's is neither: it will come again.
    assert rig.events("late") == [("late", 1, 0)]
    rig.send(0, ids, FINISH_LENGTH, attempt=1)
    rig.path.flush()
    assert rig.kept[0].text.decode() == text.decode(ids)
    assert rig.events("first") == [("first", 1)]
    await asyncio.sleep(0)


async def test_a_stop_token_counts_but_is_not_shown(text, ids) -> None:
    rig = Rig(text)
    rig.send(0, [*ids, ids[0]], FINISH_STOP, detail=EntryDetail(stop_token=ids[0]))
    rig.path.flush()
    assert rig.kept[0].text.decode() == text.decode(ids)
    assert rig.kept[0].ends == [("stop", len(ids) + 1)]
    await asyncio.sleep(0)


async def test_logprobs_follow_their_tokens_through_an_overlap(text, ids) -> None:
    rig = Rig(text)
    detail = EntryDetail(logprobs=tuple(TokenLogprob(-float(i)) for i in range(len(ids))))
    rig.send(0, ids[:3], detail=EntryDetail(logprobs=detail.logprobs[:3]))
    rig.send(0, ids, FINISH_LENGTH, detail=detail)
    rig.path.flush()
    assert rig.kept[0].shown == ids
    await asyncio.sleep(0)


async def test_half_a_character_at_the_end_is_shown_as_one_replacement(text) -> None:
    [half] = [token_id for token_id in range(text.table.size) if text.table.raw[token_id] == b"\xf0"]
    rig = Rig(text)
    rig.send(0, [half])
    rig.path.flush()
    assert rig.kept[0].writes == 0
    rig.send(1, [], FINISH_LENGTH)
    rig.path.flush()
    assert rig.kept[0].text.decode() == "\ufffd" == text.decode([half])
    await asyncio.sleep(0)


async def test_ids_that_the_tokenizer_does_not_have_are_silent(text) -> None:
    rig = Rig(text)
    rig.send(0, [10**6])
    rig.send(1, [-1])
    rig.send(2, [-(2**31)], FINISH_LENGTH)
    rig.path.flush()
    assert (rig.kept[0].text, rig.kept[0].ends) == (b"", [("length", 3)])
    await asyncio.sleep(0)


async def test_first_tokens_are_written_first(text, ids) -> None:
    rig = Rig(text, streams=3)
    rig.send(0, ids[:1], stream=0)
    rig.send(0, ids[:1], stream=1)
    rig.path.flush()
    rig.order.clear()
    rig.send(1, ids[1:2], stream=0)
    rig.send(1, ids[1:2], stream=1)
    rig.send(0, ids[:1], stream=2)
    rig.path.flush()
    assert rig.order == [rig.kept[2], rig.kept[0], rig.kept[1]]
    await asyncio.sleep(0)


async def test_a_writer_that_raises_costs_the_others_nothing(text, ids, caplog) -> None:
    rig = Rig(text, streams=2)
    rig.kept[0].ends.append("broken")  # Its next write fails.
    rig.send(0, ids[:1], stream=0)
    rig.send(0, ids[:1], stream=1)
    rig.path.flush()
    assert rig.kept[1].text.decode() == text.decode(ids[:1])
    assert "could not be written" in caplog.text
    await asyncio.sleep(0)


async def test_an_entry_that_cannot_be_taken_in_ends_its_own_stream_only(text, ids, caplog) -> None:
    class Broken:
        is_whole = False

        def text(self, token_id: int) -> str:
            raise ZeroDivisionError

        def flush(self) -> str:
            return ""

    rig = Rig(text, streams=2)
    broken = Kept()
    rig.ids.append(rig.path.open(Stream(Broken(), broken)))
    rig.send(0, ids[:1], stream=2)
    rig.send(0, ids[:1], stream=0)
    rig.path.flush()
    assert broken.ends == ["internal_error"]
    assert rig.events("stop") == [("stop", 3, 1)]
    assert rig.kept[0].text
    assert "could not be taken in" in caplog.text
    await asyncio.sleep(0)


async def test_frames_for_nobody_and_503s_are_passed_over(text) -> None:
    rig = Rig(text)
    rig.path.on_frame(Delivery("tok", "", b"", is_no_responders=True))
    rig.ids.append(99)
    rig.send(0, [1], stream=1)
    rig.path.fail(99, Failure("x", "y", is_retryable=False))
    rig.path.rebind(99, 1)
    assert not rig.path.close(99)
    assert rig.heard.events == []


@settings(max_examples=200, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_shuffled_and_repeated_frames_never_show_tokens_out_of_order(text, data, seed) -> None:
    """Whatever arrives, the text is always a prefix of the whole; once everything was replayed it is whole, and ended once."""
    asyncio.run(_shuffle(text, data, random.Random(seed)))


async def _shuffle(text, data, rng: random.Random) -> None:
    whole = [rng.randrange(text.table.size) for _ in range(data.draw(st.integers(1, 30)))]
    stops = data.draw(st.sampled_from([(), ("q",), ("the", "e f")]))
    rig = Rig(text, stops=stops)
    expected = text.decode(whole)
    cuts = sorted(rng.sample(range(1, len(whole)), rng.randrange(len(whole)))) if len(whole) > 1 else []
    entries = [(at, whole[at:to], FINISH_NONE) for at, to in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    entries.append((len(whole), [], FINISH_LENGTH))
    sent = [*entries, *rng.choices(entries, k=rng.randrange(5))]
    rng.shuffle(sent)
    for index, ids, finish in sent:
        rig.send(index, ids, finish, attempt=rng.choice([0, 0, 0, 7]))
        if rng.random() < 0.5:
            rig.path.flush()
        shown = rig.kept[0].text.replace(b'\\"', b'"').decode()
        if "\\" not in shown:
            assert expected.startswith(shown) or "\ufffd" in expected
    rig.send(0, whole, FINISH_LENGTH)  # A replay of everything.
    rig.path.flush()
    assert len(rig.kept[0].ends) == 1
    assert len(rig.events("end")) + len(rig.events("stop")) == 1
    if not stops:
        in_order = Rig(text)
        in_order.send(0, whole, FINISH_LENGTH)
        in_order.path.flush()
        assert rig.kept[0].text == in_order.kept[0].text
        assert rig.kept[0].ends == [("length", len(whole))]
    await asyncio.sleep(0)
