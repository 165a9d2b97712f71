"""The event log of a run on virtual time: one line for each event, and where two logs part."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..bus.base import Delivery


class EventLog:
    """Lines "seconds who what", in the order in which things happened."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.lines: list[str] = []
        self._now = now

    def message(self, who: str, delivery: Delivery) -> None:
        """A core message at the server."""
        self.lines.append(f"{self._now():11.6f} {who:<14} > {delivery.subject} {len(delivery.payload)} B")

    def add(self, who: str, what: str) -> None:
        """Something has happened."""
        self.lines.append(f"{self._now():11.6f} {who:<14} {what}")


def first_difference(first: Sequence[str], second: Sequence[str], *, context: int = 5) -> str:
    """The first line that differs, with the equal ones before it; "" for logs that are equal."""
    index = next((index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    if index is None:
        if len(first) == len(second):
            return ""
        index = min(len(first), len(second))
    before = [f"  {line}" for line in first[max(0, index - context) : index]]
    sides = [
        f"{sign} {log[index] if index < len(log) else '(ends here)'}" for sign, log in (("-", first), ("+", second))
    ]
    return "\n".join([f"line {index + 1}:", *before, *sides])
