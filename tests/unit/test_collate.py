"""Tests of the collator, which turns records into padded token batches."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from data.collate import Collator
from data.records import Record
from kvcore.errors import FieldError
from tests.support.tiny_models import build_tokenizer

LLAMA = build_tokenizer("llama")
EOS, PAD, BOS = 2, 0, 1
SHORT = Record("a", "Start 3.", " Add 4: 0.", " 0")
LONG = Record("b", "思考:Größe 3, then add 4 🙂.", " 3 + 4 = 7, so 0; naïve café.", " The answer is 0.")
UNREASONED = Record("c", "Start 3.", "", " 3")
RECORDS = (SHORT, LONG, UNREASONED)


def collator(max_tokens: int = 512) -> Collator:
    return Collator(LLAMA, max_tokens)


def plain_ids(record: Record) -> tuple[list[int], list[int], list[int]]:
    prompt, reasoning, answer = (
        LLAMA(part, add_special_tokens=False)["input_ids"] for part in (record.prompt, record.reasoning, record.answer)
    )
    return [BOS, *prompt], reasoning, answer


def test_prompts_are_left_padded_and_answers_and_texts_right_padded() -> None:
    batch = collator()(RECORDS)
    for row, record in enumerate(RECORDS):
        prompt, reasoning, answer = plain_ids(record)
        text = [*prompt, *reasoning, *answer, EOS]
        expected = {
            "prompt_ids_BP": [PAD] * (batch.prompt_ids_BP.shape[1] - len(prompt)) + prompt,
            "prompt_mask_BP": [False] * (batch.prompt_ids_BP.shape[1] - len(prompt)) + [True] * len(prompt),
            "answer_ids_BA": [*answer, EOS] + [PAD] * (batch.answer_ids_BA.shape[1] - len(answer) - 1),
            "answer_mask_BA": [True] * (len(answer) + 1) + [False] * (batch.answer_ids_BA.shape[1] - len(answer) - 1),
            "text_ids_BT": text + [PAD] * (batch.text_ids_BT.shape[1] - len(text)),
            "text_mask_BT": [True] * len(text) + [False] * (batch.text_ids_BT.shape[1] - len(text)),
            "text_target_BT": [len(prompt) <= place < len(text) for place in range(batch.text_ids_BT.shape[1])],
        }
        for name, values in expected.items():
            assert getattr(batch, name)[row].tolist() == values, (record.id, name)
    assert batch.records == RECORDS


def test_batches_are_padded_to_the_longest_row() -> None:
    batch = collator()([SHORT])
    assert batch.prompt_mask_BP.all()
    assert batch.answer_mask_BA.all()
    assert batch.text_mask_BT.all()


def test_byte_ends_are_offsets_in_the_whole_text() -> None:
    batch = collator()(RECORDS)
    for row, record in enumerate(RECORDS):
        ends = batch.text_byte_ends_BT[row].tolist()
        count = int(batch.text_mask_BT[row].sum())
        assert ends[count - 1 :] == [-1] * (len(ends) - count + 1), "neither the end of sequence nor padding is text"
        text_ends = [end for end in ends if end >= 0]
        assert text_ends == sorted(text_ends)
        text = record.text.encode()
        parts = [len(record.prompt.encode()), len((record.prompt + record.reasoning).encode()), len(text)]
        assert set(parts) <= set(text_ends), "every part ends with a token"
        for place, end in enumerate(ends[: count - 1]):
            token = str(LLAMA.decode([int(batch.text_ids_BT[row, place])]))
            if end > 0 and token.isascii():
                assert text[:end].endswith(token.encode()), (record.id, place)


def test_continuation_is_the_text_after_the_prompt() -> None:
    batch = collator()(RECORDS)
    for row in range(len(RECORDS)):
        text = batch.text_ids_BT[row][batch.text_mask_BT[row]].tolist()
        prompt = batch.prompt_ids_BP[row][batch.prompt_mask_BP[row]].tolist()
        rest = batch.continuation_ids_BR[row][batch.continuation_mask_BR[row]].tolist()
        assert prompt + rest == text
        assert len(rest) == int(batch.text_target_BT[row].sum())


def test_prompt_tokens_are_equal_in_training_and_inference() -> None:
    maker = collator()
    batch = maker(RECORDS)
    ids_BP, mask_BP = maker.prompts([record.prompt for record in RECORDS])
    assert ids_BP.equal(batch.prompt_ids_BP)
    assert mask_BP.equal(batch.prompt_mask_BP)


def test_record_over_max_tokens_raises_with_id_and_length() -> None:
    length = sum(map(len, plain_ids(LONG))) + 1
    assert collator(length)([LONG]).text_ids_BT.shape == (1, length)
    with pytest.raises(FieldError, match=rf"data\.max_tokens: record 'b' has {length} .* limit is {length - 1}"):
        collator(length - 1)([SHORT, LONG])


def test_records_with_equal_ids_keep_their_own_text() -> None:
    maker = collator()
    training = maker([SHORT])
    validation = maker([Record(SHORT.id, "Start 5.", " Add 1: 6.", " 6")])
    assert not validation.text_ids_BT.equal(training.text_ids_BT)
    assert maker([SHORT]).text_ids_BT.equal(training.text_ids_BT)


def test_tokenizer_without_padding_token_pads_with_eos() -> None:
    tokenizer = build_tokenizer("qwen2")
    tokenizer.pad_token = None
    batch = Collator(tokenizer, 512)([SHORT, LONG])
    assert batch.prompt_ids_BP[0, 0] == EOS
    assert not batch.prompt_mask_BP[0, 0]


def test_tokenizer_without_eos_is_refused() -> None:
    tokenizer = build_tokenizer("qwen2")
    tokenizer.eos_token = None
    with pytest.raises(FieldError, match=r"student\.path: .*end-of-sequence"):
        Collator(tokenizer, 512)


def test_batch_moves_to_device() -> None:
    moved = collator()(RECORDS).to(torch.device("meta"))
    assert moved.records == RECORDS
    tensors = [getattr(moved, field.name) for field in fields(moved) if field.name != "records"]
    assert len(tensors) == 14
    assert all(tensor.is_meta for tensor in tensors)
