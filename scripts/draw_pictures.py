"""Draws the pictures of the alignment documentation; scripts/docs_site.py adds them to the site.

Each picture is computed by the code that it explains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from align.layer_map import LayerMapper
from align.layer_similarity import CKAStatistics
from align.time_align import TimeAligner
from align.tokenizer_align import overlap_weights_batch, pair_ends_batch
from kvcore.plan import SELECTORS, Selection
from kvcore.tensors.select import select
from kvcore.types import Tensor
from student_trainer.monitoring.chart_style import LIGHT, draw

INK, FAINT, PALE = LIGHT.ink, LIGHT.faint, "#eef2f6"
BLUE, RED, GREEN, _, _, GREY, *_ = LIGHT.series
# A browser shows 96 pixels per inch.
WIDTH_INCHES = 640 / 96


def pictures() -> dict[str, bytes]:
    """All pictures as SVG, by their path below docs/."""
    return {path: _drawn(paint, height) for path, (paint, height) in PICTURES.items()}


def _drawn(paint: Callable[[Figure], None], height: float) -> bytes:
    return draw(lambda figure, _: paint(figure), LIGHT, (WIDTH_INCHES, height), "svg")


def _tokens(figure: Figure) -> None:
    """One text with two tokenizers, whose tokens are paired by both methods."""
    teacher_tokens = ["hello", " world", ",", " x", " =", " 31", "4"]
    student_tokens = ["hel", "lo", " wor", "ld", ",", " x =", " ", "3", "14"]
    teacher, student = (list(accumulate(map(len, tokens))) for tokens in (teacher_tokens, student_tokens))
    ends = torch.tensor([teacher]), torch.tensor([student])
    paired = [[(t, 1.0)] if t >= 0 else [] for t in pair_ends_batch(*ends)[0].tolist()]
    shared = [[(t, w) for t, w in enumerate(row) if w > 0] for row in overlap_weights_batch(*ends)[0][0].tolist()]
    methods = {"boundary": paired, "overlap": shared}
    for axes, (title, rows) in zip(figure.subplots(2, 1), methods.items(), strict=True):
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set(xlim=(-2.4, teacher[-1] + 0.1), ylim=(-0.05, 2.35))
        axes.axis("off")
        _token_row(axes, 1.7, "teacher", teacher_tokens, [BLUE] * len(teacher))
        _token_row(axes, 0.0, "student", student_tokens, [GREEN if row else FAINT for row in rows])
        for s, row in enumerate(rows):
            for t, weight in row:
                end = title == "boundary"
                axes.plot(
                    [_place(teacher, t, end), _place(student, s, end)],
                    [1.7, 0.6],
                    color=INK,
                    linewidth=2 * weight,
                )


def _token_row(axes: Axes, y: float, label: str, tokens: Sequence[str], colours: Sequence[str]) -> None:
    axes.text(-0.2, y + 0.3, label, ha="right", va="center")
    start = 0
    for token, colour in zip(tokens, colours, strict=True):
        rounded = "round,pad=0,rounding_size=0.12"
        axes.add_patch(FancyBboxPatch((start + 0.06, y), len(token) - 0.12, 0.6, boxstyle=rounded, color=colour))
        shown = token.replace(" ", "␣")
        ink = INK if colour == FAINT else "w"
        axes.text(start + len(token) / 2, y + 0.3, shown, ha="center", va="center", color=ink)
        start += len(token)


def _place(ends: Sequence[int], index: int, at_end: bool) -> float:
    return ends[index] - 0.06 if at_end else (ends[index] + (ends[index - 1] if index else 0)) / 2


def _time(figure: Figure) -> None:
    """Nine slots of two segments, resampled to six."""
    source_BM, target_BS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    axes = figure.subplots()
    weights_BSM, _ = TimeAligner().weights(source_BM, target_BS)
    _heat(axes, weights_BSM[0], "")
    axes.axvline(2.5, color=RED, linewidth=1)
    axes.axhline(1.5, color=RED, linewidth=1)
    axes.set(xlabel="teacher slot", ylabel="student slot")
    figure.suptitle("prompt | reasoning", color=RED, fontsize=9)


def _layers(figure: Figure) -> None:
    """Maps from 12 layers to 5."""
    strategies = ("ratio", "uniform", "last", "skip", "cka", "learned")
    for axes, strategy in zip(figure.subplots(2, 3).flat, strategies, strict=True):
        mapper = LayerMapper(12, 5, strategy)
        if strategy == "cka":
            mapper.fit_cka(_drifting_cka(12, 5))
        _heat(axes, mapper.matrix(), "learned (its start)" if strategy == "learned" else strategy)
        axes.set_xticks(range(0, 12, 2))
    for axes in figure.axes[3:]:
        axes.set_xlabel("teacher layer")
    for axes in figure.axes[::3]:
        axes.set_ylabel("student layer")


def _drifting_cka(teacher_layers: int, student_layers: int) -> Tensor:
    """The CKA of two models whose features drift with depth; the teacher's mostly in its second half."""
    walk_NLF = torch.randn(400, 64, 8, generator=_seeded(0)).cumsum(dim=1)
    teacher = [round(63 * (layer / (teacher_layers - 1)) ** 2.0) for layer in range(teacher_layers)]
    student = [round(63 * layer / (student_layers - 1)) for layer in range(student_layers)]
    sums = CKAStatistics(teacher_layers, student_layers, 8, 8)
    sums.update(walk_NLF[:, teacher], walk_NLF[:, student])
    return sums.cka_ST()


def _heat(axes: Axes, weights: Tensor, title: str) -> None:
    axes.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="none")
    for row, values in enumerate(weights.tolist()):
        for column, value in enumerate(values):
            if value > 0.02:
                shown = "1" if value > 0.995 else f"{value:.2f}".lstrip("0")
                axes.text(column, row, shown, ha="center", va="center", fontsize=7, color="w" if value > 0.6 else INK)
    axes.set_title(title)
    axes.set_yticks(range(len(weights)))


def _selection(figure: Figure) -> None:
    """The tokens that each selector keeps of 24, if many keys are similar and the answer attends to a few tokens."""
    random = _seeded(5)
    k_BHTD = torch.randn(1, 1, 24, 16, generator=random)
    filler_BHTD = k_BHTD[:, :, :1] + 0.2 * torch.randn(1, 1, 24, 16, generator=random)
    fillers_T = torch.arange(24) % 3 != 1
    k_BHTD = torch.where(fillers_T[:, None], filler_BHTD, k_BHTD)
    importance_BHT = torch.rand(1, 1, 24, generator=random) ** 4 / 10
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 2.4])
    above.bar(range(24), importance_BHT[0, 0].tolist(), color=[FAINT if filler else BLUE for filler in fillers_T])
    title = "a budget of 8 of 24 tokens (grey: fillers with similar keys)"
    above.set(ylabel="importance", yticks=[], title=title)
    for row, name in enumerate(SELECTORS.builtin):
        # A low weight of importance, so that the redundancy of the fillers matters.
        selection = Selection(selector=name, budget=0 if name == "full" else 8, scope="head", importance_weight=0.1)
        kept_BHM = select(selection, torch.arange(24)[None], k_BHTD, importance_BHT, seeds_B=torch.tensor([7]))
        kept = kept_BHM[0, 0].tolist()
        for place in range(24):
            colour = PALE if place not in kept else GREY if fillers_T[place] else BLUE
            below.add_patch(Rectangle((place - 0.42, row - 0.38), 0.84, 0.76, color=colour))
    below.set(xlim=(-0.7, 23.7), ylim=(len(SELECTORS.builtin) - 0.4, -0.6), xlabel="token")
    below.set_yticks(range(len(SELECTORS.builtin)), list(SELECTORS.builtin))
    below.tick_params(length=0)
    below.spines[:].set_visible(False)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# By path below docs/, with the height in inches.
PICTURES: dict[str, tuple[Callable[[Figure], None], float]] = {
    "pictures/selection.svg": (_selection, 3.4),
    "pictures/tokens.svg": (_tokens, 3.6),
    "pictures/time.svg": (_time, 2.3),
    "pictures/layers.svg": (_layers, 3.6),
}
