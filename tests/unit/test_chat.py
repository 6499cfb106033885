"""Tests of reading texts in chat templates: their tokens, byte ends, end tokens, and what is refused."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from data.collate import Collator
from data.records import Record
from kvcore.errors import FieldError
from kvcore.tensors.chat import ChatTemplate
from kvcore.types import Chat, Role
from tests.support.chat_templates import CHATML, LLAMA_2, LLAMA_3, chat_tokenizer
from tests.support.text_tokenizers import naive_ends, token_bytes

NAMES = ("chatml", "llama3", "llama2")
# The tokenizers' names in tests/support/text_tokenizers.py.
READS_AS = {"chatml": "qwen2 without nfc", "llama3": "llama3", "llama2": "llama2"}
END = {"chatml": "<|end|>", "llama3": "<｜User｜>", "llama2": "</s>"}
TURNS: tuple[tuple[Role, str], ...] = (("user", "3 + 4?"), ("assistant", " is 7"), ("user", "x\n 中 é"))
ONE = Record("r", "hello world?", " x = 314\n", "7")
MANY = Record("m", "\n".join(content for _, content in TURNS), " x = 5", " 6", turns=TURNS)

contents = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="▁\ue000\ue001<｜"), min_size=1, max_size=8
)


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    return chat_tokenizer(name)


def template_of(name: str) -> ChatTemplate:
    return ChatTemplate(tokenizer_of(name), "student.path")


def by_hand(name: str, record: Record, system_prompt: str = "") -> list[tuple[str, int]]:
    """The rendered text in pieces, each with the byte of the record's text where it starts; -1 for the template's."""
    turns = record.turns or (("user", record.prompt),)
    if name == "chatml":
        system = system_prompt or "Be brief"
        pieces = [(f"<|begin|>system\n{system}<|end|>\n", -1)] if turns[0][0] != "system" else []
    else:
        pieces = [("<|begin|>", -1)] if name == "llama3" else []
        pieces += [(f"[system]\n\n{system_prompt}<｜User｜>", -1)] if system_prompt else []
    byte = 0
    for role, content in turns:
        if name == "chatml":
            pieces += [(f"<|begin|>{role}\n", -1), (content, byte), ("<|end|>\n", -1)]
        elif name == "llama3":
            skipped = len(content[: content.index(content.strip())].encode())
            pieces += [(f"[{role}]\n\n", -1), (content.strip(), byte + skipped), ("<｜User｜>", -1)]
        elif role == "user":
            pieces += [("<s>[INST] ", -1), (content, byte), (" [/INST]", -1)]
        else:
            pieces += [(" ", -1), (content, byte), (" </s>", -1)]
        byte += len(content.encode()) + 1
    header = {"chatml": "<|begin|>assistant\n", "llama3": "[assistant]\n\n", "llama2": ""}[name]
    return [*pieces, (header, -1)]


def ends_by_hand(name: str, pieces: list[tuple[str, int]], ids: list[int]) -> list[int]:
    rendered = "".join(text for text, _ in pieces)
    found: list[int] = []
    for end in naive_ends(READS_AS[name], rendered, ids):
        at, mapped = 0, -1
        for text, start in pieces:
            if start >= 0 and at < end <= at + len(text.encode()):
                mapped = start + end - at
            at += len(text.encode())
        found.append(mapped)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("record", [ONE, MANY], ids=["one turn", "several turns"])
def test_tokens_are_those_of_the_template_and_ends_those_of_the_contents(name: str, record: Record) -> None:
    ids, ends = template_of(name).read(record.prompt, record.chat())
    messages = [{"role": role, "content": content} for role, content in record.turns or (("user", record.prompt),)]
    expected = tokenizer_of(name).apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == expected
    assert ends == ends_by_hand(name, by_hand(name, record), ids)
    assert max(ends) == len(record.prompt.encode())


@settings(deadline=None, max_examples=50)
@given(first=contents, second=contents, third=contents, rest=contents)
@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_ends_are_exact_for_any_contents(name: str, first: str, second: str, third: str, rest: str) -> None:
    turns: tuple[tuple[Role, str], ...] = (("user", first), ("assistant", second), ("user", third))
    record = Record("r", f"{first}\n{second}\n{third}", rest, "7", turns=turns)
    ids, ends = template_of(name).read(record.text, record.chat("Answer."))
    start = len(record.prompt.encode())
    pieces = [*by_hand(name, record, "Answer."), (rest + "7", start)]
    assert b"".join(token_bytes(READS_AS[name], ids)).decode() == "".join(text for text, _ in pieces)
    assert ends == ends_by_hand(name, pieces, ids)


@pytest.mark.parametrize("name", NAMES)
def test_end_of_turn_is_the_templates_own(name: str) -> None:
    assert template_of(name).end_of_turn() == END[name]


def test_system_message_of_a_conversation_replaces_the_system_prompt() -> None:
    own = Record("r", "Be kind.\nhi", "", "7", turns=(("system", "Be kind."), ("user", "hi")))
    template = template_of("chatml")
    rendered = template.render(own.prompt, own.chat("Be brief."))
    assert rendered == "<|begin|>system\nBe kind.<|end|>\n<|begin|>user\nhi<|end|>\n<|begin|>assistant\n"
    assert "system\nBe brief.<|end|>" in template.render(ONE.prompt, ONE.chat("Be brief."))


def test_tokenizer_without_a_template_is_refused() -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = None
    with pytest.raises(FieldError, match=r"student\.path: the tokenizer has no chat template; use an instruct model"):
        Collator(tokenizer, 512, chat=True)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (
            CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"),
            "changes the content of a message: 'hello world",
        ),
        (CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"), "not write each message exactly once"),
        (CHATML.replace("{{ m.content }}", "x"), "not write each message exactly once and in order"),
        (CHATML.replace("<|begin|>assistant", "{{ messages[0].content | length }}"), "(changes the content|adds text)"),
        ("{{ raise_exception('never') }}", "refuses the roles user: never"),
    ],
)
def test_template_that_does_not_write_the_contents_is_refused(template: str, problem: str) -> None:
    with pytest.raises(FieldError, match=f"student\\.path: the chat template .*{problem}"):
        ChatTemplate(chat_tokenizer("chatml", template), "student.path").read(ONE.prompt, ONE.chat())


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (CHATML.split("{% if add")[0], "no header of the assistant's turn"),
        (LLAMA_3.replace("<｜User｜>", "\n\n"), "ends the assistant's turn with '\\\\n\\\\n'"),
        (LLAMA_2.replace(" </s>", ""), "ends the assistant's turn with ''"),
    ],
)
def test_template_without_header_or_end_of_the_answer_is_refused(template: str, problem: str) -> None:
    name = "llama2" if "INST" in template else "chatml"
    with pytest.raises(FieldError, match=rf"student\.path: the chat template .*{problem}"):
        Collator(chat_tokenizer(name, template), 512, chat=True)


def test_template_that_refuses_the_roles_names_them() -> None:
    with pytest.raises(FieldError, match="refuses the roles system, user: no system role"):
        template_of("llama2").read(ONE.prompt, ONE.chat("Be brief."))


@pytest.mark.parametrize("name", NAMES)
def test_student_reads_template_reasoning_answer_and_end_of_turn(name: str) -> None:
    tokenizer = chat_tokenizer(name)
    collator = Collator(tokenizer, 512, chat=True)
    records = [ONE, MANY]
    batch = collator(records)
    end = tokenizer.convert_tokens_to_ids(END[name])
    assert tokenizer.eos_token_id == end
    assert collator.end_token == END[name]
    for row, record in enumerate(records):
        assert collator.check(record) == []
        ids = batch.text_ids_BT[row][batch.text_mask_BT[row]].tolist()
        prompt, ends = template_of(name).read(record.prompt, record.chat())
        assert ids[: len(prompt)] == prompt
        assert ids[-1] == end
        rendered = tokenizer.backend_tokenizer.decode(prompt, skip_special_tokens=False)
        whole = tokenizer.backend_tokenizer.decode(ids[:-1], skip_special_tokens=False)
        assert whole == rendered + record.reasoning + record.answer
        predicted = batch.text_target_BT[row].nonzero().flatten().tolist()
        assert predicted == list(range(len(prompt), len(ids))), "from the reasoning to the end of the turn"
        known = batch.text_byte_ends_BT[row].tolist()
        assert known[: len(prompt)] == ends
        text = len(record.text.encode())
        assert {len(record.prompt.encode()), text - len(record.answer.encode()), text} <= {*known}
    ids_BP, mask_BP = collator.record_prompts(records)
    assert torch.equal(ids_BP, batch.prompt_ids_BP)
    assert torch.equal(mask_BP, batch.prompt_mask_BP)
    assert collator.count(records).tolist() == [
        [len(tokens.prompt_ids), len(tokens.reasoning_ids), len(tokens.answer_ids)]
        for tokens in map(collator.tokens, records)
    ]


def test_template_with_two_bos_is_refused_and_one_without_is_a_warning() -> None:
    twice = Collator(chat_tokenizer("llama3", "<|begin|>" + LLAMA_3), 512, chat=True)
    with pytest.raises(
        FieldError, match=r"begins with 2 x '<\|begin\|>': remove the extra one from its prompt, or from"
    ):
        twice.check(ONE)
    (warning,) = Collator(chat_tokenizer("llama3", LLAMA_3.removeprefix("<|begin|>")), 512, chat=True).check(ONE)
    assert warning == "the student's chat template writes no '<|begin|>', unlike its tokenizer"


def test_conversation_needs_the_chat_format() -> None:
    collator = Collator(chat_tokenizer("chatml"), 512)
    for read in (collator.tokens, lambda record: collator.count([record])):
        with pytest.raises(FieldError, match=r"data\.format: 'plain' .* record 'm' is a conversation; set it to chat"):
            read(MANY)


def test_prompts_turn_covers_it_without_messages() -> None:
    assert ONE.chat("x") == Chat(ONE.chat().turns, "x")
    (turn,) = ONE.chat().turns
    assert (turn.role, turn.start, turn.end) == ("user", 0, len(ONE.prompt))
