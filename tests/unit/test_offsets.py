"""Tests of token byte ends on real tokenizers, compared with what the tokenizers library decodes from each prefix."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from kvcore.errors import FieldError
from kvcore.tensors.offsets import fingerprint, read_text
from tests.support.text_tokenizers import BUILDERS, BYTE_LEVEL, FALLBACK, TEXTS, naive_ends, tokenizer_of


def read(name, text, add_special_tokens=True):
    """Returns tokens and byte ends after checking what holds for every tokenizer and text."""
    tokenizer = tokenizer_of(name)
    ids, ends = read_text(tokenizer, text, add_special_tokens)
    assert ids == tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    assert len(ends) == len(ids)
    known = [end for end in ends if end != -1]
    assert known == sorted(known)
    assert all(0 < end <= len(text.encode()) for end in known)
    return ids, ends


def decoded(name, ids):
    return tokenizer_of(name).backend_tokenizer.decode(ids, skip_special_tokens=False)


def without_bos(name, ids, ends):
    skip = 1 if ids and ids[0] == tokenizer_of(name).bos_token_id else 0
    return ids[skip:], ends[skip:]


def assert_ends_match_decoded_prefixes(name, text, normal):
    """For every known end, the tokens up to it decode to the text up to it."""
    ids, ends = without_bos(name, *read(name, text))
    for count, end in enumerate(ends, start=1):
        if end == -1:
            continue
        so_far = decoded(name, ids[:count])
        if "\ufffd" not in so_far:
            assert so_far == normal(text.encode()[:end].decode())
    return ids, ends


any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
# Characters that compose, decompose, join or get trimmed, so that adjacent characters interact.
SPECIAL = ["<s>", "</s>", "<unk>", "<|begin|>", "<|end|>"]
tricky_text = st.text(
    "eéaoAΩ \t\n\u0301\u0323\u030a\u212b\u2126\uf900\u1100\u1161\u11a8中龘👩\u200d😀ﬁ▁Ġxש", max_size=12
)


@settings(deadline=None)
@given(st.sampled_from(BYTE_LEVEL), any_text | tricky_text)
def test_byte_level_tokens_end_where_their_bytes_end(name, text):
    ids, ends = without_bos(name, *read(name, text))
    for count, end in enumerate(ends, start=1):
        assert decoded(name, ids[:count]) == text.encode()[:end].decode(errors="replace")
    assert ends[-1:] == ([len(text.encode())] if text else [])


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(["qwen2", "neox"]), any_text | tricky_text)
def test_normaliser_that_composes_marks_does_not_shift_ends(name, text):
    def compose(read_so_far):
        return unicodedata.normalize("NFC", read_so_far)

    ids, ends = assert_ends_match_decoded_prefixes(name, text, compose)
    if name == "neox":
        return  # it trims spaces from its offsets, so an end next to a space with a combining mark is left unknown
    # Every end is known where a cut separates no mark from its letter.
    cuts = [cut for cut in range(1, len(text) + 1) if not unicodedata.combining(text[cut : cut + 1] or " ")]
    readable = {compose(text[:cut]) for cut in cuts}
    for count, end in enumerate(ends, start=1):
        assert end != -1 or decoded(name, ids[:count]) not in readable


@settings(deadline=None)
@given(st.sampled_from(FALLBACK), any_text | tricky_text)
def test_byte_fallback_tokens_end_byte_by_byte(name, text):
    def with_prefix(read_so_far):
        prefix = "" if name == "llama2" or text.startswith((" ", "▁")) else " "
        return prefix + read_so_far.replace("▁", " ")

    _, ends = assert_ends_match_decoded_prefixes(name, text, with_prefix)
    if "▁" not in text:
        assert ends[-1:] == ([len(text.encode())] if text else [])
        assert -1 not in ends[1:] or ends[:2] == [-1, -1]


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_last_token_ends_at_the_end_of_the_text(name, text):
    _, ends = read(name, text)
    assert max(ends, default=-1) == (len(text.encode()) or -1)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("qwen2", "中龘", [("ä¸Ń", 3), ("é", 4), ("¾", 5), ("ĺ", 6)]),
        ("qwen2", "n\u0303x", [("Ã", -1), ("±", 3), ("x", 4)]),
        ("qwen2", "\u1100\u1161\u11a8!", [("ê", -1), ("°", -1), ("ģ", 9), ("!", 10)]),
        ("neox", "n\u0303\t  x", [("Ã", -1), ("±", 3), ("ĉĠ", 5), ("Ġx", 7)]),
        ("neox", "n\u0303  x", [("Ã", -1), ("±", 3), ("Ġ", 4), ("Ġx", 6)]),
        ("prefix space", "a-中", [("Ġ", -1), ("a", 1), ("Ġ", -1), ("-", 2), ("ä¸Ń", 5)]),
        ("prefix space", "x=4", [("Ġx", 1), ("Ġ=", 2), ("Ġ4", 3)]),
        ("llama3", "\t  x", [("<|begin|>", -1), ("ĉĠ", 2), ("Ġx", 4)]),
        ("llama3", "a<|end|>", [("<|begin|>", -1), ("a", 1), ("<|end|>", 8)]),
        ("metaspace", "龘b", [("▁", -1), ("<0xE9>", 1), ("<0xBE>", 2), ("<0x98>", 3), ("b", 4)]),
        ("metaspace nfkc", "ﬁ", [("▁", -1), ("f", -1), ("i", 3)]),
    ],
)
def test_ends_of_example_texts(name, text, expected):
    tokenizer = tokenizer_of(name)
    ids, ends = read(name, text)
    assert list(zip(tokenizer.convert_ids_to_tokens(ids), ends, strict=True)) == expected


def test_added_special_tokens_have_no_byte_end():
    with_bos, ends = read("llama3", "hello", add_special_tokens=True)
    plain, plain_ends = read("llama3", "hello", add_special_tokens=False)
    assert with_bos == [tokenizer_of("llama3").bos_token_id, *plain]
    assert ends == [-1, *plain_ends]
    assert read("llama3", "") == ([tokenizer_of("llama3").bos_token_id], [-1])


def test_special_token_after_the_text_does_not_change_earlier_ends():
    tokenizer = BUILDERS["qwen2"]()
    marks = [("<|begin|>", 0), ("<|end|>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=marks
    )
    _, ends = read_text(tokenizer, "hello n\u0303", add_special_tokens=True)
    assert ends[0] == ends[-1] == -1
    assert ends[1:-1] == read("qwen2", "hello n\u0303")[1]


def test_unknown_characters_do_not_shift_adjacent_ends():
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(["hello world"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    ids, ends = read_text(fast, "hello  龘 world", add_special_tokens=False)
    assert fast.convert_ids_to_tokens(ids) == ["hello", "<unk>", "world"]
    assert ends == [5, 10, 16]


def test_fused_unknown_token_ends_after_its_last_character():
    tokenizer = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True))
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(["hello world"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    ids, ends = read_text(fast, "hello中龘👍hello", add_special_tokens=False)
    assert fast.convert_ids_to_tokens(ids) == ["hello", "<unk>", "hello"]
    assert ends == [5, 15, 20]


@settings(deadline=None)
@given(st.sampled_from([*BYTE_LEVEL, *FALLBACK]), st.lists(any_text | tricky_text | st.sampled_from(SPECIAL)))
def test_special_tokens_in_the_text_do_not_shift_ends(name, pieces):
    text = "".join(pieces).replace("▁", "_")
    ids, ends = read(name, text, add_special_tokens=False)
    assert ends == naive_ends(name, text, ids)


@pytest.mark.parametrize("name", ["qwen2", "llama2"])
def test_special_token_that_strips_spaces_ends_after_them(name):
    tokenizer = BUILDERS[name]()
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<|user|>", rstrip=True, special=True)])
    text = "é<|user|> \n中"
    ids, ends = read_text(tokenizer, text, add_special_tokens=False)
    place = tokenizer.convert_ids_to_tokens(ids).index("<|user|>")
    assert ends[place] == 2 + 8 + 2
    assert [end for end in ends[:place] if end != -1][-1] == 2
    assert ends[-1] == 15


def test_truncation_in_an_earlier_call_does_not_cut_the_text():
    tokenizer = BUILDERS["qwen2"]()
    before = fingerprint(tokenizer)
    tokenizer("hello world", truncation=True, max_length=1)
    assert fingerprint(tokenizer) == before
    assert read_text(tokenizer, "hello world", add_special_tokens=False)[1][-1] == 11


def test_text_with_a_lone_surrogate_is_refused():
    with pytest.raises(FieldError, match=r"^text: character 2 is a lone surrogate"):
        read_text(tokenizer_of("qwen2"), "ab\ud800", add_special_tokens=False)


class SlowTokenizer(PreTrainedTokenizer):
    """A slow (pure Python) transformers tokenizer."""

    @property
    def vocab_size(self):
        return 256

    def get_vocab(self):
        return {chr(byte): byte for byte in range(256)}

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token)

    def _convert_id_to_token(self, index):
        return chr(index)


def test_slow_tokenizer_without_offsets_is_refused():
    slow = SlowTokenizer()
    for call in (lambda: read_text(slow, "a", add_special_tokens=False), lambda: fingerprint(slow)):
        with pytest.raises(FieldError, match=r"^tokenizer: SlowTokenizer has no offsets.*tokenizer\.json"):
            call()


def test_fingerprint_is_the_same_after_save_and_load(tmp_path):
    tokenizer = BUILDERS["llama3"]()
    tokenizer.save_pretrained(tmp_path)
    assert fingerprint(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == fingerprint(tokenizer)


def test_tokenizers_that_differ_have_different_fingerprints():
    prints = {name: fingerprint(build()) for name, build in BUILDERS.items()}
    assert len(set(prints.values())) == len(prints)
    assert prints["llama3"] == fingerprint(BUILDERS["llama3"]())


def test_fingerprint_depends_on_settings_that_change_tokenization():
    plain = fingerprint(BUILDERS["qwen2"]())
    splitting, template, adding = (BUILDERS["qwen2"]() for _ in range(3))
    splitting.split_special_tokens = True
    template.chat_template = "{{ messages }}"
    adding.add_tokens(["<tool>"])
    assert fingerprint(splitting) != plain
    assert fingerprint(adding) != plain
    assert fingerprint(template) == plain
