"""Tests of TimeAligner: resampling slots within segments, compared with plain loops over fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.time_align import TimeAligner

Segments = list[int]

segments = st.lists(st.integers(-1, 2), max_size=9)
batches = st.lists(st.tuples(segments, segments), min_size=1, max_size=3)


def naive_share(j: int, targets: int, sources: int) -> dict[int, Fraction]:
    """Weights of target slot j of `targets` over the source slots 0 … `sources` - 1 of its segment."""
    position = Fraction(1) if targets == 1 else Fraction(j, targets - 1)
    places = [Fraction(i, sources - 1) if sources > 1 else position for i in range(sources)]
    for i in range(sources):
        if places[i] == position:
            return {i: Fraction(1)}
    right = next(i for i in range(sources) if places[i] > position)
    share = (position - places[right - 1]) / (places[right] - places[right - 1])
    return {right - 1: 1 - share, right: share}


def naive_row(source: Segments, target: Segments, s: int) -> list[float]:
    row = [0.0] * len(source)
    of_source = [m for m, segment in enumerate(source) if segment == target[s]]
    if target[s] < 0 or not of_source:
        return row
    of_target = [other for other, segment in enumerate(target) if segment == target[s]]
    shares = naive_share(of_target.index(s), len(of_target), len(of_source))
    for rank, share in shares.items():
        row[of_source[rank]] = float(share)
    return row


def padded(rows: list[Segments]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int64).view(len(rows), width)


@settings(deadline=None)
@given(batches)
def test_weights_match_plain_loops(batch: list[tuple[Segments, Segments]]) -> None:
    source_BM, target_BS = padded([source for source, _ in batch]), padded([target for _, target in batch])
    weights_BSM, mask_BS = TimeAligner().weights(source_BM, target_BS)
    assert weights_BSM.dtype == torch.float32
    assert mask_BS.dtype == torch.bool
    for b in range(len(batch)):
        source, target = source_BM[b].tolist(), target_BS[b].tolist()
        for s in range(len(target)):
            expected = naive_row(source, target, s)
            assert weights_BSM[b, s].tolist() == pytest.approx(expected, abs=1e-7)
            assert bool(mask_BS[b, s]) == (sum(expected) > 0)


@given(segments)
def test_equal_segments_give_exactly_the_identity(slots: Segments) -> None:
    slots_BM = padded([slots])
    weights_BSM, mask_BS = TimeAligner().weights(slots_BM, slots_BM)
    assert torch.equal(mask_BS, slots_BM >= 0)
    assert torch.equal(weights_BSM[0], torch.diag(mask_BS[0].float()))


@given(st.permutations([0, 0, 0, 1, 1, 2, -1]))
def test_segments_of_equal_size_pair_in_order_wherever_their_slots_are(source: Segments) -> None:
    target = sorted(source)
    weights_BSM, _ = TimeAligner().weights(padded([source]), padded([target]))
    by_segment = sorted((segment, m) for m, segment in enumerate(source))
    for s, (segment, m) in enumerate(by_segment):
        assert weights_BSM[0, s].tolist() == [float(other == m and segment >= 0) for other in range(len(source))]


@pytest.mark.parametrize(
    ("sources", "targets", "expected"),
    [
        (3, 2, [[1, 0, 0], [0, 0, 1]]),
        (2, 3, [[1, 0], [0.5, 0.5], [0, 1]]),
        (4, 3, [[1, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 1]]),
        (3, 1, [[0, 0, 1]]),
        (1, 3, [[1], [1], [1]]),
    ],
)
def test_weights_of_examples(sources: int, targets: int, expected: list[list[float]]) -> None:
    weights_BSM, mask_BS = TimeAligner().weights(padded([[1] * sources]), padded([[1] * targets]))
    assert mask_BS.all()
    torch.testing.assert_close(weights_BSM[0], torch.tensor(expected, dtype=torch.float32))


@given(segments, segments)
def test_segments_are_never_mixed(source: Segments, target: Segments) -> None:
    """Each source slot contains its segment id, so every target slot must get its own segment id."""
    x_BLHMD = torch.tensor(source, dtype=torch.float32).view(1, 1, 1, len(source), 1)
    resampled_BLHSD, mask_BS = TimeAligner().resample(x_BLHMD, padded([source]), padded([target]))
    for s, segment in enumerate(target):
        expected = float(segment) if mask_BS[0, s] else 0.0
        assert resampled_BLHSD[0, 0, 0, s, 0].item() == pytest.approx(expected, abs=1e-6)


def test_slots_without_a_source_are_masked_and_zero() -> None:
    source_BM = torch.tensor([[0, 0, -1], [-1, -1, -1]])
    target_BS = torch.tensor([[0, 1, -1, 2], [0, 1, 2, -1]])
    resampled_BLHSD, mask_BS = TimeAligner().resample(torch.ones(2, 1, 1, 3, 2), source_BM, target_BS)
    assert mask_BS.tolist() == [[True, False, False, False], [False] * 4]
    assert torch.equal(resampled_BLHSD[:, 0, 0, :, 0], mask_BS.float())


@pytest.mark.parametrize(("sources", "targets"), [(0, 3), (3, 0), (0, 0)])
def test_zero_slots_are_accepted(sources: int, targets: int) -> None:
    source_BM, target_BS = torch.zeros(2, sources, dtype=torch.int32), torch.zeros(2, targets, dtype=torch.int32)
    x_BLHSD, mask_BS = TimeAligner().resample(torch.ones(2, 3, 2, sources, 4), source_BM, target_BS)
    assert x_BLHSD.shape == (2, 3, 2, targets, 4)
    assert not x_BLHSD.any()
    assert not mask_BS.any()


def test_resampling_uses_the_same_weights_for_every_layer_head_and_dim() -> None:
    x_BLHMD = torch.randn(2, 3, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    source_BM = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, -1]])
    target_BS = torch.tensor([[0, 1, 1, -1], [1, 1, 1, 1]])
    resampled_BLHSD, _ = TimeAligner().resample(x_BLHMD, source_BM, target_BS)
    for b in range(2):
        for s in range(4):
            row = naive_row(source_BM[b].tolist(), target_BS[b].tolist(), s)
            expected = sum((row[m] * x_BLHMD[b, :, :, m].double() for m in range(5)), start=torch.zeros(3, 2, 4))
            torch.testing.assert_close(resampled_BLHSD[b, :, :, s].double(), expected.double(), rtol=0, atol=1e-6)


def test_content_of_empty_slots_is_ignored() -> None:
    source_BM, target_BS = torch.tensor([[0, -1, 0, 0, 2]]), torch.tensor([[0, 0, -1, 1]])
    content = [1.0, math.nan, 2.0, 4.0, math.inf]
    x_BLHMD = torch.tensor(content).view(1, 1, 1, 5, 1).requires_grad_()
    resampled_BLHSD, _ = TimeAligner().resample(x_BLHMD, source_BM, target_BS)
    assert resampled_BLHSD.isfinite().all()
    resampled_BLHSD.square().sum().backward()
    assert x_BLHMD.grad is not None
    assert x_BLHMD.grad.isfinite().all()
    assert x_BLHMD.grad.flatten()[[1, 4]].tolist() == [0.0, 0.0]
    assert x_BLHMD.grad.flatten()[3] > 0


def test_half_precision_kv_are_resampled_in_fp32() -> None:
    x_BLHMD = torch.tensor([256.0, 257.0, 255.0]).bfloat16().view(1, 1, 1, 3, 1)
    slots_BM = torch.tensor([[1, 1, 1]])
    resampled_BLHSD, _ = TimeAligner().resample(x_BLHMD, slots_BM, slots_BM)
    assert resampled_BLHSD.dtype == torch.float32
    assert torch.equal(resampled_BLHSD, x_BLHMD.float())
