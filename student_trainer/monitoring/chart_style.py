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
from kvcore.monitoring.colours import DARK_SERIES, LIGHT_SERIES


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of the background, text, faint lines, and of `series`: lines and bars that are easy to tell apart."""

    ground: str
    ink: str
    faint: str
    series: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1b1f24", "#c9d1d9", LIGHT_SERIES)
DARK = Theme("#14181d", "#e6edf3", "#3d444d", DARK_SERIES)
Fill = Callable[[Figure, Theme], None]
# What to draw, and width and height in inches.
Layout = tuple[Fill, tuple[float, float]]


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


def html_figure(title: str, wide: Layout, caption: str = "", *, narrow: Layout | None = None) -> str:
    """Draws a picture for an HTML page, for light and dark backgrounds.

    Args:
        title: for screen readers.
        wide: the drawing function, and width and height in inches.
        caption: shown below.
        narrow: the same for narrow windows; as `wide` by default.
    """

    def both(layout: Layout) -> tuple[bytes, bytes]:
        fill, inches = layout
        return draw(fill, LIGHT, inches, "svg"), draw(fill, DARK, inches, "svg")

    return html_page.figure(title, *both(wide), caption, narrow=None if narrow is None else both(narrow))


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
