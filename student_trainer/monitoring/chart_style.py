"""The style of all charts: colours for light and dark backgrounds, and drawing without a display."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kvcore.monitoring import html_page


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of the background, text, faint lines, and of `series`: lines and bars that are easy to tell apart."""

    ground: str
    ink: str
    faint: str
    series: tuple[str, ...]


LIGHT = Theme(
    "#ffffff",
    "#1b1f24",
    "#c9d1d9",
    ("#0b62a4", "#c8553d", "#1a936f", "#8456a8", "#b58900", "#8a8f98", "#c2498f", "#2aa1b3"),
)
DARK = Theme(
    "#14181d",
    "#e6edf3",
    "#3d444d",
    ("#5cb3ff", "#ff8a70", "#4fd1a1", "#c39bea", "#f0c95a", "#9aa4af", "#ff94d0", "#6ad7e8"),
)
Fill = Callable[[Figure, Theme], None]


def draw(fill: Fill, theme: Theme, inches: tuple[float, float], kind: Literal["png", "svg"]) -> bytes:
    """Draws one picture; the same input gives the same bytes.

    Args:
        fill: adds axes and titles to the figure.
        theme: the colours.
        inches: width and height.
        kind: the file format.
    """
    with rc_context(style(theme)):
        figure = Figure(figsize=inches, layout="constrained")
        fill(figure, theme)
        return rendered(figure, kind)


def html_figure(title: str, fill: Fill, inches: tuple[float, float], caption: str = "") -> str:
    """Draws a picture for an HTML page, for light and dark backgrounds."""
    light, dark = (draw(fill, theme, inches, "svg") for theme in (LIGHT, DARK))
    return html_page.figure(title, light, dark, caption)


def rendered(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    """The bytes of a figure."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def style(theme: Theme) -> dict[Any, Any]:
    """Matplotlib's settings for `rc_context`."""
    return {
        "font.size": 11,
        "axes.titlesize": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": theme.ground,
        "axes.facecolor": theme.ground,
        "savefig.facecolor": theme.ground,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "axes.edgecolor": theme.faint,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "svg.hashsalt": "kvdistill",
    }
