"""The demo's report as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.demo.demo_charts import CHARTS, chart_figure
from experiments.demo.inference_chart import inference_figure
from experiments.demo.questions import Inference
from experiments.demo.results import Results
from kvcore.monitoring.html_page import charts, heading, page, paragraphs, table

_COMPARED = (
    "Every arm starts from the same student, which was first trained on reasoning text. Every arm takes the same steps "
    "over the same data with the same seeds, and learns from two cross-entropies: that of the answer after three "
    "latents, and that of the reasoning as text. The KV arms add a loss between the student's keys and values at the "
    "latents and the teachers' at the reasoning tokens, which the teachers send over gRPC during training. At "
    "inference there is no reasoning text: prompt, latents, answer."
)
_LIMITS = (
    "Each arm's best step is chosen on validation items. The accuracies are those of that saved model on test items "
    "that were not used for training or for any choice. This is a toy task with tiny models: it shows that K/V "
    "distillation works here, not how much larger models would gain. It does not show that R-KV selects better tokens "
    "than simpler selectors either, since here the reasoning has as many tokens as there are latents."
)
_FOOTER = "<footer>Made by <code>kvdistill demo</code>. report.json next to this page has the values.</footer>"


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
            heading("Charts"),
            charts(chart_figure(title, results) for title in CHARTS),
            *_inference(results.inference),
            heading("What was compared"),
            paragraphs([_COMPARED, _LIMITS]),
            table(("setting", "value"), list(results.facts.items())),
            heading("Costs"),
            table(("figure", "value"), _costs(results)),
            heading("Time by stage"),
            table(("stage", "seconds"), [(name, f"{value:.1f}") for name, value in results.seconds.items()]),
            "</main>",
            _FOOTER,
        ),
    )


def _inference(inference: Inference) -> list[str]:
    headings = ("question", "answer", "after latents", "forward passes", "with written reasoning", "forward passes")
    asked = [
        (one.question, one.reference, one.latent, one.latent_passes, one.written, one.written_passes)
        for one in inference.asked
    ]
    return [
        heading("Held-out questions"),
        table(headings, asked),
        paragraphs(inference.sentences()),
        inference_figure(inference),
    ]


def _costs(results: Results) -> list[tuple[str, str]]:
    return [
        ("bytes per sample, both teachers", f"{results.bytes_per_sample:,.0f}"),
        ("the teachers' whole caches in bf16", f"{results.raw_bf16_bytes_per_sample:,.0f}"),
        ("time spent waiting for K/V", f"{results.stall_fraction:.1%}"),
        ("samples per second", f"{results.samples_per_second:,.0f}"),
        ("teacher tokens per second", f"{results.teacher_tokens_per_second:,.0f}"),
        ("replay from the store, largest difference in loss", f"{results.replay.largest_difference:.1e}"),
        *((f"peak memory of {name}", f"{mb:,.0f} MiB") for name, mb in results.peak_memory_mb.items()),
    ]
