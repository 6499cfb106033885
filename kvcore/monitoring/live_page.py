"""Pages of a running process that refresh themselves and load no external resources."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from kvcore.monitoring import line_chart
from kvcore.monitoring.html_page import page

_STYLE = """
.state { font-weight: 600; } .good { color: var(--good); } .bad { color: var(--bad); }
.tiles { display: grid; gap: .75rem; margin: 1rem 0; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }
.tiles div { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; overflow-wrap: anywhere; }
.tiles dt, .tiles small { color: var(--soft); font-size: .85rem; display: block; }
.tiles dd { margin: 0; font-size: 1.35rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.facts { display: grid; gap: 0 2rem; margin: 0; }
.facts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.facts div { display: grid; grid-template-columns: 11rem 1fr; border-bottom: 1px solid var(--line); padding: .3rem 0; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; overflow-wrap: anywhere; }
.stack { width: 100%; } .stack td { overflow-wrap: anywhere; min-width: 0; } .stack td:last-child { min-width: 0; }
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
  .stack thead { display: none; }
  .stack, .stack tbody, .stack tr { display: block; }
  .stack tr { border-bottom: 1px solid var(--line); padding: .4rem 0; }
  .stack td { display: inline-block; border: 0; padding: 0 .6rem 0 0; } .stack td:first-child { display: block; }
  .stack td + td::before { content: attr(data-name) " "; color: var(--soft); }
}
"""

# Replaces <main> by that of a fresh copy of the page: the scroll position stays, and only the server renders.
_SCRIPT = """
const stale = document.getElementById("stale");
let last = new Date(), busy = false;
async function refresh() {
  if (busy || document.hidden || !getSelection().isCollapsed) return;
  busy = true;
  try {
    const answer = await fetch(location.href, { cache: "no-store", signal: AbortSignal.timeout(5000) });
    if (!answer.ok) throw new Error(answer.statusText);
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    document.querySelector("main").replaceWith(fresh.querySelector("main"));
    document.title = fresh.title;
    last = new Date();
    stale.hidden = true;
  } catch (error) {
    const when = last.toLocaleTimeString();
    stale.textContent = `No answer since ${when}: it ended or cannot be reached. The values are from then.`;
    stale.hidden = false;
  }
  busy = false;
}
setInterval(refresh, 2000);
document.addEventListener("visibilitychange", refresh);
"""

# A refresh for browsers without scripts. An empty icon, so that browsers do not request one.
_HEAD = f"""<noscript><meta http-equiv="refresh" content="10"></noscript>
<link rel="icon" href="data:,">
<style>{_STYLE}{line_chart.STYLE}</style>"""

_SCRIPT_HASH = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_SCRIPT_HASH}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def live_page(title: str, parts: Iterable[str], links: Sequence[str] = ()) -> str:
    """Returns the whole document; send it with `HEADERS`.

    Args:
        title: of the window.
        parts: HTML that is refreshed every two seconds.
        links: paths of the same server, shown at the end.
    """
    anchors = "".join(f'<a href="{escape(path)}">{escape(path.removeprefix("/"))}</a>' for path in links)
    body = (
        '<p id="stale" class="missed" role="alert" hidden></p>',
        "<main>",
        *parts,
        "</main>",
        f"<footer>{anchors}</footer>",
        f"<script>{_SCRIPT}</script>",
    )
    return page(title, body, _HEAD)


def state(text: str, *, good: bool) -> str:
    """The line with the state of the process."""
    return f'<p class="state {"good" if good else "bad"}" role="status">{escape(text)}</p>'


def tiles(figures: Iterable[tuple[str, str, str]]) -> str:
    """Key figures: name, value, and a note below the value."""
    return _list("tiles", ((name, f"{escape(value)}<small>{escape(note)}</small>") for name, value, note in figures))


def facts(rows: Mapping[str, object]) -> str:
    """Names and values, in as many columns as fit."""
    return _list("facts", ((name, escape(str(value))) for name, value in rows.items()))


def _list(kind: str, rows: Iterable[tuple[str, str]]) -> str:
    items = "\n".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in rows)
    return f'<dl class="{kind}">{items}</dl>'


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


def shares(parts: Mapping[str, float]) -> str:
    """A bar of parts that add up to 1, with a legend."""
    coloured = [(f"c{place % 6}", name, share) for place, (name, share) in enumerate(parts.items())]
    bar = "".join(f'<div class="{kind}" style="flex: {share:.4f}"></div>' for kind, _, share in coloured)
    legend = "".join(line_chart.key(kind, f"{name} {share:.1%}") for kind, name, share in coloured)
    summary = ", ".join(f"{name} {share:.1%}" for name, share in parts.items())
    return f'<div class="shares" role="img" aria-label="{escape(summary)}">{bar}</div><p>{legend}</p>'
