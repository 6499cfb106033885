"""Draws docs/pictures/*.svg, one per step of docs/alignment.md and docs/fusion.md.

Wherever a step computes something, the picture shows what its code gives. The same code and the same matplotlib give
the same files.

Examples:
  python -m scripts.draw_pictures
  python -m scripts.draw_pictures layers tokens
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from transformers import LlamaConfig

from align.head_dim_adapter import HeadDimAdapter, KVGeometry
from align.layer_map import LayerMapper
from align.layer_similarity import CKAStatistics
from align.linear_maps import RidgeStatistics, fit_ridge
from align.rope_scale import RoPEScaler
from align.time_align import TimeAligner
from align.tokenizer_align import overlap_rows, pair_ends
from kvcore.offsets import read_text
from kvcore.plan import Selection
from kvcore.select import select
from kvcore.selectors import REGISTRY
from kvcore.types import Tensor
from scripts.fusion_pictures import draw_auto_weight, draw_collapse, draw_fusing, draw_losses, draw_routing
from scripts.schematics import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    PALE,
    RED,
    draw_box,
    draw_codi,
    draw_direction,
    draw_router_loss,
    seeded,
)
from student_trainer.losses import error_by_layer_and_head, kv_distance
from tests.support.text_tokenizers import tokenizer_of

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "pictures"

# Inches at which a browser shows 640 pixels.
_WIDTH = 640 / 96
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.hashsalt": "kvdistill",
}


def _content_keys(figure: Figure) -> None:
    """One key at many positions, as a cache holds it and without its rotation."""
    scaler = RoPEScaler.from_config(LlamaConfig(hidden_size=32, num_attention_heads=1, num_key_value_heads=1))
    positions_BT = torch.arange(96)[None]
    content_BHTD = torch.randn(1, 1, 1, 32, generator=seeded(3)).expand(1, 1, 96, 32)
    cached_BHTD = scaler.rotate(content_BHTD, positions_BT)
    limits: dict[str, Any] = {"cmap": "RdBu", "vmin": -2.5, "vmax": 2.5, "aspect": "auto", "interpolation": "none"}
    left, right = figure.subplots(1, 2, sharey=True)
    left.imshow(cached_BHTD[0, 0].T, **limits)
    image = right.imshow(scaler.unrotate(cached_BHTD, positions_BT)[0, 0].T, **limits)
    left.set(title="one key, as the cache holds it", xlabel="position", ylabel="dim")
    right.set(title="un-rotated: its content", xlabel="position")
    figure.colorbar(image, ax=[left, right])


def _tokens(figure: Figure) -> None:
    """One text under two tokenizers, paired in both ways."""
    text = "hello world, x = 314"
    ends = {name: read_text(tokenizer_of(name), text, add_special_tokens=False)[1] for name in ("metaspace", "qwen2")}
    teacher, student = ends.values()
    paired = [[(t, 1.0)] if t >= 0 else [] for t in pair_ends(teacher, student)]
    for axes, (title, rows) in zip(
        figure.subplots(2, 1),
        {"boundary": paired, "overlap": overlap_rows(teacher, student)}.items(),
        strict=True,
    ):
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set(xlim=(-2.4, len(text) + 0.1), ylim=(-0.05, 2.35))
        axes.axis("off")
        _token_row(axes, 1.7, "teacher", text, teacher, [BLUE] * len(teacher))
        _token_row(axes, 0.0, "student", text, student, [GREEN if row else FAINT for row in rows])
        for s, row in enumerate(rows):
            for t, weight in row:
                at_end = title == "boundary"
                above, below = (_place(side, index, at_end) for side, index in ((teacher, t), (student, s)))
                axes.plot([above, below], [1.7, 0.6], color=INK, linewidth=0.4 + 1.6 * weight, zorder=3)
                if weight < 0.999:
                    x = below + 0.72 * (above - below)
                    axes.text(x, 1.39, f"{weight:.2f}".lstrip("0"), fontsize=6.5, ha="center", va="center", zorder=4,
                              bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4})  # fmt: skip


def _token_row(axes: Axes, y: float, label: str, text: str, ends: Sequence[int], colours: Sequence[str]) -> None:
    axes.text(-0.2, y + 0.3, label, ha="right", va="center")
    for start, end, colour in zip([0, *ends], ends, colours, strict=False):
        draw_box(axes, (start + 0.06, y), (end - start - 0.12, 0.6), text[start:end].replace(" ", "␣"), colour)


def _place(ends: Sequence[int], index: int, at_end: bool) -> float:
    return ends[index] - 0.06 if at_end else (ends[index] + (ends[index - 1] if index else 0)) / 2


def _time(figure: Figure) -> None:
    """Nine slots of two segments to six, under each method."""
    source_BM, target_BS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    for axes, method in zip(figure.subplots(1, 3), ("linear", "nearest", "segment"), strict=True):
        weights_BSM, _ = TimeAligner(method).weights(source_BM, target_BS)
        _heat(axes, weights_BSM[0], method)
        axes.axvline(2.5, color=RED, linewidth=1)
        axes.axhline(1.5, color=RED, linewidth=1)
        axes.set_xlabel("teacher slot")
    figure.axes[0].set_ylabel("student slot")
    figure.suptitle("prompt | reasoning", color=RED, fontsize=9)


def _layers(figure: Figure) -> None:
    """Maps from 12 layers to 5; `cka` on two models whose features drift with depth at different speeds."""
    for axes, strategy in zip(figure.subplots(2, 3).flat, _MAPPERS, strict=True):
        mapper = LayerMapper(12, 5, strategy)
        if not mapper.fitted:
            mapper.fit_cka(_drifting_cka(12, 5))
        _heat(axes, mapper.matrix(), "learned (its start)" if strategy == "learned" else strategy)
        axes.set_xticks(range(0, 12, 2))
    for axes in figure.axes[3:]:
        axes.set_xlabel("teacher layer")
    for axes in figure.axes[::3]:
        axes.set_ylabel("student layer")


_MAPPERS = ("ratio", "uniform", "last", "skip", "cka", "learned")


def _drifting_cka(teacher_layers: int, student_layers: int) -> Tensor:
    draw = seeded(0)
    walk_NLF = torch.randn(400, 64, 8, generator=draw).cumsum(dim=1)
    # The teacher does in its last half what the student does in three of its layers.
    teacher = [round(63 * (layer / (teacher_layers - 1)) ** 2.0) for layer in range(teacher_layers)]
    student = [round(63 * layer / (student_layers - 1)) for layer in range(student_layers)]
    sums = CKAStatistics(teacher_layers, student_layers, 8, 8)
    sums.update(walk_NLF[:, teacher], walk_NLF[:, student])
    return sums.cka_ST()


def _heads(figure: Figure) -> None:
    """The weights of three adapters from 4 heads of 4 to 2 heads of 6, fitted on the same rows."""
    source, target = KVGeometry(1, 4, 4), KVGeometry(1, 2, 6)
    fit, held_out = _related_rows(600, 16, 12, noise=0.3), _related_rows(150, 16, 12, noise=0.3, seed=9)
    for axes, kind in zip(figure.subplots(1, 3), ("pool", "procrustes", "ridge"), strict=True):
        adapter = HeadDimAdapter(1, source, target, kind)
        adapter.fit("k", [fit], [held_out])
        affine = adapter.layer_map("k", 0)
        assert affine is not None
        axes.imshow(affine[0], cmap="RdBu", vmin=-0.8, vmax=0.8, interpolation="none")
        axes.set_title(f"{kind}: {adapter.explained_variance('k')[0]:.2f} explained")
        axes.set_xlabel("to 2 heads of 6")
        axes.set_xticks([-0.5, 5.5, 11.5], ["0", "6", "12"])
        axes.set_yticks([-0.5, 3.5, 7.5, 11.5, 15.5], ["0", "4", "8", "12", "16"])
        axes.grid(color=GREY, linewidth=0.6)
    figure.axes[0].set_ylabel("from 4 heads of 4")


def _related_rows(count: int, inputs: int, outputs: int, noise: float, seed: int = 1) -> RidgeStatistics:
    mixing = torch.randn(inputs, outputs, generator=seeded(0)) / math.sqrt(inputs)
    draw = seeded(seed)
    x_NF = torch.randn(count, inputs, generator=draw)
    statistics = RidgeStatistics(inputs, outputs)
    statistics.update(x_NF, x_NF @ mixing + noise * torch.randn(count, outputs, generator=draw))
    return statistics


def _scale(figure: Figure) -> None:
    """What some guesses at keys with constant offsets score, in the objective and in the report."""
    draw = seeded(4)
    mean_D = 2.0 * torch.randn(16, generator=draw)
    x_BLHMD = mean_D + torch.randn(64, 1, 1, 8, 16, generator=draw)
    flat = x_BLHMD.flatten(0, 3)
    deviation_L, variance_L = flat.std()[None], flat.var(dim=0).mean()[None]
    guesses = {
        "nothing (0)": torch.zeros(16),
        "one mean for all": flat.mean().expand(16),
        "each feature's mean": flat.mean(dim=0),
    }
    mask_BM, left, right = torch.ones(64, 8, dtype=torch.bool), *figure.subplots(1, 2, width_ratios=[1.1, 1])
    left.boxplot(flat.numpy(), widths=0.6, showfliers=False, medianprops={"color": BLUE}, boxprops={"color": GREY})
    left.axhspan(float(-deviation_L), float(deviation_L), color=RED, alpha=0.12, linewidth=0, label="± deviation")
    left.set(
        title="a layer's keys, feature by feature",
        xlabel="feature",
        xticks=range(1, 17, 3),
        xticklabels=range(1, 17, 3),
    )
    for row, guess in enumerate(guesses.values()):
        wrong = guess.expand_as(x_BLHMD)
        scores = (
            float(error_by_layer_and_head(wrong, x_BLHMD, variance_L, mask_BM).mean()),
            float(kv_distance(wrong, x_BLHMD, deviation_L, mask_BM, "mse")),
        )
        for offset, score, colour in zip((-0.2, 0.2), scores, (BLUE, GREY), strict=True):
            right.barh(row + offset, score, 0.36, color=colour)
            right.text(score + 0.1, row + offset, f"{score:.2f}", va="center")
    right.set(yticks=range(3), yticklabels=list(guesses), xlim=(0, 7.5), title="what a guess scores")
    right.invert_yaxis()
    for colour, label in ((BLUE, "reported, over v"), (GREY, "objective (mse), over σ²")):
        right.barh(0, 0, color=colour, label=label)
    figure.legend(loc="outside lower center", ncols=3)


def _selection(figure: Figure) -> None:
    """What each selector keeps of 24 tokens, where some keys repeat and the answer looks at a few."""
    draw = seeded(5)
    k_BHTD = torch.randn(1, 1, 24, 16, generator=draw)
    filler_BHTD = k_BHTD[:, :, :1] + 0.2 * torch.randn(1, 1, 24, 16, generator=draw)
    fillers_T = torch.tensor([place % 3 != 1 for place in range(24)])
    k_BHTD = torch.where(fillers_T[:, None], filler_BHTD, k_BHTD)
    importance_BHT = torch.rand(1, 1, 24, generator=draw) ** 4 / 10
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 2.4])
    above.bar(range(24), importance_BHT[0, 0], color=[FAINT if filler else BLUE for filler in fillers_T])
    above.set(
        ylabel="importance",
        yticks=[],
        title="24 tokens of reasoning, a budget of 8 (grey: fillers with nearly the same key)",
    )
    for row, name in enumerate(REGISTRY):
        selection = Selection(selector=name, budget=0 if name == "full" else 8, scope="head")
        seeds_B, candidates_BN = torch.tensor([7]), torch.arange(24)[None]
        kept = select(selection, candidates_BN, k_BHTD, importance_BHT, seeds_B=seeds_B)[0, 0].tolist()
        for place in range(24):
            colour = PALE if place not in kept else GREY if fillers_T[place] else BLUE
            below.add_patch(Rectangle((place - 0.42, row - 0.38), 0.84, 0.76, color=colour))
    below.set(xlim=(-0.7, 23.7), ylim=(len(REGISTRY) - 0.4, -0.6), xlabel="token")
    below.set_yticks(range(len(REGISTRY)), list(REGISTRY))
    below.tick_params(length=0)
    below.spines[:].set_visible(False)


def _report(figure: Figure) -> None:
    """Ridge maps of five layers against the control, on rows whose start of text is alike in all samples."""
    draw, layers = seeded(8), 5
    common_MF = torch.randn(12, 32, generator=draw)
    mixing = torch.randn(32, 16, generator=draw) / 6
    true, control = [], []
    for layer in range(layers):
        x_SMF = common_MF * 0.9 + torch.randn(120, 12, 32, generator=draw)
        y_SMG = x_SMF @ mixing + 0.25 * (layer + 1) * torch.randn(120, 12, 16, generator=draw)
        for found, y in ((true, y_SMG), (control, y_SMG.roll(1, dims=0))):
            fit, held_out = RidgeStatistics(32, 16), RidgeStatistics(32, 16)
            fit.update(x_SMF[:96].flatten(0, 1), y[:96].flatten(0, 1))
            held_out.update(x_SMF[96:].flatten(0, 1), y[96:].flatten(0, 1))
            found.append(fit_ridge(fit, held_out).explained_variance)
    axes = figure.subplots()
    axes.bar([layer - 0.2 for layer in range(layers)], true, 0.38, color=BLUE, label="paired tokens")
    axes.bar([layer + 0.2 for layer in range(layers)], control, 0.38, color=RED, label="another sample's (control)")
    axes.axhline(0.2, color=INK, linestyle="--", linewidth=1, label="warned below 0.2")
    axes.set(xlabel="student layer", ylabel="explained variance", ylim=(0, 1), xticks=range(layers))
    axes.legend()


PICTURES: dict[str, tuple[Callable[[Figure], None], float]] = {
    "content_keys": (_content_keys, 2.5),
    "tokens": (_tokens, 3.6),
    "time": (_time, 2.3),
    "layers": (_layers, 3.6),
    "heads": (_heads, 3.2),
    "direction": (draw_direction, 2.6),
    "scale": (_scale, 2.6),
    "report": (_report, 2.5),
    "selection": (_selection, 3.4),
    "fusing": (draw_fusing, 2.6),
    "routing": (draw_routing, 2.2),
    "router_loss": (draw_router_loss, 3.3),
    "losses": (draw_losses, 2.6),
    "auto_weight": (draw_auto_weight, 2.5),
    "codi": (draw_codi, 2.2),
    "collapse": (draw_collapse, 2.4),
}


def _heat(axes: Axes, weights: Tensor, title: str) -> None:
    axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="none")
    for row, values in enumerate(weights.tolist()):
        for column, value in enumerate(values):
            if value > 0.02:
                shown = "1" if value > 0.995 else f"{value:.2f}".lstrip("0")
                axes.text(column, row, shown, ha="center", va="center", fontsize=7, color="w" if value > 0.6 else INK)
    axes.set_title(title)
    axes.set_yticks(range(len(weights)))


def draw(name: str, path: Path) -> None:
    """One picture as SVG, or as whatever the path's suffix says."""
    paint, height = PICTURES[name]
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        paint(figure)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help=f"only some of: {', '.join(PICTURES)}")
    names = parser.parse_args(arguments).name
    unknown = [name for name in names if name not in PICTURES]
    if unknown:
        parser.error(f"no picture named {', '.join(unknown)}; there are: {', '.join(PICTURES)}")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for name in names or PICTURES:
        draw(name, OUTPUT / f"{name}.svg")


if __name__ == "__main__":
    main()
