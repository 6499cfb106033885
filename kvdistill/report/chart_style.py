"""What all charts share: colours for light and for dark surroundings, and drawing without a display."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of one surrounding. `series`: of lines and bars, to be told apart in any order."""

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


def draw(
    fill: Callable[[Figure, Theme], None], theme: Theme, inches: tuple[float, float], kind: Literal["png", "svg"]
) -> bytes:
    """One picture, the same bytes whenever it is drawn.

    Args:
        fill: puts axes and titles into the figure.
        theme: the surrounding that it is for.
        inches: width and height.
        kind: the format.
    """
    with rc_context(_style(theme)):
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasAgg(figure)
        fill(figure, theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
        return buffer.getvalue()


def _style(theme: Theme) -> dict[Any, Any]:
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
