"""Small tokenizers like those of large models, and the bytes of their tokens, computed without the code under test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

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


def byte_level(
    pattern: str,
    normalizer: Any = None,
    *,
    trim: bool = False,
    bos: bool = False,
    eos: bool = False,
    prefix_space: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE like those of Qwen2 and Llama-3; `trim` trims offsets as Llama-3 and GPT-NeoX do."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), alphabet])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<｜User｜>"]
    _train(tokenizer, special, CORPUS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    post: list[processors.PostProcessor] = [processors.ByteLevel(trim_offsets=trim, add_prefix_space=prefix_space)]
    if bos or eos:
        single = " ".join(["<|begin|>"] * bos + ["$A"] + ["<|end|>"] * eos)
        post.append(processors.TemplateProcessing(single=single, special_tokens=[("<|begin|>", 0), ("<|end|>", 1)]))
    tokenizer.post_processor = processors.Sequence(post)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")


def sentencepiece(*, prepend: bool = False, normalizer: Any = None, bos: bool = False) -> PreTrainedTokenizerFast:
    """A BPE with byte fallback as converted from SentencePiece, in the current form or (`prepend`) that of Llama-2."""
    tokenizer = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prepend:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(steps)
    # Only a fixed set of characters have tokens, so that the others fall back to bytes.
    _train(tokenizer, ["<unk>", "<s>", "</s>", *SINGLE_BYTES], SMALL_CORPUS)
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = [
        token for token in definition["added_tokens"] if not token["content"].startswith("<0x")
    ]
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _train(tokenizer: Tokenizer, special: Sequence[str], corpus: Sequence[str], **options: Any) -> None:
    trainer = trainers.BpeTrainer(vocab_size=460, special_tokens=list(special), show_progress=False, **options)
    tokenizer.train_from_iterator(corpus, trainer)


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
BYTE_LEVEL = ["qwen2 without nfc", "llama3"]
FALLBACK = ["metaspace", "llama2"]

_BYTE_SPELT = {spelt: byte for byte, spelt in bytes_to_unicode().items()}


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """One of `BUILDERS`, trained once."""
    return BUILDERS[name]()


def token_bytes(name: str, ids: Sequence[int]) -> list[bytes]:
    """The bytes of each token, for a tokenizer of `BYTE_LEVEL` or `FALLBACK`."""
    tokenizer = tokenizer_of(name)
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    written: list[bytes] = []
    for token in tokenizer.convert_ids_to_tokens(list(ids)):
        if token in added:
            written.append(token.encode())
        elif name in BYTE_LEVEL:
            written.append(bytes(_BYTE_SPELT[character] for character in token))
        elif token in SINGLE_BYTES:
            written.append(bytes([SINGLE_BYTES.index(token)]))
        else:
            written.append(token.replace("▁", " ").encode())
    return written


def naive_ends(name: str, text: str, ids: Sequence[int]) -> list[int]:
    """Byte ends by counting the bytes of each token, for a tokenizer of `BYTE_LEVEL` or `FALLBACK` without BOS.

    A SentencePiece tokenizer adds a space before the text; Llama-2's adds one before every part between special tokens.
    A token that adds no bytes of the text has no byte end.
    """
    special = set(tokenizer_of(name).all_special_ids)
    own_space = name == "llama2" or (name == "metaspace" and not text.startswith(" "))
    ends: list[int] = []
    read = 0
    for token_id, written in zip(ids, token_bytes(name, ids), strict=True):
        if token_id in special:
            own_space = name == "llama2"
            text_written = written
        else:
            assert written.startswith(b" ") or not own_space
            text_written = written[1:] if own_space else written
            own_space = False
        read += len(text_written)
        ends.append(read if text_written else -1)
    assert read == len(text.encode()), "the tokens write another text"
    return ends
