"""Tests that a teacher reads samples in its own chat template, with byte ends and spans of the contents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from align.tokenizer_align import pair_ends_batch
from data.collate import Collator
from data.records import Record
from kvcore.errors import FieldError
from kvcore.tensors.offsets import fingerprint
from kvcore.types import Chat, Turn
from teacher_server.config import ServeConfig
from teacher_server.engines import load_engine
from teacher_server.engines.base import SPAN_KINDS
from teacher_server.engines.hf import hf_engine as hf
from tests.support.chat_templates import TINY_CHATML, TINY_LLAMA_3, with_template
from tests.support.reference_kv import load_reference, reference_kv
from tests.support.tiny_models import build_tokenizer, save_tiny_model, tiny_spec

RECORDS = [
    Record("one", " Start 3, Größe? ", " Add 4: 0.\n", " 0"),
    Record(
        "many",
        "Start 3.\n 7\nAdd 思考?",
        " 3 + 4 = 7.",
        " 7",
        turns=(("user", "Start 3."), ("assistant", " 7"), ("user", "Add 思考?")),
    ),
]


def saved(directory: Path, template: str | None) -> Path:
    save_tiny_model(directory, tiny_spec("llama", layers=2))
    return directory if template is None else with_template(directory, template)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("teacher"), TINY_LLAMA_3)


@pytest.fixture(scope="module")
def engine(directory: Path) -> Iterator[hf.HFEngine]:
    engine = hf.load(ServeConfig(model=str(directory), device="cpu", dtype="fp32"))
    yield engine
    engine.close()


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.id)
def test_sample_is_read_in_the_teachers_template(engine: hf.HFEngine, record: Record) -> None:
    tokens = engine.tokenize(record.sample(record.chat("Be brief.")))
    messages = [{"role": "system", "content": "Be brief."}]
    messages += [{"role": role, "content": content} for role, content in record.turns or (("user", record.prompt),)]
    tokenizer = build_tokenizer("llama")
    tokenizer.chat_template = TINY_LLAMA_3
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(rendered, str)
    written = rendered + record.reasoning + record.answer
    assert list(tokens.token_ids) == tokenizer(written, add_special_tokens=False)["input_ids"]

    text = record.text.encode()
    for token, end, span in zip(tokens.token_ids, tokens.byte_ends, tokens.span_ids, strict=True):
        spelt = str(tokenizer.decode([token]))
        if end >= 0 and "\ufffd" not in spelt:
            assert text[:end].decode().endswith(spelt[-1]), "the token's last character is the text's"
        kind = "" if span < 0 else SPAN_KINDS[span]
        read = len(record.prompt.encode()), len((record.prompt + record.reasoning).encode())
        expected = "" if end < 0 else "prompt" if end <= read[0] else "reasoning" if end <= read[1] else "answer"
        assert kind == expected
    known = [end for end in tokens.byte_ends if end >= 0]
    assert known == sorted(set(known))
    assert known[-1] == len(text)


def test_kv_are_those_of_the_rendered_text(engine: hf.HFEngine, directory: Path) -> None:
    record = RECORDS[1]
    tokens = engine.tokenize(record.sample(record.chat()))
    found: dict[int, torch.Tensor] = {}
    engine.prefill([tokens], (0, 1), False, lambda output: found.update({output.layer: output.k_BHTD[0]}))
    expected = reference_kv(load_reference(directory), tokens.token_ids)
    for layer, k_HTD in found.items():
        torch.testing.assert_close(k_HTD.double(), expected.k_LHTD[layer].double(), atol=1e-4, rtol=0)


def test_student_and_teacher_with_other_templates_are_paired_at_the_same_contents(engine: hf.HFEngine) -> None:
    student = build_tokenizer("qwen2")
    student.chat_template = TINY_CHATML
    for record in RECORDS:
        mine = Collator(student, 512, chat=True, system_prompt="Be brief.").tokens(record).byte_ends
        theirs = engine.tokenize(record.sample(record.chat("Be brief."))).byte_ends
        (paired,) = pair_ends_batch(torch.tensor([theirs]), torch.tensor([mine])).tolist()
        for end, slot in zip(mine, paired, strict=True):
            assert slot < 0 or theirs[slot] == end >= 0
        last = len(record.text.encode())
        for byte in (len((record.prompt + record.reasoning).encode()), last):
            assert paired[mine.index(byte)] >= 0, "reasoning and answer end at the same byte"


def test_plain_samples_are_read_as_before(engine: hf.HFEngine) -> None:
    tokens = engine.tokenize(RECORDS[0].sample())
    assert list(tokens.token_ids) == build_tokenizer("llama")(RECORDS[0].text)["input_ids"]


def test_teacher_without_a_template_refuses_the_sample(tmp_path: Path) -> None:
    engine = hf.load(ServeConfig(model=str(saved(tmp_path, None)), device="cpu", dtype="fp32"))
    sample = RECORDS[0].sample(RECORDS[0].chat())
    with pytest.raises(FieldError, match=r"samples\[one\]\.chat: .* no chat template; .* teachers\.N\.format: plain"):
        engine.tokenize(sample)
    engine.close()
    fake = load_engine(ServeConfig(model="fake:layers=1,heads=1,dim=8", engine="fake"))
    with pytest.raises(FieldError, match=r"samples\[one\]\.chat: the engine 'fake' has no chat template"):
        fake.tokenize(sample)


def test_errors_name_the_sample_that_they_are_about(engine: hf.HFEngine) -> None:
    engine.tokenize(RECORDS[1].sample(RECORDS[1].chat()))
    with pytest.raises(FieldError, match=r"samples\[ids\]\.chat: a chat template needs text"):
        engine.tokenize(replace(RECORDS[0].sample(), id="ids", text=None, token_ids=(3,), spans=(), chat=Chat(())))
    long = replace(RECORDS[0].sample(), chat=Chat((Turn("user", 0, 2),), "x" * 64 * 512))
    with pytest.raises(FieldError, match=r"samples\[one\]\.text: has \d+ characters; this teacher takes"):
        engine.tokenize(long)


def test_fingerprint_of_a_teacher_depends_on_its_template(engine: hf.HFEngine) -> None:
    tokenizer = build_tokenizer("llama")
    plain = fingerprint(tokenizer, with_template=True)
    assert plain == fingerprint(tokenizer)
    tokenizer.chat_template = TINY_LLAMA_3
    assert engine.info.tokenizer_fingerprint == fingerprint(tokenizer, with_template=True) != plain
