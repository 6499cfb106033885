"""Plain-text tables and endpoint syntax for commands."""

from __future__ import annotations

import re
from collections.abc import Sequence

# HOST:PORT of a server.
ENDPOINT = re.compile(r"[^\s/]+:\d+")


def in_columns(rows: Sequence[Sequence[str]], right: bool = False) -> str:
    """Formats rows as aligned columns; `right` aligns all columns except the first to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for row in rows:
        cells = [
            text.rjust(width) if right and place else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
