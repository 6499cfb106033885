"""The colours of curves and bars in every chart: easy to tell apart, on a light and on a dark background."""

from __future__ import annotations

LIGHT_SERIES = ("#0b62a4", "#c8553d", "#1a936f", "#8456a8", "#b58900", "#8a8f98", "#c2498f", "#2aa1b3")
DARK_SERIES = ("#5cb3ff", "#ff8a70", "#4fd1a1", "#c39bea", "#f0c95a", "#9aa4af", "#ff94d0", "#6ad7e8")


def variables(colours: tuple[str, ...]) -> str:
    """CSS variables `--c0`, `--c1`, ..."""
    return " ".join(f"--c{place}: {colour};" for place, colour in enumerate(colours))


STYLE = f"""
:root {{ {variables(LIGHT_SERIES)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {variables(DARK_SERIES)} }} }}
""" + "\n".join(f".c{place} {{ --shade: var(--c{place}); }}" for place in range(len(LIGHT_SERIES)))
