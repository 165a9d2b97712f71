"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

Row = Sequence[str]


def table(head: Row, rows: Sequence[Row], *, left: int = 1) -> list[str]:
    """Columns as wide as they must be; the first `left` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    adjust = [str.ljust if place < left else str.rjust for place in range(len(head))]
    return [
        "  ".join(to(cell, width) for to, cell, width in zip(adjust, row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
