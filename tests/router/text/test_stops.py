"""Stop strings in text that comes in pieces: the same answer as for the whole text, and nothing shown too early."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.router.text.stops import StopScanner


def naive(text: str, stops: list[str]) -> tuple[str, bool]:
    """Read character by character; the first moment any stop string is complete ends the text before the longest of them."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def scanned(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    scanner = StopScanner(stops)
    shown = ""
    for piece in pieces:
        text, is_stopped = scanner.feed(piece)
        shown += text
        if is_stopped:
            return shown, True
    return shown + scanner.flush(), False


@settings(max_examples=2000)
@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_any_split_gives_what_a_naive_reader_finds(pieces, stops) -> None:
    assert scanned(pieces, stops) == naive("".join(pieces), stops)


@settings(max_examples=500)
@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_only_what_may_begin_a_stop_string_is_kept_back(pieces, stops) -> None:
    scanner = StopScanner(stops)
    for piece in pieces:
        _, is_stopped = scanner.feed(piece)
        if is_stopped:
            return
        assert not scanner.held or any(stop.startswith(scanner.held) and stop != scanner.held for stop in stops)


def test_a_piece_that_may_not_stop_is_text_but_may_begin_a_stop_string() -> None:
    scanner = StopScanner(["fox"])
    assert scanner.feed("a fox f", may_stop=False) == ("a fox ", False)
    assert scanner.feed("ox!") == ("", True)


@pytest.mark.parametrize("stop", ["世界", "🎉", "\n\n", "</s>"])
def test_stop_strings_are_text_of_any_script(stop) -> None:
    assert scanned([*f"before{stop}after"], [stop]) == ("before", True)
