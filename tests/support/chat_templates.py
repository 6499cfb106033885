"""Chat templates like those of large models, with the special tokens of tests/support/text_tokenizers.py."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.support.text_tokenizers import LLAMA3, QWEN2, byte_level, sentencepiece

# Qwen2.5, SmolLM2: a system message of its own if there is none.
CHATML = """{% if messages[0].role != 'system' %}<|begin|>system
Be brief<|end|>
{% endif %}{% for m in messages %}<|begin|>{{ m.role }}
{{ m.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|begin|>assistant
{% endif %}"""
# Llama-3: begins with a BOS and trims contents. The end of a turn is not the tokenizer's end of sequence.
LLAMA_3 = (
    "<|begin|>{% for m in messages %}[{{ m.role }}]\n\n{{ m.content | trim }}<｜User｜>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
# Llama-2: the user's turn ends with the assistant's header, whatever is asked for.
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} </s>{% else %}{{ raise_exception('no system role') }}{% endif %}"
    "{% endfor %}"
)
# The same with the special tokens of tests/support/tiny_models.py.
TINY_CHATML = CHATML.replace("<|begin|>", "<s>").replace("<|end|>", "</s>")
TINY_LLAMA_3 = LLAMA_3.replace("<|begin|>", "<s>").replace("<｜User｜>", "</s>")
_OF = {"chatml": CHATML, "llama3": LLAMA_3, "llama2": LLAMA_2}


def chat_tokenizer(name: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer with the chat template of that name (chatml, llama3, llama2), or with another one."""
    tokenizer = {
        "chatml": lambda: byte_level(QWEN2),
        "llama3": lambda: byte_level(LLAMA3, trim=True, bos=True),
        "llama2": lambda: sentencepiece(prepend=True, bos=True),
    }[name]()
    tokenizer.chat_template = template or _OF[name]
    return tokenizer


def with_template(directory: Path, template: str) -> Path:
    """Gives the tokenizer of a saved model a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(str(directory))
    return directory
