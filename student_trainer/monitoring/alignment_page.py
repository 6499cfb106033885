"""The HTML page of the alignment report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kvcore.monitoring.html_page import figure, heading, page, paragraphs, stack, table
from student_trainer.monitoring.alignment_pictures import (
    LOWEST_SHOWN,
    NARROW,
    WIDE,
    Look,
    Report,
    draw_coverage,
    draw_explained,
    draw_layer_map,
    draw_similarity,
    ratio,
)
from student_trainer.monitoring.chart_style import DARK, LIGHT

_Draw = Callable[[Report, Look], bytes | None]
_PICTURES: tuple[tuple[str, str, _Draw], ...] = (
    (
        "explained variance by layer",
        (
            "The variance that the map explains on held-out samples: 1 is exact, 0 is no better than the mean. The "
            "control is fitted and measured in the same way with the student's tokens of another sample of the batch, "
            "so it shows what position and format alone explain. What counts is how far the map is above the control. "
            f"Bars end at {LOWEST_SHOWN:g}."
        ),
        draw_explained,
    ),
    ("layer map", "The teacher layers that each student layer is compared with.", draw_layer_map),
    (
        "similarity of layers",
        (
            "Linear CKA on the calibration samples: 1 means equal except for a rotation and a scale. The map takes the "
            "path with the largest sum through the mean of both, without going back to an earlier layer."
        ),
        draw_similarity,
    ),
    (
        "token coverage",
        (
            "Tokens of the text, except the first ones (sinks), as the mean of all samples. If a selection keeps only "
            "some of the teacher's tokens, most student tokens have no counterpart."
        ),
        draw_coverage,
    ),
)
_INTRODUCTION = "Measured on the calibration samples {when}. The numbers are in alignment.json in this directory."
_OVERVIEW_HEADINGS = (
    "teacher",
    "keys explained",
    "control",
    "values explained",
    "control",
    "student tokens with a counterpart",
)


def render_page(teachers: Mapping[str, Report], step: int) -> str:
    """Returns the whole page. `step`: the steps before the alignments were fitted."""
    when = f"after step {step:,}" if step else "before the first step"
    return page(
        "kvdistill alignment",
        (
            heading("Alignment of the teachers' K/V with the student's", 1),
            paragraphs([_INTRODUCTION.format(when=when)]),
            stack(_OVERVIEW_HEADINGS, [_overview(name, report) for name, report in teachers.items()]),
            *(_teacher(name, report) for name, report in teachers.items()),
        ),
    )


def _overview(name: str, report: Report) -> tuple[str, ...]:
    explained, control = report["explained_variance"], report["explained_variance_shuffled"]
    means = [_mean(part[tensor]) for tensor in ("k", "v") for part in (explained, control)]
    tokens = (report["coverage"] or {}).get("student_tokens")
    return (name, *means, ratio(tokens) if tokens and tokens["seen"] else "not measured")


def _teacher(name: str, report: Report) -> str:
    pictures = "".join(_figure(name, *picture, report) for picture in _PICTURES)
    layers = table(_LAYER_HEADINGS, _layers(report))
    return f"""<section>
{heading(name)}
{table(("setting", "value"), _settings(report))}
{pictures}
<details><summary>By layer</summary>
{layers}
</details>
</section>"""


def _settings(report: Report) -> list[tuple[str, str]]:
    rows = report["rows"]
    return [
        ("direction", report["direction"]),
        ("layer map", report["layer_strategy"]),
        ("head adapter", _adapter(report)),
        ("token pairing", f"{report['tokens']}; first tokens of a text left out: {report['sink_tokens']}"),
        ("teacher", _geometry(report["teacher"])),
        ("student", _geometry(report["student"])),
        ("token pairs fitted on / held out", f"{rows['fit']:,} / {rows['held_out']:,}"),
    ]


def _adapter(report: Report) -> str:
    rank = report["ridge_rank"]
    return report["head_adapter"] if rank is None else f"{report['head_adapter']} of rank {rank}"


def _geometry(geometry: Mapping[str, int]) -> str:
    return f"{geometry['layers']} layers, {geometry['heads']} KV heads of {geometry['head_dim']}"


_LAYER_HEADINGS = (
    "student layer",
    "teacher layers",
    "keys",
    "control",
    "penalty",
    "deviation",
    "values",
    "control",
    "penalty",
    "deviation",
)


def _layers(report: Report) -> list[tuple[str, ...]]:
    return [
        (str(layer), _mapped(report, layer), *_measured(report, "k", layer), *_measured(report, "v", layer))
        for layer in range(report["student"]["layers"])
    ]


def _mapped(report: Report, layer: int) -> str:
    row: list[list[float]] = (report["layer_map"] or {}).get(str(layer), [])
    return ", ".join(f"{t:.0f}" if weight == 1 else f"{weight:.3f} of {t:.0f}" for t, weight in row) or "-"


def _measured(report: Report, tensor: str, layer: int) -> list[str]:
    names = (("explained_variance", ".3f"), ("explained_variance_shuffled", ".3f"), ("alpha", ".0e"), ("scale", ".3g"))
    return [_number(report[name][tensor], layer, form) for name, form in names]


def _number(values: Sequence[float | None], layer: int, form: str) -> str:
    value = values[layer] if layer < len(values) else None
    return "-" if value is None else format(value, form)


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3f}" if known else "not measured"


def _figure(name: str, title: str, caption: str, draw: _Draw, report: Report) -> str:
    looks = [Look(theme, widest) for widest in (WIDE, NARROW) for theme in (LIGHT, DARK)]
    drawn = [picture for look in looks if (picture := draw(report, look)) is not None]
    if not drawn:
        return ""
    light, dark, *narrow = drawn
    return figure(f"{name}: {title}", light, dark, caption, narrow=(narrow[0], narrow[1]))
