"""What commands read and write as text: addresses, and tables that are the same in a terminal, a pipe and a log."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Of a server: host:port.
ENDPOINT = re.compile(r"[^\s/]+:\d{1,5}")


def in_columns(rows: Sequence[Sequence[str]], right: bool = False) -> str:
    """Rows as lines whose columns stand below one another; `right` aligns all columns but the first to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for row in rows:
        cells = [
            text.rjust(width) if right and place else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
