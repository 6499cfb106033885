"""Tests of aligning whole texts under two tokenizers, compared with plain loops over the bytes of each token."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.tokenizer_align import METHODS, TokenizerAligner, overlap_weights_batch, pair_ends_batch
from kvcore.tensors.offsets import read_text
from tests.support.text_tokenizers import BUILDERS, BYTE_LEVEL, FALLBACK, TEXTS, naive_ends, tokenizer_of

EXACT = [*BYTE_LEVEL, *FALLBACK]
PAIRS = [(teacher, student) for teacher in EXACT for student in EXACT if teacher != student]
SPECIAL = ["<s>", "</s>", "<unk>", "<|begin|>", "<|end|>"]
SCRIPTS = {
    "latin": "Größe, naïve café",
    "chinese": "思考过程: 三加四, 龘",
    "joined emoji": "👩‍👩‍👧 or 👍🏽",
    "combining marks": "cafe\u0301 a\u0323\u0301",
    "right to left": "שלום עולם مرحبا",
    "empty": "",
}
CHATML = "{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": ("qwen2 without nfc", CHATML), "llama2": ("llama2", LLAMA2)}

any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=8)
tricky_text = st.text("eéa 0\t\n\u0301\u0323中龘👩\u200d😀xשם<|>", max_size=8)
chat_text = st.lists(any_text | tricky_text | st.sampled_from(SPECIAL), max_size=5).map("".join)


def expected_ends(name: str, text: str) -> list[int]:
    """Byte ends with the tokenizer's special tokens, as in `align`."""
    tokenizer = tokenizer_of(name)
    bos = [tokenizer.bos_token_id] if name in ("llama3", "llama2") else []
    return [-1] * len(bos) + naive_ends(name, text, tokenizer(text, add_special_tokens=False)["input_ids"])


def naive_weights(method: str, teacher: Sequence[int], student: Sequence[int]) -> list[list[float]]:
    """Dense rows, token by token and byte by byte."""
    rows: list[list[float]] = []
    read_by_student = 0
    for student_end in student:
        row = [0.0] * len(teacher)
        read_by_teacher = 0
        for t, teacher_end in enumerate(teacher):
            if method == "boundary" and teacher_end == student_end != -1:
                row = [float(other == t) for other in range(len(teacher))]
            for byte in range(read_by_teacher, teacher_end):
                if method == "overlap" and read_by_student <= byte < student_end:
                    row[t] += 1 / (student_end - read_by_student)
            read_by_teacher = max(read_by_teacher, teacher_end)
        read_by_student = max(read_by_student, student_end)
        rows.append(row)
    return rows


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(PAIRS), st.sampled_from(METHODS), chat_text)
def test_random_text_aligns_by_its_bytes(pair: tuple[str, str], method: str, text: str) -> None:
    teacher, student = pair
    alignment = TokenizerAligner(tokenizer_of(teacher), tokenizer_of(student), method).align(text)
    expected = naive_weights(method, expected_ends(teacher, text), expected_ends(student, text))
    weights_TsTt = alignment.weights.to_dense()
    assert alignment.weights.is_coalesced()
    assert weights_TsTt.shape == (len(expected), len(expected_ends(teacher, text)))
    for s, row in enumerate(expected):
        assert weights_TsTt[s].tolist() == pytest.approx(row, abs=1e-6)
        assert bool(alignment.mask_Ts[s]) == (sum(row) > 0)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(BUILDERS)), st.sampled_from(METHODS), chat_text)
def test_the_same_tokenizer_gives_exactly_the_identity_on_random_text(name: str, method: str, text: str) -> None:
    tokenizer = tokenizer_of(name)
    alignment = TokenizerAligner(tokenizer, tokenizer, method).align(text)
    tokens = len(tokenizer(text)["input_ids"])
    assert torch.equal(alignment.weights.to_dense(), torch.eye(tokens))
    assert alignment.mask_Ts.tolist() == [True] * tokens


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_equal_byte_ends_pair_each_token_with_itself(name: str, text: str) -> None:
    """Batches have byte ends but no tokenizers. A token that covers bytes must pair with exactly itself."""
    _, ends = read_text(tokenizer_of(name), text, add_special_tokens=True)
    ends_BT = torch.tensor([ends], dtype=torch.int64).view(1, len(ends))
    weights_BTM, mask_BT = overlap_weights_batch(ends_BT, ends_BT)
    own = [end > max([0, *ends[:t]]) for t, end in enumerate(ends)]
    assert mask_BT[0].tolist() == own
    assert torch.equal(weights_BTM[0], torch.diag(torch.tensor(own, dtype=torch.float32)))
    partner_T = pair_ends_batch(ends_BT, ends_BT)[0].tolist()
    assert all(partner == t for t, partner in enumerate(partner_T) if ends.count(ends[t]) == 1 and ends[t] != -1)
    assert all(partner == -1 for t, partner in enumerate(partner_T) if ends[t] == -1)


def rendered(template: str, content: str) -> tuple[str, list[int]]:
    """A chat rendered with a tokenizer's template, and the byte ends of its two messages."""
    name, definition = TEMPLATES[template]
    messages = [{"role": "user", "content": f"({content})"}, {"role": "assistant", "content": f"{content}!"}]
    text = tokenizer_of(name).apply_chat_template(messages, chat_template=definition, tokenize=False)
    assert isinstance(text, str)
    before = [text[: text.index(message["content"])] + message["content"] for message in messages]
    return text, [len(read.encode()) for read in before]


@pytest.mark.parametrize("content", SCRIPTS.values(), ids=SCRIPTS.keys())
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_rendered_chat_aligns_at_message_ends(pair: tuple[str, str], template: str, content: str) -> None:
    text, message_ends = rendered(template, content)
    teacher, student = pair
    teacher_ends, student_ends = expected_ends(teacher, text), expected_ends(student, text)
    alignment = TokenizerAligner(tokenizer_of(teacher), tokenizer_of(student)).align(text)
    expected = torch.tensor(naive_weights("boundary", teacher_ends, student_ends))
    assert torch.equal(alignment.weights.to_dense(), expected)
    # No token crosses the end of a message, so both tokenizers have a token that ends exactly there.
    for end in message_ends:
        assert alignment.mask_Ts[student_ends.index(end)]


def test_single_token_role_mark_pairs_with_the_last_of_several_tokens() -> None:
    text, _ = rendered("chatml", "3 + 4")
    whole, pieces = tokenizer_of("qwen2 without nfc"), tokenizer_of("llama2")
    piece_ids, piece_ends = read_text(pieces, text, add_special_tokens=True)
    mark_end = len("<|begin|>")
    last_piece = piece_ends.index(mark_end)
    assert last_piece > 3, "the mark is spelt out"
    into_pieces = TokenizerAligner(teacher_tokenizer=whole, student_tokenizer=pieces).align(text)
    assert into_pieces.mask_Ts[: last_piece + 1].tolist() == [False] * last_piece + [True]
    assert into_pieces.weights.to_dense()[last_piece, 0] == 1.0
    into_whole = TokenizerAligner(teacher_tokenizer=pieces, student_tokenizer=whole).align(text)
    assert into_whole.weights.to_dense()[0].tolist() == [float(t == last_piece) for t in range(len(piece_ids))]


@pytest.mark.parametrize("content", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_second_start_token_does_not_shift_ends(content: str) -> None:
    text, _ = rendered("llama2", content)
    ids, ends = read_text(tokenizer_of("llama2"), text, add_special_tokens=True)
    start = tokenizer_of("llama2").bos_token_id
    assert ids[:2] == [start, start]
    assert ends[:2] == [-1, len("<s>")]
    assert ends[1:] == read_text(tokenizer_of("llama2"), text, add_special_tokens=False)[1]
    assert ends[-1] == len(text.encode())


def test_characters_outside_the_vocabulary_align_byte_by_byte() -> None:
    """Both tokenizers fall back to one token per byte, with different spellings."""
    text = "龘𓀀"
    alignment = TokenizerAligner(tokenizer_of("llama3"), tokenizer_of("llama2")).align(text)
    # Llama-2 adds a start token and a space; Llama-3 adds only a start token.
    assert alignment.mask_Ts.tolist() == [False, False] + [True] * 7
    assert torch.equal(alignment.weights.to_dense()[2:, 1:], torch.eye(7))
