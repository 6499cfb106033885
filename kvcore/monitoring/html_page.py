"""Self-contained HTML pages: no external resources, light and dark mode, any width."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --bad: #b3261e;
  --good: #157347; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14181d; --ink: #e6edf3; --soft: #9aa4af; --line: #3d444d; --bad: #ff8a70;
    --good: #4cc38a; }
}
body { margin: 0 auto; padding: 1.25rem; max-width: 70rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, figcaption { max-width: 46rem; margin: .4rem 0; }
figcaption { color: var(--soft); }
.missed { color: var(--bad); font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { min-width: 4.5rem; } td:last-child { min-width: 10rem; }
th { color: var(--soft); font-weight: 600; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
.charts img { width: 100%; }
.stack { width: 100%; } .stack td { overflow-wrap: anywhere; min-width: 0; } .stack td:last-child { min-width: 0; }
figure { margin: 1rem 0; }
.charts figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; }
summary { cursor: pointer; margin: .5rem 0; }
@media (max-width: 40rem) {
  .stack thead { display: none; }
  .stack, .stack tbody, .stack tr { display: block; }
  .stack tr { border-bottom: 1px solid var(--line); padding: .4rem 0; }
  .stack td { display: inline-block; border: 0; padding: 0 .6rem 0 0; } .stack td:first-child { display: block; }
  .stack td + td::before { content: attr(data-name) " "; color: var(--soft); }
}
footer { margin-top: 2rem; color: var(--soft); font-size: .9rem; }
"""

_NARROW, _DARK = "(max-width: 40rem)", "(prefers-color-scheme: dark)"


def page(title: str, parts: Iterable[str], head: str = "") -> str:
    """Returns the whole document; `parts` are HTML, and `head` is appended to the `<head>`."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
{head}</head>
<body>
{chr(10).join(parts)}
</body>
</html>
"""


def heading(text: str, level: int = 2) -> str:
    """A heading; level 1 is the page's title."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraphs(texts: Iterable[str], kind: str = "") -> str:
    """One paragraph per text; `kind`: their class, such as `missed`."""
    attribute = f' class="{kind}"' if kind else ""
    return "\n".join(f"<p{attribute}>{escape(text)}</p>" for text in texts)


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table that scrolls sideways if it is too wide."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in headings)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def stack(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table whose rows become lists of names and values if the page is too narrow for columns."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in headings)
    body = "\n".join(
        "<tr>"
        + "".join(
            f'<td data-name="{escape(name)}">{escape(str(cell))}</td>' for name, cell in zip(headings, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<table class="stack"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>'


def figure(
    alternative: str,
    light: bytes,
    dark: bytes | None = None,
    caption: str = "",
    *,
    narrow: tuple[bytes, bytes] | None = None,
) -> str:
    """An embedded picture.

    Args:
        alternative: text for screen readers.
        light: PNG or SVG.
        dark: the picture for dark mode, if there is one.
        caption: shown below.
        narrow: the pictures for narrow windows, light and dark, if they differ.
    """
    image = f'<img src="{_data_uri(light)}" alt="{escape(alternative, quote=True)}">'
    # The browser takes the first that fits.
    sources = [(_NARROW + " and " + _DARK, narrow[1]), (_NARROW, narrow[0])] if narrow else []
    sources += [(_DARK, dark)] if dark is not None else []
    if sources:
        fitting = "".join(f'<source media="{media}" srcset="{_data_uri(picture)}">' for media, picture in sources)
        image = f"<picture>{fitting}{image}</picture>"
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{image}{below}</figure>\n"


def charts(figures: Iterable[str]) -> str:
    """Figures side by side, as many as the width allows."""
    return f'<div class="charts">\n{"".join(figures)}\n</div>'


def _data_uri(picture: bytes) -> str:
    kind = "png" if picture.startswith(b"\x89PNG") else "svg+xml"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
