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


# Layers, hidden size, intermediate size, query heads, KV heads, head dim, 10⁹ parameters.
SHAPES = {
    "Qwen2.5-0.5B": (24, 896, 4864, 14, 2, 64, 0.494),
    "Qwen2.5-1.5B": (28, 1536, 8960, 12, 2, 128, 1.544),
    "Llama-3.2-3B": (28, 3072, 8192, 24, 8, 128, 3.213),
    "Qwen2.5-7B": (28, 3584, 18944, 28, 4, 128, 7.616),
}
GPUS = (8, 12, 16, 24, 40, 48, 80, 141)


@pytest.mark.parametrize("student", SHAPES)
def test_gpu_of_each_student_follows_from_the_listed_parts(student: str) -> None:
    layers, hidden, inner, heads, kv_heads, dim, parameters = SHAPES[student]
    q, kv, tokens = heads * dim, kv_heads * dim, 8 * 512
    adapters = 128 * layers * (2 * (hidden + q) + 2 * (hidden + kv) + 3 * (hidden + inner)) / 1e9
    activations = 2 * tokens * hidden * layers + 2 * 2 * tokens * (4 * hidden + q + 2 * kv + 3 * inner)
    rest = activations / 1e9 + 3 * 4 * 2**25 / 1e9 + 1
    states = (2 * parameters + 16 * adapters, 16 * parameters, (2 + 14 / 8) * parameters + 1.07)
    for cell, expected in zip(table("student | LoRA, one GPU")[student], states, strict=True):
        memory, gpu = cell.removesuffix(" GB").split(": ")
        assert float(memory) == pytest.approx(expected + rest, abs=0.06)
        assert int(gpu) == min(size for size in GPUS if size >= 1.1 * float(memory))


@pytest.mark.parametrize("student", STUDENTS)
def test_memory_per_rank_follows_the_zero_formulas(student: str) -> None:
    count, *shown = STUDENTS[student]
    billions = float(count.partition(" ")[0])
    stages = [16 * billions]
    for whole, sharded in ((4, 12), (2, 14), (0, 16)):
        stages += [(whole + sharded / ranks) * billions for ranks in (2, 8)]
    figures = [float(figure) for cell in shown for figure in cell.split(" / ")]
    assert figures == pytest.approx(stages, rel=0.01, abs=0.06)
