"""Pages of a running process that refresh themselves, and pages of its end. They load nothing from other hosts."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from fastapi import FastAPI, HTTPException, Response

from kvcore.monitoring import charts, colours
from kvcore.monitoring.html_page import page

_STYLE = """
.state { font-weight: 600; } .good { color: var(--good); } .bad { color: var(--bad); }
.old .state { color: var(--soft); }
.tiles { display: grid; gap: .75rem; margin: 1rem 0; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.tiles div { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; overflow-wrap: anywhere; }
.tiles dt, .tiles small { color: var(--soft); font-size: .85rem; display: block; }
.tiles dd { margin: 0; font-size: 1.35rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.facts { display: grid; gap: 0 2rem; margin: 0; }
.facts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.facts div { display: grid; grid-template-columns: 11rem 1fr; border-bottom: 1px solid var(--line); padding: .3rem 0; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
a { color: inherit; margin-right: .75rem; }
h1 { overflow-wrap: anywhere; } h3 { font-size: .95rem; margin: .5rem 0; font-weight: 600; }
progress { width: 100%; height: .8rem; accent-color: var(--c0); }
.shares { display: flex; height: 1rem; border-radius: .25rem; overflow: hidden; margin: .5rem 0; }
.shares div { background: var(--shade); }
@media (max-width: 40rem) {
  body { padding: 1rem; }
  .tiles { grid-template-columns: repeat(auto-fit, minmax(6.8rem, 1fr)); gap: .5rem; }
  .tiles div { padding: .4rem .5rem; } .tiles dd { font-size: 1.15rem; }
  .facts div { grid-template-columns: 9.5rem 1fr; }
}
"""

_STATIC = Path(__file__).parent / "static"
_DRAWING = ("uplot/uPlot.iife.min.js", "charts.js")
_SCRIPTS = (*_DRAWING, "refresh.js")
# An empty icon, so that browsers do not request one.
_HEAD = f"""<link rel="icon" href="data:,">
<style>{colours.STYLE}{charts.STYLE}{_STYLE}</style>
<style>{(_STATIC / "uplot" / "uPlot.min.css").read_text(encoding="utf-8")}</style>"""
# A refresh for browsers without scripts.
_REFRESH = '<noscript><meta http-equiv="refresh" content="10"></noscript>'
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; script-src "
)

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": f"{_POLICY}'self'; connect-src 'self'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def add_scripts(app: FastAPI) -> None:
    """Adds the scripts that live pages load from their own server."""

    @app.get("/static/{name:path}")
    def script(name: str) -> Response:
        """One of the scripts."""
        if name not in _SCRIPTS:
            raise HTTPException(404)
        return Response(_script(name), media_type="text/javascript", headers={"X-Content-Type-Options": "nosniff"})


def live_page(title: str, parts: Iterable[str], links: Sequence[str] = ()) -> str:
    """Returns the whole document; send it with `HEADERS`, from an app with `add_scripts`.

    Args:
        title: of the window.
        parts: HTML that is refreshed every two seconds; always the same number of chart blocks.
        links: paths of the same server, shown at the end.
    """
    anchors = "".join(f'<a href="{escape(path)}">{escape(path.removeprefix("/"))}</a>' for path in links)
    body = (
        '<p id="stale" class="missed" role="alert" hidden></p>',
        _main(parts),
        f"<footer>{anchors}</footer>",
        *(f'<script src="static/{name}"></script>' for name in _SCRIPTS),
    )
    return page(title, body, _HEAD + _REFRESH)


def saved_page(title: str, parts: Iterable[str]) -> str:
    """Returns the whole document as a file that needs no server: the page as it was, with its charts."""
    scripts = [_script(name) for name in _DRAWING]
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    policy = _POLICY + " ".join(f"'sha256-{one}'" for one in hashes)
    body = (_main(parts), *(f"<script>{text}</script>" for text in scripts))
    return page(title, body, f'<meta http-equiv="Content-Security-Policy" content="{policy}">{_HEAD}')


def _main(parts: Iterable[str]) -> str:
    return "\n".join(("<main>", *parts, "</main>"))


def _script(name: str) -> str:
    return (_STATIC / name).read_text(encoding="utf-8")


def state(text: str, *, good: bool, ended: str = "") -> str:
    """The line with the state of the process. `ended`: what the page says once the process has ended as expected."""
    attribute = f' data-ended="{escape(ended, quote=True)}"' if ended else ""
    return f'<p class="state {"good" if good else "bad"}" role="status"{attribute}>{escape(text)}</p>'


def tiles(figures: Iterable[tuple[str, str, str]]) -> str:
    """Key figures: name, value, and a note below the value."""
    return _list("tiles", ((name, f"{escape(value)}<small>{escape(note)}</small>") for name, value, note in figures))


def facts(rows: Mapping[str, object]) -> str:
    """Names and values, in as many columns as fit."""
    return _list("facts", ((name, escape(str(value))) for name, value in rows.items()))


def _list(kind: str, rows: Iterable[tuple[str, str]]) -> str:
    items = "\n".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in rows)
    return f'<dl class="{kind}">{items}</dl>'


def shares(parts: Mapping[str, float]) -> str:
    """A bar of parts that add up to 1, with a legend."""
    coloured = [(f"c{place % 8}", name, share) for place, (name, share) in enumerate(parts.items())]
    bar = "".join(f'<div class="{kind}" style="flex: {share:.4f}"></div>' for kind, _, share in coloured)
    legend = " ".join(
        f'<span class="key"><i class="{kind}"></i>{escape(name)} {share:.1%}</span>' for kind, name, share in coloured
    )
    summary = ", ".join(f"{name} {share:.1%}" for name, share in parts.items())
    return f'<div class="shares" role="img" aria-label="{escape(summary)}">{bar}</div><p>{legend}</p>'
