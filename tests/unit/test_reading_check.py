"""Tests that prompt, reasoning and answer are read as one text, on tokenizers like those of large models."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from data.collate import Collator
from data.records import Record
from kvcore.errors import FieldError
from kvcore.tensors.offsets import adds_space, read_continuation, read_text
from tests.support.text_tokenizers import BUILDERS, LLAMA3, TEXTS, byte_level, sentencepiece, tokenizer_of

# One that puts a space before every word, so that no text is kept, is refused.
KEEPING = [name for name in BUILDERS if name != "prefix space"]
SPACED = ["metaspace", "metaspace nfkc", "llama2"]
RECORD = Record("r", "hello world: 3 + 4", " x = 7\n\n", "the 7")
PARTS = ["hello world", " hello", "  x = 314", "\n\n x", "3 + 4", "שלום", "", "a", "1"]


@cache
def collator(name: str) -> Collator:
    return Collator(tokenizer_of(name), 512)


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("reasoning", PARTS)
@pytest.mark.parametrize("answer", [part for part in PARTS if part])
def test_tokens_of_the_parts_decode_to_the_text(name: str, reasoning: str, answer: str) -> None:
    record = Record("r", "hello world", reasoning, answer)
    tokens = collator(name).tokens(record)
    assert collator(name).check(record) == []
    ids = [*tokens.prompt_ids, *tokens.reasoning_ids, *tokens.answer_ids]
    bos = tokenizer_of(name).bos_token_id
    assert decoded(tokenizer_of(name), [i for i in ids if i != bos]).removeprefix(" ") == record.text
    ends = [end for end in tokens.byte_ends if end >= 0]
    assert ends == sorted(ends)
    assert {len(record.prompt.encode()), len((record.prompt + reasoning).encode()), len(record.text.encode())} <= {
        *ends
    }
    assert collator(name).count([record]).tolist() == [
        [len(tokens.prompt_ids), len(tokens.reasoning_ids), len(tokens.answer_ids)]
    ]


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), min_size=1, max_size=8))
@pytest.mark.parametrize("name", ["metaspace", "llama2"])
def test_continuation_has_no_space_before_it(name: str, text: str) -> None:
    tokenizer = tokenizer_of(name)
    ids, ends = read_continuation(tokenizer, text)
    before = tokenizer("hello", add_special_tokens=False)["input_ids"]
    assert decoded(tokenizer, before + ids).removeprefix(" ") == "hello" + text
    assert max(ends) == len(text.encode())


def test_tokenizers_that_put_a_space_before_a_text_are_known() -> None:
    assert [name for name in BUILDERS if adds_space(tokenizer_of(name))] == ["prefix space", *SPACED]


def test_other_tokenizers_read_a_continuation_as_before() -> None:
    for name in ("qwen2", "llama3", "neox"):
        for text in TEXTS.values():
            found = collator(name)._reader.continuation(text)
            assert found == read_text(tokenizer_of(name), text, add_special_tokens=False)


def test_tokenizer_that_ends_every_text_is_refused() -> None:
    for tokenizer in (byte_level(LLAMA3, eos=True), byte_level(LLAMA3, bos=True, eos=True)):
        with pytest.raises(FieldError, match=r"student\.path: .* ends every text with '<\|end\|>'.*add_eos_token"):
            Collator(tokenizer, 512).check(RECORD)
    assert Collator(byte_level(LLAMA3, bos=True), 512).check(RECORD) == []


def test_prompt_with_a_bos_of_its_own_is_refused() -> None:
    for name, bos in (("llama3", "<|begin|>"), ("llama2", "<s>")):
        with pytest.raises(FieldError, match=r"student\.path: record 'r' begins with 2 x '<"):
            collator(name).check(Record("r", f"{bos}hello", " x", " 7"))
    assert collator("qwen2").check(Record("r", "<|begin|>hello", " x", " 7")) == [], "its own is the only one"


def test_tokenizer_that_changes_the_text_is_refused() -> None:
    with pytest.raises(FieldError, match=r"student\.path: .* 'r' decode to another text: .* instead of 'hello"):
        collator("prefix space").check(RECORD)


def test_text_that_the_normaliser_composes_is_accepted() -> None:
    record = Record("r", "cafe\u0301", " e\u0301", " a\u0323\u0301")
    for name in ("qwen2", "neox"):
        assert collator(name).check(record) == []


def test_unknown_characters_are_a_warning() -> None:
    tokenizer = sentencepiece()
    # Without the bytes there is nothing to fall back to.
    tokenizer.backend_tokenizer.model.byte_fallback = False
    warning = Collator(tokenizer, 512).check(Record("r", "hello 龘", " x", " 7"))
    assert warning == ["the student's tokenizer reads characters of record 'r' as '<unk>'"]
