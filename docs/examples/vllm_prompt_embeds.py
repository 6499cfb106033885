"""Answers questions with a latent student in vLLM: kvdistill computes the latents, vLLM generates the answers.

An answer depends on the input embeddings of its prompt and of the latents after the last pass, and on nothing else. So
vLLM needs only the language model and these embeddings. Needs vLLM and kvdistill in one environment.

Example:
  python docs/examples/vllm_prompt_embeds.py outputs/run/best_model "Question: What is 2+3?" "Question: What is 4+4?"
"""

# vLLM is installed in an environment of its own.
# pyright: reportMissingModuleSource=false

from __future__ import annotations

import sys
import tempfile
from typing import Any

from vllm import LLM, SamplingParams

from kvdistill import Student, load_student


def answer(student: Student, prompts: list[str], max_new_tokens: int = 256, **engine: Any) -> list[str]:
    """The greedy answers, equal to those of `student.generate`. `engine`: further arguments of vLLM's `LLM`."""
    embeddings = student.prompt_embeddings(prompts)
    with tempfile.TemporaryDirectory() as directory:
        student.lm.save_pretrained(directory)  # The language model alone, without the latent parameters.
        student.tokenizer.save_pretrained(directory)
        dtype = str(student.lm.dtype).removeprefix("torch.")
        llm = LLM(directory, dtype=dtype, enable_prompt_embeds=True, **engine)
    greedy = SamplingParams(temperature=0.0, max_tokens=max_new_tokens)
    outputs = llm.generate([{"prompt_embeds": embeddings_TE} for embeddings_TE in embeddings], greedy)
    return [_text(student, output.outputs[0]) for output in outputs]


def _text(student: Student, completion: Any) -> str:
    """The text without its end token. vLLM's own text may lack an incomplete character at the end."""
    ids = completion.token_ids[:-1] if completion.finish_reason == "stop" else completion.token_ids
    return str(student.tokenizer.decode(ids, skip_special_tokens=True))


if __name__ == "__main__":
    model, *questions = sys.argv[1:]
    for text in answer(load_student(model), questions):
        print(text)
