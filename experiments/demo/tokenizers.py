"""Three byte-level BPE tokenizers with different splits, merges and ids, with and without BOS.

A reasoning value such as ` 4` is one token in each, so that three latents can represent three values. Qwen2's split
separates digits from the space before them, so its tokenizers have the values as added tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from data.records import Record
from experiments.demo.demo_config import ModelName

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Splits at spaces only, as the SentencePiece Llamas do: merges may join an operator and its operand.
_LLAMA_SPLIT = r" ?\S+|\s+"


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How a tokenizer is built. `joins_equals`: whether ` =` is one token; otherwise no merge joins it."""

    family: Literal["qwen2", "llama"]
    joins_equals: bool
    special_first: bool


_RECIPES: dict[ModelName, _Recipe] = {
    "teacher_a": _Recipe("qwen2", joins_equals=False, special_first=False),
    "teacher_b": _Recipe("llama", joins_equals=True, special_first=False),
    "student": _Recipe("qwen2", joins_equals=True, special_first=True),
}


def build_tokenizer(name: ModelName, records: Sequence[Record]) -> PreTrainedTokenizerBase:
    """Trains a model's tokenizer on the records' text; the same records give the same tokenizer."""
    recipe = _RECIPES[name]
    if recipe.family == "llama":
        return _llama(records, recipe)
    return _qwen2(records, recipe)


def _llama(records: Sequence[Record], recipe: _Recipe) -> PreTrainedTokenizerBase:
    bos, eos, pad = special = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"]
    tokenizer = _trained(records, recipe, _LLAMA_SPLIT, special)
    begin = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)


def _qwen2(records: Sequence[Record], recipe: _Recipe) -> PreTrainedTokenizerBase:
    eos, pad = special = ["<|im_end|>", "<|endoftext|>"]
    tokenizer = _trained(records, recipe, _QWEN2_SPLIT, special)
    values = sorted({f" {value}" for record in records for value in (record.reasoning + record.answer).split()})
    tokenizer.add_tokens([AddedToken(value, normalized=False) for value in values])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return Qwen2Tokenizer(tokenizer_object=tokenizer, eos_token=eos, pad_token=pad)


def _trained(records: Sequence[Record], recipe: _Recipe, split: str, special: list[str]) -> Tokenizer:
    texts = [record.text if recipe.joins_equals else record.prompt.replace(" =", "") for record in records]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special if recipe.special_first else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(special)
    return tokenizer
