"""Tests of mapping teacher slots to student tokens and student tokens to teacher slots, compared with plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.token_layout import at_student_tokens, at_teacher_slots, beyond_first, gather_slots, slots_of_tokens
from kvcore.types import TENSORS, BatchKV, TensorKind
from tests.support.alignment_parts import TEACHER, TOKEN_ENDS, teacher_batch

TEXT_BYTES = 12
Ends = list[list[int]]


@st.composite
def token_ends(draw: st.DrawFn, samples: int, whole: bool = False) -> Ends:
    """Ascending byte ends per sample, some of them -1. With `whole`, the last one is the end of the text."""
    ends: Ends = []
    for _ in range(samples):
        known = sorted(draw(st.lists(st.integers(1, TEXT_BYTES), min_size=1, max_size=5)))
        known = [*known, TEXT_BYTES] if whole else known
        for place in draw(st.lists(st.integers(0, len(known)), max_size=2)):
            known.insert(place, -1)
        ends.append(known)
    return ends


def padded(ends: Ends) -> torch.Tensor:
    width = max(map(len, ends)) + 1
    return torch.tensor([row + [-1] * (width - len(row)) for row in ends])


def cache(ends: Ends, seed: int, layers: int = 2, heads: int = 2) -> BatchKV:
    """Random K/V in fp64. Empty slots have NaN and byte ends that would pair if they were read."""
    ends_BM = padded(ends)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(ends), layers, heads, ends_BM.shape[1], 3)
    k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.zeros(ends_BM.shape, dtype=torch.bool)
    for b, row in enumerate(ends):
        mask[b, : len(row)] = True
    spoil = ~mask[:, None, None, :, None]
    ends_BLHM = ends_BM.masked_fill(~mask, TEXT_BYTES)[:, None, None]
    return BatchKV(k.masked_fill(spoil, math.nan), v.masked_fill(spoil, math.nan), mask, ends_BLHM)


def naive_skipped(ends: list[int], count: int) -> set[int]:
    return set([place for place, end in enumerate(ends) if end >= 0][:count])


def naive_bytes(ends: list[int]) -> list[set[int]]:
    """The bytes that each token covers."""
    read, found = 0, []
    for end in ends:
        found.append(set(range(read, end)) if end >= 0 else set())
        read = max(read, end)
    return found


CASES: dict[str, Any] = {"skip": st.integers(0, 3), "seed": st.integers(0, 9), "data": st.data()}


@settings(max_examples=50)
@given(**CASES)
def test_boundary_takes_the_last_slot_with_the_tokens_end(skip: int, seed: int, data: st.DataObject) -> None:
    theirs, own = data.draw(token_ends(3)), data.draw(token_ends(3))
    kv, ends_BT = cache(theirs, seed), padded(own)
    out = at_student_tokens(kv, ends_BT, "boundary", skip)
    assert torch.equal(out.byte_ends_BLHM, ends_BT[:, None, None])
    for b, row in enumerate(own):
        skipped = naive_skipped(row, skip)
        for t in range(ends_BT.shape[1]):
            slots = [m for m, end in enumerate(theirs[b]) if t < len(row) and end == row[t] >= 0 and t not in skipped]
            assert bool(out.mask_BM[b, t]) == bool(slots)
            for x, given_x in ((out.k_BLHMD, kv.k_BLHMD), (out.v_BLHMD, kv.v_BLHMD)):
                assert x is not None
                assert given_x is not None
                expected = given_x[b, :, :, slots[-1]] if slots else torch.zeros(2, 2, 3)
                assert torch.equal(x[b, :, :, t], expected.to(x.dtype))


@settings(max_examples=50)
@given(**CASES)
def test_overlap_averages_the_slots_that_share_bytes_with_a_token(skip: int, seed: int, data: st.DataObject) -> None:
    theirs, own = data.draw(token_ends(2, whole=True)), data.draw(token_ends(2, whole=True))
    kv, ends_BT = cache(theirs, seed), padded(own)
    out = at_student_tokens(kv, ends_BT, "overlap", skip)
    for b, row in enumerate(own):
        skipped = naive_skipped(row, skip)
        their_bytes, own_bytes = naive_bytes(theirs[b]), naive_bytes(row)
        for t in range(ends_BT.shape[1]):
            mine = own_bytes[t] if t < len(row) and t not in skipped else set()
            assert bool(out.mask_BM[b, t]) == bool(mine)
            for x, given_x in ((out.k_BLHMD, kv.k_BLHMD), (out.v_BLHMD, kv.v_BLHMD)):
                assert x is not None
                assert given_x is not None
                expected = torch.zeros(2, 2, 3, dtype=torch.float64)
                for m, shared in enumerate(their_bytes):
                    if mine & shared:
                        expected += given_x[b, :, :, m] * len(mine & shared) / len(mine)
                torch.testing.assert_close(x[b, :, :, t].double(), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=50)
@given(by_layer=st.booleans(), by_head=st.booleans(), **CASES)
def test_each_teacher_slot_gets_the_student_token_with_the_same_end(
    by_layer: bool, by_head: bool, skip: int, seed: int, data: st.DataObject
) -> None:
    layers, heads, samples = 2, 3, 2
    scopes = samples * (layers if by_layer else 1) * (heads if by_head else 1)
    own = data.draw(token_ends(samples))
    ends_BT = padded(own)
    # Each layer and head has its own drawn tokens and the same number of slots. Sample 0 has an empty last slot.
    drawn = padded(data.draw(token_ends(scopes)))
    ends_BLHM = drawn.view(samples, layers if by_layer else 1, heads if by_head else 1, -1)
    mask_BM = torch.ones(samples, drawn.shape[1], dtype=torch.bool)
    mask_BM[0, -1] = False
    ends_BLHM[0, ..., -1] = TEXT_BYTES
    x_BLHTD = torch.randn(samples, layers, heads, ends_BT.shape[1], 3, generator=torch.Generator().manual_seed(seed))
    out, mask_BLHM = at_teacher_slots(x_BLHTD, ends_BT, BatchKV(x_BLHTD, x_BLHTD, mask_BM, ends_BLHM), skip)
    assert out.shape == (samples, layers, heads, drawn.shape[1], 3)
    assert mask_BLHM.shape == out.shape[:4]
    for b, l, h, m in torch.cartesian_prod(*(torch.arange(size) for size in mask_BLHM.shape)).tolist():
        end = int(ends_BLHM[b, l if by_layer else 0, h if by_head else 0, m])
        skipped = naive_skipped(own[b], skip)
        tokens = [t for t, e in enumerate(own[b]) if e == end >= 0 and t not in skipped and mask_BM[b, m]]
        assert bool(mask_BLHM[b, l, h, m]) == bool(tokens)
        assert torch.equal(out[b, l, h, m], x_BLHTD[b, l, h, tokens[-1]] if tokens else torch.zeros(3))


def test_both_directions_find_the_same_pairs() -> None:
    kv = teacher_batch(3, 2, seed=0)
    ends_BT = torch.tensor(TOKEN_ENDS).expand(3, -1)
    x_BLHTD = torch.arange(6.0).expand(3, 1, 1, -1)[..., None]
    own, mask_BLHM = at_teacher_slots(x_BLHTD, ends_BT, kv)
    assert own[1, 0, 0, :, 0].tolist() == [1.0, 0.0, 3.0]
    assert mask_BLHM[:, 0, 0].tolist() == [[True, False, False], [True, False, True], [True, False, True]]
    assert at_student_tokens(kv, ends_BT).mask_BM[1].nonzero().flatten().tolist() == [1, 3]
    assert at_student_tokens(kv, ends_BT, skip_first=2).mask_BM[1].nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, [0, 1, 1, 0, 1, 1, 0]), (1, [0, 0, 1, 0, 1, 1, 0]), (3, [0, 0, 0, 0, 0, 1, 0]), (9, [0] * 7)],
)
def test_tokens_without_text_do_not_count_towards_skip_first(count: int, expected: list[int]) -> None:
    ends_BT = torch.tensor([[-1, 2, 4, -1, 5, 7, -1]])
    assert beyond_first(ends_BT, count).long().tolist() == [expected]


def test_slots_of_tokens_returns_the_slot_with_the_same_end() -> None:
    kv = teacher_batch(4, 3, seed=0)
    kv.byte_ends_BLHM[1] = torch.tensor([4, -1, 11])
    index_BT = slots_of_tokens(kv, torch.tensor(TOKEN_ENDS).expand(4, -1))
    # Samples 0 and 3 have an empty last slot whose byte end is 9.
    assert index_BT.tolist() == [
        [-1, 0, -1, -1, -1, -1],
        [-1, -1, 0, -1, -1, 2],
        [-1, 0, -1, 2, -1, -1],
        [-1, 0, -1, -1, -1, -1],
    ]


@pytest.mark.parametrize("tensor", TENSORS)
def test_gathering_moves_teacher_slots_to_student_tokens(tensor: TensorKind) -> None:
    kv = teacher_batch(3, 2, seed=5)
    x = kv.k_BLHMD if tensor == "k" else kv.v_BLHMD
    assert x is not None
    index_BT = torch.tensor([[1, 0, -1, 1], [-1, -1, -1, 2], [2, 1, 0, -1]])
    out = gather_slots(x, index_BT)
    assert out.shape == (3, 2, TEACHER.heads, 4, TEACHER.head_dim)
    for b in range(3):
        for t in range(4):
            slot = int(index_BT[b, t])
            expected = x[b, :, :, slot] if slot >= 0 else torch.zeros(2, TEACHER.heads, TEACHER.head_dim)
            assert torch.equal(out[b, :, :, t], expected)
