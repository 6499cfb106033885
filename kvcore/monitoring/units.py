"""Formats numbers, bytes and durations for people."""

from __future__ import annotations


def number(value: float) -> str:
    """Formats a number with about three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def in_bytes(count: float) -> str:
    """Formats a number of bytes, in powers of ten."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1000:.1f} kB"


def in_time(seconds: float) -> str:
    """Formats seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
