"""The demo's report as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.demo.demo_charts import CHARTS, THEMES, Chart, draw_chart
from experiments.demo.results import Results
from kvcore.monitoring.html_page import charts, figure, heading, page, paragraphs, table

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
_FOOTER = "<footer>Made by <code>kvdistill demo</code>. The figures are in report.json beside this page.</footer>"


def render_page(
    results: Results, headings: Sequence[str], rows: Sequence[Sequence[str]], verdict: Sequence[str]
) -> str:
    """The whole page."""
    return page(
        "kvdistill demo",
        (
            "<main>",
            heading("A student that reasons in latents, taught by two teachers' K/V", 1),
            paragraphs(verdict, "missed" if results.misses() else ""),
            heading("Accuracy on held-out items"),
            table(headings, rows),
            heading("Pictures"),
            charts(_figure(title, chart, results) for title, chart in CHARTS.items()),
            heading("What was compared"),
            paragraphs([_COMPARED, _LIMITS]),
            table(("setting", "value"), list(results.facts.items())),
            heading("What it cost"),
            table(("figure", "value"), _costs(results)),
            heading("Time by stage"),
            table(("stage", "seconds"), _numbers(results.seconds)),
            "</main>",
            _FOOTER,
        ),
    )


def _figure(title: str, chart: Chart, results: Results) -> str:
    light, dark = (draw_chart(chart, results, THEMES[theme]) for theme in ("light", "dark"))
    return figure(title, light, dark)


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
