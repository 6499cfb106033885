"""Tests of pairing the tokens of two tokenizers by their byte ends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from align.tokenizer_align import TokenizerAligner, overlap_weights_batch, pair_ends_batch
from kvcore.errors import FieldError
from kvcore.tensors.offsets import read_text
from tests.support.tiny_models import build_tokenizer

TEXTS = (
    "3 + 4 = 7, so 0; 120 x 25 = 3000.",
    "思考过程:三加四等于七。答案是二。",
    "naïve café 🙂🙃 👩‍👩‍👧 Ελληνικά",
    " leading and trailing \n\n",
    "",
)


@pytest.fixture(scope="module")
def llama() -> PreTrainedTokenizerFast:
    return build_tokenizer("llama", 330)


@pytest.fixture(scope="module")
def qwen() -> PreTrainedTokenizerFast:
    return build_tokenizer("qwen2", 384)


@st.composite
def byte_ends(draw: st.DrawFn) -> list[int]:
    """Ascending byte ends in a text of up to 30 bytes, some repeated, some unknown."""
    ends = sorted(draw(st.lists(st.integers(1, 30), max_size=15)))
    unknown = draw(st.lists(st.booleans(), min_size=len(ends), max_size=len(ends)))
    return [-1 if hidden else end for end, hidden in zip(ends, unknown, strict=True)]


def naive_pairs(teacher: list[int], student: list[int]) -> list[int]:
    return [max((t for t, end in enumerate(teacher) if end == wanted >= 0), default=-1) for wanted in student]


def naive_overlap(teacher: list[int], student: list[int]) -> list[list[float]]:
    """For each byte, finds the token that covers it under each tokenizer; the weights are normalised counts."""

    def token_of_byte(ends: list[int]) -> dict[int, int]:
        owner: dict[int, int] = {}
        for token, end in enumerate(ends):
            owner |= {byte: token for byte in range(end) if byte not in owner}
        return owner

    of_teacher, of_student = token_of_byte(teacher), token_of_byte(student)
    counts = [[0.0] * len(teacher) for _ in student]
    for byte in of_teacher.keys() & of_student.keys():
        counts[of_student[byte]][of_teacher[byte]] += 1
    return [[count / sum(row) if sum(row) else 0.0 for count in row] for row in counts]


def padded(rows: list[list[int]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int32).view(len(rows), width)


def test_unknown_ends_never_pair() -> None:
    assert pair_ends_batch(padded([[-1, 3, -1]]), padded([[-1, 3]])).tolist() == [[-1, 1]]


@given(st.lists(st.tuples(byte_ends(), byte_ends()), min_size=1, max_size=5))
def test_token_pairs_with_last_teacher_token_that_ends_at_its_byte(batch: list[tuple[list[int], list[int]]]) -> None:
    teachers, students = [t for t, _ in batch], [s for _, s in batch]
    index_BT = pair_ends_batch(padded(teachers), padded(students))
    assert index_BT.dtype == torch.int64
    for row, teacher, student in zip(index_BT.tolist(), teachers, students, strict=True):
        assert row[: len(student)] == naive_pairs(teacher, student)
        assert set(row[len(student) :]) <= {-1}


@given(st.lists(st.tuples(byte_ends(), byte_ends()), min_size=1, max_size=4))
def test_overlap_weights_are_the_shared_bytes(batch: list[tuple[list[int], list[int]]]) -> None:
    teacher_BM, student_BT = padded([teacher for teacher, _ in batch]), padded([student for _, student in batch])
    weights_BTM, mask_BT = overlap_weights_batch(teacher_BM, student_BT)
    assert weights_BTM.dtype == torch.float32
    assert weights_BTM.shape == (len(batch), student_BT.shape[1], teacher_BM.shape[1])
    for b in range(len(batch)):
        expected = naive_overlap(teacher_BM[b].tolist(), student_BT[b].tolist())
        for t, row in enumerate(expected):
            assert weights_BTM[b, t].tolist() == pytest.approx(row, abs=1e-7)
            assert bool(mask_BT[b, t]) == (sum(row) > 0)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("method", ["boundary", "overlap"])
def test_equal_tokenizers_give_exactly_the_identity(text: str, method: str, llama: PreTrainedTokenizerFast) -> None:
    alignment = TokenizerAligner(llama, build_tokenizer("llama", 330), method).align(text)
    tokens = len(read_text(llama, text, add_special_tokens=True)[0])
    assert torch.equal(alignment.weights.to_dense(), torch.eye(tokens))
    assert alignment.mask_Ts.tolist() == [True] * tokens


@pytest.mark.parametrize("text", TEXTS)
def test_boundary_pairs_end_at_the_same_byte(
    text: str, llama: PreTrainedTokenizerFast, qwen: PreTrainedTokenizerFast
) -> None:
    alignment = TokenizerAligner(teacher_tokenizer=llama, student_tokenizer=qwen).align(text)
    teacher_ids, student_ids = (read_text(tokenizer, text, True)[0] for tokenizer in (llama, qwen))
    weights = alignment.weights.to_dense()
    assert weights.shape == (len(student_ids), len(teacher_ids))
    for s in range(len(student_ids)):
        read = qwen.decode(student_ids[: s + 1])
        partners = [t for t in range(len(teacher_ids)) if weights[s, t] > 0]
        assert alignment.mask_Ts[s] == bool(partners)
        if partners:
            assert len(partners) == 1
            assert weights[s, partners[0]] == 1.0
            assert llama.decode(teacher_ids[1 : partners[0] + 1]) == read
        elif "�" not in read:
            # The token is masked only because no teacher token ends there.
            prefixes = [llama.decode(teacher_ids[1 : t + 1]) for t in range(1, len(teacher_ids))]
            assert read not in prefixes


def test_different_tokenizers_mask_only_some_tokens(
    llama: PreTrainedTokenizerFast, qwen: PreTrainedTokenizerFast
) -> None:
    mask = TokenizerAligner(teacher_tokenizer=qwen, student_tokenizer=llama).align(TEXTS[1]).mask_Ts
    assert not mask[0], "a start token has read nothing to compare"
    assert mask[1:].any()
    assert not mask[1:].all()


@pytest.mark.parametrize("text", TEXTS)
def test_overlap_covers_every_token_that_ends_on_a_character(
    text: str, llama: PreTrainedTokenizerFast, qwen: PreTrainedTokenizerFast
) -> None:
    alignment = TokenizerAligner(llama, qwen, method="overlap").align(text)
    sums = alignment.weights.to_dense().sum(dim=1)
    torch.testing.assert_close(sums, alignment.mask_Ts.float())
    _, student_ends = read_text(qwen, text, True)
    assert alignment.mask_Ts.tolist() == [end > 0 for end in student_ends]


def test_unknown_method_is_refused(llama: PreTrainedTokenizerFast) -> None:
    with pytest.raises(FieldError) as caught:
        TokenizerAligner(llama, llama, method="nearest")
    assert caught.value.field == "method"
    assert "nearest" in str(caught.value)
