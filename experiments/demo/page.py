"""The report as one HTML page that loads nothing from outside, in light and dark, on any width."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from experiments.demo.picture import CHARTS, THEMES, Chart, draw_chart
from experiments.demo.results import Results

_STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14181d; --ink: #e6edf3; --soft: #9aa4af; --line: #3d444d; --bad: #ff8a70; }
}
body { margin: 0 auto; padding: 1.25rem; max-width: 70rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { max-width: 46rem; margin: .4rem 0; }
.missed { color: var(--bad); font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { min-width: 4.5rem; } td:last-child { min-width: 10rem; }
th { color: var(--soft); font-weight: 600; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; }
footer { margin-top: 2rem; color: var(--soft); font-size: .9rem; }
"""

_COMPARED = (
    "Every arm starts from the same student, warmed up on reasoning text, and takes the same steps over the same data "
    "with the same seeds. It learns from the answer's cross-entropy after three latents and from the reasoning's "
    "cross-entropy as text. The KV arms add a loss between the student's keys and values at the latents and the "
    "teachers' at the reasoning tokens, pulled over gRPC while training. At inference there is no reasoning text: "
    "prompt, latents, answer."
)
_LIMITS = (
    "The best step of each arm is chosen on validation items; the accuracies are those of that saved model on test "
    "items that no arm, teacher or choice has seen. This is a toy task with tiny models: it shows that the machinery "
    "teaches, not how much larger models would gain, and not that R-KV picks better tokens than simpler selectors: "
    "here the reasoning has as many tokens as there are latents."
)


def render_page(
    results: Results, headings: Sequence[str], rows: Sequence[Sequence[str]], verdict: Sequence[str]
) -> str:
    """The whole page."""
    missed = bool(results.misses())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>kvdistill demo</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>A student that reasons in latents, taught by two teachers' K/V</h1>
{_paragraphs(verdict, "missed" if missed else "")}
<h2>Accuracy on held-out items</h2>
{_table(headings, rows)}
<h2>Pictures</h2>
<div class="charts">
{"".join(_figure(title, chart, results) for title, chart in CHARTS.items())}
</div>
<h2>What was compared</h2>
{_paragraphs([_COMPARED, _LIMITS])}
{_table(("setting", "value"), list(results.facts.items()))}
<h2>What it cost</h2>
{_table(("figure", "value"), _costs(results))}
<h2>Time by stage</h2>
{_table(("stage", "seconds"), _numbers(results.seconds))}
</main>
<footer>Made by <code>kvdistill demo</code>. The figures are in report.json beside this page.</footer>
</body>
</html>
"""


def _paragraphs(texts: Sequence[str], kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return "\n".join(f"<p{attribute}>{escape(text)}</p>" for text in texts)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _figure(title: str, chart: Chart, results: Results) -> str:
    dark, light = (_data_uri(draw_chart(chart, results, THEMES[theme])) for theme in ("dark", "light"))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(title)}" width="594" height="374"></picture></figure>\n'
    )


def _data_uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _costs(results: Results) -> list[tuple[str, str]]:
    memory = [(f"peak memory of {name}", f"{mb:,.0f} MiB") for name, mb in results.peak_memory_mb.items()]
    return [
        ("bytes per sample, both teachers", f"{results.bytes_per_sample:,.0f}"),
        ("the teachers' whole caches in bf16", f"{results.raw_bf16_bytes_per_sample:,.0f}"),
        ("time spent waiting for K/V", f"{results.stall_fraction:.1%}"),
        ("samples per second", f"{results.samples_per_second:,.0f}"),
        ("teacher tokens per second", f"{results.teacher_tokens_per_second:,.0f}"),
        ("replay from the store, largest difference in loss", f"{results.replay.largest_difference:.1e}"),
        *memory,
    ]


def _numbers(values: Mapping[str, float]) -> list[tuple[str, str]]:
    return [(name, f"{value:.1f}") for name, value in values.items()]
