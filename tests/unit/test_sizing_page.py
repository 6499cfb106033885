"""Tests that the figures in docs/sizing.md match the code and the formulas on the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from align.layer_map import LayerMapper
from kvcore.plan import CodecSpec
from kvcore.tensors.codec import layer_bytes
from kvdistill.describe import raw_token_bytes

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "sizing.md").read_text(encoding="utf-8")
STUDENT_LAYERS = 28
BUDGET, POSITION_BYTES, TEXT_TOKENS, BATCH, SAMPLES = 24, 4, 300, 64, 15_000


def table(heading: str) -> dict[str, list[str]]:
    """Rows of the table whose header starts with `heading`, keyed by their first cell."""
    (found,) = re.findall(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines()]
    return {row[0]: row[1:] for row in rows}


MODELS = {
    name: tuple(map(int, row[0].split(" x "))) for name, row in table("model | layers x KV heads x head dim").items()
}
STUDENTS = table("student | P")


@pytest.mark.parametrize("model", MODELS)
def test_cache_per_token_follows_from_the_geometry(model: str) -> None:
    layers, heads, dim = MODELS[model]
    row = table("model | layers x KV heads x head dim")[model]
    assert row[-1] == f"{raw_token_bytes(layers, heads, dim):,} bytes"
    weights, eight_bit, four_bit = (float(cell.removesuffix(" GB")) for cell in row[1:4])
    assert eight_bit == pytest.approx(weights / 2, abs=0.06)
    assert four_bit == pytest.approx(weights / 4, abs=0.06)


@pytest.mark.parametrize("model", MODELS)
def test_network_figures_follow_from_layers_and_codec(model: str) -> None:
    layers, heads, dim = MODELS[model]
    sent = len(LayerMapper(layers, STUDENT_LAYERS).layers_needed)
    sample = sent * layer_bytes(CodecSpec(), heads, BUDGET, dim) + BUDGET * POSITION_BYTES
    cache = raw_token_bytes(layers, heads, dim) * TEXT_TOKENS
    _, shown_layers, shown_sample, *rest = table("teacher | student | layers sent")[model]
    assert shown_layers == f"{sent} of {layers}"
    assert float(shown_sample.removesuffix(" MB")) == pytest.approx(sample / 1e6, abs=0.05)
    assert rest == [
        f"{cache / 1e6:.1f} MB",
        f"{cache / sample:.1f} x",
        f"{sample * SAMPLES / 1e9:.1f} GB",
        f"{sample * BATCH * 8 / 1e9:.3f} Gbit/s",
    ]


@pytest.mark.parametrize("student", STUDENTS)
def test_memory_per_rank_follows_the_zero_formulas(student: str) -> None:
    count, *shown = STUDENTS[student]
    billions = float(count.partition(" ")[0])
    stages = [16 * billions]
    for whole, sharded in ((4, 12), (2, 14), (0, 16)):
        stages += [(whole + sharded / ranks) * billions for ranks in (2, 8)]
    figures = [float(figure) for cell in shown for figure in cell.split(" / ")]
    assert figures == pytest.approx(stages, rel=0.01, abs=0.06)
