"""The pictures of docs/fusion.md that its code computes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import nn

from fuse.fuse_kv import fuse
from fuse.routing import CollapseDetector, entropy, temperature, to_weights
from kvcore.types import Tensor
from scripts.schematics import BLUE, GREEN, GREY, INK, RED, seeded
from student_trainer.kv_weight import auto_kv_weight
from student_trainer.losses import kv_distance

_TEACHERS = (BLUE, GREEN, RED)


def draw_fusing(figure: Figure) -> None:
    """Shares of three teachers of weight 0.5, 0.3, 0.2, where some slots are not filled by all."""
    mask_NBM = torch.ones(3, 1, 8, dtype=torch.bool)
    mask_NBM[1, 0, 3:5] = mask_NBM[0, 0, 4:6] = mask_NBM[:, 0, 7] = False
    # Each teacher's K/V point along an axis of their own, so that what comes out are the shares.
    x_NBLHMD = torch.eye(3)[:, None, None, None, None].expand(3, 1, 1, 1, 8, 3)
    fused_BLHMD, mask_BM = fuse(x_NBLHMD, mask_NBM, torch.tensor([0.5, 0.3, 0.2]))
    axes, below = figure.subplots(), torch.zeros(8)
    for teacher, name in enumerate("abc"):
        share_M = fused_BLHMD[0, 0, 0, :, teacher]
        axes.bar(range(8), share_M, 0.8, bottom=below, color=_TEACHERS[teacher], label=f"teacher {name}")
        for slot, share in enumerate(share_M.tolist()):
            if share > 0:
                axes.text(slot, float(below[slot]) + share / 2, f"{share:.2f}", ha="center", va="center", color="w")
        below = below + share_M
    for slot in (~mask_BM[0]).nonzero().flatten().tolist():
        axes.text(slot, 0.5, "masked", ha="center", va="center", rotation=90, color=GREY)
    axes.set(xlabel="slot", ylabel="share of the target", ylim=(0, 1), xlim=(-0.6, 7.6))
    figure.legend(loc="outside upper center", ncols=3)


def draw_routing(figure: Figure) -> None:
    """The temperature's schedule, and what it makes of the same logits."""
    epochs = range(8)
    schedule = [temperature(epoch, 1.0, 0.1, 0.5) for epoch in epochs]
    logits, present_BN = torch.tensor([[1.2, 0.6, 0.0]]), torch.ones(1, 3, dtype=torch.bool)
    weights = [to_weights(logits, present_BN, value) for value in schedule]
    left, middle, right = figure.subplots(1, 3)
    left.plot(epochs, schedule, "o-", color=INK, markersize=3)
    left.set(title="temperature", ylim=(0, 1.08))
    below = torch.zeros(len(weights))
    for teacher, name in enumerate("abc"):
        shares = torch.stack([weight[0, teacher] for weight in weights])
        middle.bar(epochs, shares, 0.85, bottom=below, color=_TEACHERS[teacher])
        middle.text(0, float(below[0] + shares[0] / 2), name, ha="center", va="center", color="w")
        below = below + shares
    middle.set(title="weights of logits 1.2, 0.6, 0", ylim=(0, 1))
    right.plot(epochs, [float(entropy(weight, present_BN)) for weight in weights], "o-", color=INK, markersize=3)
    right.axhline(math.log(3), color=GREY, linestyle="--", linewidth=1)
    right.text(7, math.log(3) - 0.03, "equal weights", ha="right", va="top", color=GREY)
    right.set(title="entropy, nats", ylim=(0, 1.2))
    for axes in figure.axes:
        axes.set(xlabel="epoch", xticks=range(0, 8, 2))


def draw_losses(figure: Figure) -> None:
    """The kinds of KV loss as a student departs from its target in three ways."""
    draw = seeded(2)
    target, noise = (torch.randn(1, 1, 1, 256, 16, generator=draw) for _ in range(2))
    other = torch.linalg.qr(torch.randn(16, 16, generator=draw)).Q
    ways: dict[str, Callable[[float], Tensor]] = {
        "noise added": lambda x: target + x * noise,
        "scaled": lambda x: target * (1 + x),
        "mixed with a rotation": lambda x: (1 - x / 2) * target + x / 2 * (target @ other),
    }
    grid = [step / 20 for step in range(41)]
    for axes, (title, student) in zip(figure.subplots(1, 3, sharey=True), ways.items(), strict=True):
        for kind, colour in (("mse", BLUE), ("smooth_l1", GREEN), ("cosine", RED), ("cka", INK)):
            values = [
                float(kv_distance(student(x), target, torch.ones(1), torch.ones(1, 256, dtype=torch.bool), kind))
                for x in grid
            ]
            axes.plot(grid, values, color=colour, label=kind)
        axes.set(title=title, ylim=(-0.03, 1.6), xlim=(0, 2))
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


class _TwoPulls(nn.Module):
    """Two losses on one plane."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(2))

    def forward(self, pulls: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Losses whose gradients at any place are the pulls turned round."""
        return {name: -(self.place * pull).sum() for name, pull in zip(("ce_loss", "kv_objective"), pulls, strict=True)}


def draw_auto_weight(figure: Figure) -> None:
    """The KV gradient at weight 1, and at the weight that `auto` finds."""
    cross_entropy, kv = torch.tensor([1.0, 0.15]), torch.tensor([0.06, 0.16])
    weight = auto_kv_weight(_TwoPulls(), [(cross_entropy, kv)], 1.0, lambda _sums: None)
    for axes, factor in zip(figure.subplots(1, 2), (1.0, weight), strict=True):
        for pull, colour, name in ((cross_entropy, INK, "cross-entropy"), (factor * kv, BLUE, "weight · KV loss")):
            end = (float(pull[0]), float(pull[1]))
            axes.annotate("", end, (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 2})
            below = colour == INK
            axes.text(end[0] + 0.03, end[1] + (-0.16 if below else 0.05), name, color=colour,
                      ha="right" if below else "left", va="top" if below else "bottom")  # fmt: skip
        both = cross_entropy + factor * kv
        axes.annotate("", both.tolist(), (0, 0), arrowprops={"arrowstyle": "-|>", "color": RED, "linestyle": "--"})
        axes.text(float(both[0]), float(both[1]) + 0.04, "step", color=RED, ha="right")
        axes.set(title=f"weight {factor:.3g}", xlim=(-0.05, 1.7), ylim=(-0.14, 1.3), xticks=[], yticks=[])


def draw_collapse(figure: Figure) -> None:
    """A teacher's mean weight over a run, and when the detector speaks."""
    detector, axes = CollapseDetector(("a", "b"), 0.95), figure.subplots()
    mean = [0.5 + 0.49 / (1 + math.exp(-(x - 14) / 3)) - 0.3 * math.exp(-(((x - 36) / 5) ** 2)) for x in range(60)]
    said = [x for x, weight in enumerate(mean) if detector.check([weight, 1 - weight])]
    axes.plot(mean, color=BLUE, label="mean weight of teacher a")
    axes.axhline(0.95, color=INK, linestyle="--", linewidth=1, label="fuse.collapse_at")
    axes.plot(said, [mean[x] for x in said], "o", color=RED, label="warning")
    axes.set(xlabel="logged step", ylim=(0.45, 1.03), xlim=(0, 59))
    axes.legend(loc="lower center")
