"""Finds stop strings in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Keeps back only text that may be the start of a stop string.

    What it finds does not depend on how the text was cut: the stop string that is complete first ends the text, and of
    several that are complete at the same character the longest.
    """

    __slots__ = ("_firsts", "_stops", "held")

    def __init__(self, stops: Sequence[str]) -> None:
        assert stops
        assert all(stops)
        self._stops = tuple(stops)
        self._firsts = frozenset(stop[0] for stop in stops)
        self.held = ""

    def feed(self, piece: str, *, may_stop: bool = True) -> tuple[str, bool]:
        """The text that can be shown now, and whether a stop string was found (then nothing must follow).

        With `may_stop=False` a stop string that ends in this piece is passed over as ordinary text.
        """
        text = self.held + piece
        if may_stop:
            cut = self._find(text)
            if cut is not None:
                self.held = ""
                return text[:cut], True
        kept = self._unfinished(text)
        if not kept:
            self.held = ""
            return text, False
        self.held = text[-kept:]
        return text[:-kept], False

    def flush(self) -> str:
        """What was kept back, at the end of the text."""
        held, self.held = self.held, ""
        return held

    def _find(self, text: str) -> int | None:
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
        return best[1] if best else None

    def _unfinished(self, text: str) -> int:
        """Length of the longest suffix that begins a stop string without completing it."""
        if not any(first in text for first in self._firsts):
            return 0
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if stop.startswith(text[-length:]):
                    longest = length
                    break
        return longest
