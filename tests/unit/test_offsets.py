"""Byte ends of real tokenizers, held against what the tokenizers library itself decodes from the tokens read so far."""

from __future__ import annotations

import json
import unicodedata
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from kvcore.errors import FieldError
from kvcore.offsets import fingerprint, read_text

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CORPUS = [
    "hello world  the quick brown fox\n\n x = 314 + 4\t \t y",
    "中文字符测试 中 字",
    "שלום עולם",
    "👩‍👩‍👧 e\u0301",
] * 3
SMALL_CORPUS = ["hello world  the quick brown fox  x = 314 + 4", "שלום עולם"] * 3
SINGLE_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

TEXTS = {
    "ascii": "hello world, x = 314 + 4",
    "leading spaces": "   hello",
    "inner and trailing spaces": "a \t  b  \n\n c   ",
    "chinese": "中文龘字 中",
    "joined emoji": "a👩‍👩‍👧 b👍🏽",
    "combining marks": "e\u0301a\u0323\u0301 cafe\u0301s n\u0303",
    "hangul letters": "\u1100\u1161\u11a8 각",
    "composed differently": "\u212b\u2126\uf900",
    "right to left": "שלום עולם مرحبا",
    "written marks": "a<|end|>b<｜User｜> ▁ <0xE4> Ġ",
    "empty": "",
}


def byte_level(pattern, normalizer=None, *, trim=False, bos=False, prefix_space=False):
    """A byte-level BPE as Qwen2 and Llama-3 define theirs; `trim` as Llama-3 and GPT-NeoX trim offsets."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), alphabet])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<｜User｜>"]
    train(tokenizer, special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    post: list[processors.PostProcessor] = [processors.ByteLevel(trim_offsets=trim, add_prefix_space=prefix_space)]
    if bos:
        post.append(processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]))
    tokenizer.post_processor = processors.Sequence(post)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")


def sentencepiece(*, prepend=False, normalizer=None, bos=False):
    """A BPE with byte fallback as converted from SentencePiece, in its present or (`prepend`) Llama-2's older form."""
    tokenizer = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>"))
    if prepend:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    # Few characters have a token of their own, always the same ones, so that the others fall back to bytes.
    train(tokenizer, ["<unk>", "<s>", "</s>", *SINGLE_BYTES], corpus=SMALL_CORPUS)
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = [
        token for token in definition["added_tokens"] if not token["content"].startswith("<0x")
    ]
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def train(tokenizer, special, corpus=None, **options):
    trainer = trainers.BpeTrainer(vocab_size=460, special_tokens=special, show_progress=False, **options)
    tokenizer.train_from_iterator(corpus or CORPUS, trainer)


BUILDERS = {
    "qwen2 without nfc": lambda: byte_level(QWEN2),
    "llama3": lambda: byte_level(LLAMA3, trim=True, bos=True),
    "qwen2": lambda: byte_level(QWEN2, normalizers.NFC()),
    "neox": lambda: byte_level(QWEN2, normalizers.NFC(), trim=True),
    "prefix space": lambda: byte_level(LLAMA3, trim=True, prefix_space=True),
    "metaspace": lambda: sentencepiece(),
    "metaspace nfkc": lambda: sentencepiece(normalizer=normalizers.NFKC()),
    "llama2": lambda: sentencepiece(prepend=True, bos=True),
}
EXACT = ["qwen2 without nfc", "llama3"]
FALLBACK = ["metaspace", "llama2"]


@cache
def tokenizer_of(name):
    return BUILDERS[name]()


def read(name, text, add_special_tokens=True):
    """Tokens and byte ends, checked for what holds of every tokenizer and text."""
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


def assert_ends_are_what_was_read(name, text, normal):
    """Every end that is told: the text up to there is what the tokens up to there decode to."""
    ids, ends = without_bos(name, *read(name, text))
    for count, end in enumerate(ends, start=1):
        if end == -1:
            continue
        so_far = decoded(name, ids[:count])
        if "\ufffd" not in so_far:
            assert so_far == normal(text.encode()[:end].decode())
    return ids, ends


any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
# What composes, decomposes, joins or is trimmed, so that neighbours meet.
tricky_text = st.text(
    "eéaoAΩ \t\n\u0301\u0323\u030a\u212b\u2126\uf900\u1100\u1161\u11a8中龘👩\u200d😀ﬁ▁Ġxש", max_size=12
)


@settings(deadline=None)
@given(st.sampled_from(EXACT), any_text | tricky_text)
def test_every_byte_level_token_ends_where_its_bytes_end(name, text):
    ids, ends = without_bos(name, *read(name, text))
    for count, end in enumerate(ends, start=1):
        assert decoded(name, ids[:count]) == text.encode()[:end].decode(errors="replace")
    assert ends[-1:] == ([len(text.encode())] if text else [])


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(["qwen2", "neox"]), any_text | tricky_text)
def test_a_normaliser_that_composes_marks_does_not_move_the_ends(name, text):
    def compose(read_so_far):
        return unicodedata.normalize("NFC", read_so_far)

    ids, ends = assert_ends_are_what_was_read(name, text, compose)
    if name == "neox":
        return  # it trims spaces from its offsets, so an end beside a space that carries a mark is kept back
    # No end is kept back where the text may be cut without a mark losing its letter.
    cuts = [cut for cut in range(1, len(text) + 1) if not unicodedata.combining(text[cut : cut + 1] or " ")]
    readable = {compose(text[:cut]) for cut in cuts}
    for count, end in enumerate(ends, start=1):
        assert end != -1 or decoded(name, ids[:count]) not in readable


@settings(deadline=None)
@given(st.sampled_from(FALLBACK), any_text | tricky_text)
def test_byte_fallback_tokens_end_byte_by_byte(name, text):
    def with_prefix(read_so_far):
        prefix = "" if name == "metaspace" and text.startswith((" ", "▁")) else " "
        return prefix + read_so_far.replace("▁", " ")

    _, ends = assert_ends_are_what_was_read(name, text, with_prefix)
    if "▁" not in text:
        assert ends[-1:] == ([len(text.encode())] if text else [])
        assert -1 not in ends[1:] or ends[:2] == [-1, -1]


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_the_last_token_has_read_the_whole_text(name, text):
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
def test_ends_by_example(name, text, expected):
    tokenizer = tokenizer_of(name)
    ids, ends = read(name, text)
    assert list(zip(tokenizer.convert_ids_to_tokens(ids), ends, strict=True)) == expected


def test_special_tokens_of_the_tokenizer_stand_for_no_text():
    with_bos, ends = read("llama3", "hello", add_special_tokens=True)
    plain, plain_ends = read("llama3", "hello", add_special_tokens=False)
    assert with_bos == [tokenizer_of("llama3").bos_token_id, *plain]
    assert ends == [-1, *plain_ends]
    assert read("llama3", "") == ([tokenizer_of("llama3").bos_token_id], [-1])


def test_a_special_token_after_the_text_leaves_the_ends_before_it_alone():
    tokenizer = BUILDERS["qwen2"]()
    marks = [("<|begin|>", 0), ("<|end|>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=marks
    )
    _, ends = read_text(tokenizer, "hello n\u0303", add_special_tokens=True)
    assert ends[0] == ends[-1] == -1
    assert ends[1:-1] == read("qwen2", "hello n\u0303")[1]


def test_unknown_characters_keep_the_ends_of_their_neighbours():
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(["hello world"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    ids, ends = read_text(fast, "hello  龘 world", add_special_tokens=False)
    assert fast.convert_ids_to_tokens(ids) == ["hello", "<unk>", "world"]
    assert ends == [5, 10, 16]


def test_an_earlier_truncation_does_not_cut_the_text():
    tokenizer = BUILDERS["qwen2"]()
    before = fingerprint(tokenizer)
    tokenizer("hello world", truncation=True, max_length=1)
    assert fingerprint(tokenizer) == before
    assert read_text(tokenizer, "hello world", add_special_tokens=False)[1][-1] == 11


def test_a_text_without_utf8_form_is_refused():
    with pytest.raises(FieldError, match=r"^text: character 2 is a lone surrogate"):
        read_text(tokenizer_of("qwen2"), "ab\ud800", add_special_tokens=False)


class SlowTokenizer(PreTrainedTokenizer):
    """A tokenizer in plain Python, as transformers lets people write them."""

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


def test_a_tokenizer_without_offsets_is_refused_by_name():
    slow = SlowTokenizer()
    for call in (lambda: read_text(slow, "a", add_special_tokens=False), lambda: fingerprint(slow)):
        with pytest.raises(FieldError, match=r"^tokenizer: SlowTokenizer gives no offsets.*tokenizer\.json"):
            call()


def test_a_fingerprint_survives_saving(tmp_path):
    tokenizer = BUILDERS["llama3"]()
    tokenizer.save_pretrained(tmp_path)
    assert fingerprint(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == fingerprint(tokenizer)


def test_a_fingerprint_names_what_is_read_differently():
    prints = {name: fingerprint(build()) for name, build in BUILDERS.items()}
    assert len(set(prints.values())) == len(prints)
    assert prints["llama3"] == fingerprint(BUILDERS["llama3"]())


def test_settings_that_change_what_is_read_change_the_fingerprint():
    plain = fingerprint(BUILDERS["qwen2"]())
    splitting, template, adding = (BUILDERS["qwen2"]() for _ in range(3))
    splitting.split_special_tokens = True
    template.chat_template = "{{ messages }}"
    adding.add_tokens(["<tool>"])
    assert fingerprint(splitting) != plain
    assert fingerprint(adding) != plain
    assert fingerprint(template) == plain
