"""Compares reasoning in latents with written reasoning by the same backbone: latency of the thought, and tokens/s.

A thought ends when the first token of the answer is known. Written reasoning takes a forward pass for each of its
tokens; latents take one for the prompt, T over M latents, and one more. Weights are random, with the shape of
SmolLM2-135M, and texts end at fixed lengths. All sides take turns in one process, and the medians over the rounds are
reported, with the medians of the ratios within a round. Prints one JSON object as its last line.

Examples:
  python -m benchmarks.student
  python -m benchmarks.student --device cuda --dtype bf16 --reasoning 256 --passes 3 6 --latents 24 150
  python -m benchmarks.student --quick
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from student_trainer.model.generation import Start, TextEnd, after_latents, after_prompt, steps
from student_trainer.model.latent import LatentStudent, new_reasoning

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# No token ends a text, and none is decoded.
NO_END = TextEnd(cast("Any", None), ())


@dataclass(frozen=True, slots=True)
class Shape:
    """The model, by default SmolLM2-135M's, and the tokens of prompt, written reasoning and answer."""

    layers: int = 30
    hidden: int = 576
    vocabulary: int = 49152
    prompt: int = 100
    reasoning: int = 73
    answer: int = 5


TINY = Shape(layers=2, hidden=192, vocabulary=512, prompt=8, reasoning=6, answer=2)


@dataclass(frozen=True, slots=True)
class Side:
    """One way to reason about a batch of prompts. Written reasoning has no passes and no latents."""

    batch: int
    passes: int = 0
    latents: int = 0


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds from the prompt to the first token of the answer, and to its last."""

    thought: float
    whole: float


def backbone(shape: Shape, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """A model with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 8 // 3,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=shape.hidden // 192,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(device=device, dtype=dtype).eval()  # pyright: ignore[reportCallIssue]


def answers(lm: LlamaForCausalLM, shape: Shape, side: Side) -> Callable[[], Times]:
    """Answers a batch of random prompts on one side."""
    ids_BP = torch.randint(shape.vocabulary, (side.batch, shape.prompt)).to(lm.device)
    mask_BP = torch.ones_like(ids_BP).bool()
    student = None
    if side.passes:
        reasoning = new_reasoning(lm, side.latents, side.passes, seed=0)
        student = LatentStudent(lm, reasoning.to(lm.device, lm.dtype)).eval()
    silent = 0 if student else shape.reasoning

    def start() -> Start:
        return after_latents(student, ids_BP, mask_BP) if student else after_prompt(ids_BP, mask_BP)

    def answer() -> Times:
        began = _now(lm.device)
        thought = began
        for number, _ in enumerate(steps(lm, start(), silent + shape.answer, NO_END)):
            if number == silent:
                thought = _now(lm.device)
        return Times(thought - began, _now(lm.device) - began)

    return answer


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def measure(lm: LlamaForCausalLM, shape: Shape, sides: list[Side], rounds: int) -> list[dict[str, Any]]:
    """The figures of each side. `sides` start with written reasoning, the reference of the ratios."""
    runs = {side: answers(lm, shape, side) for side in sides}
    times: dict[Side, list[Times]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, run in runs.items():
            found = run()
            if number > 0:  # The first round warms up.
                times[side].append(found)
    written = times[sides[0]]
    assert not sides[0].passes, "written reasoning comes first"
    figures: list[dict[str, Any]] = []
    for side, found in times.items():
        whole = statistics.median(one.whole for one in found)
        pairs = list(zip(written, found, strict=True))
        figures.append(
            {
                "reasoning": "latents" if side.passes else "written",
                **asdict(side),
                "forward_passes": (1 + side.passes if side.passes else shape.reasoning) + shape.answer,
                "thought_s": statistics.median(one.thought for one in found),
                "whole_s": whole,
                "answer_tokens_per_s": side.batch * shape.answer / whole,
                "thought_times_faster": statistics.median(a.thought / b.thought for a, b in pairs),
                "whole_times_faster": statistics.median(a.whole / b.whole for a, b in pairs),
            }
        )
    return figures


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="prompts per batch; default: 1 16")
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 3, 6], help="T; default: 1 3 6")
    parser.add_argument("--latents", type=int, nargs="+", default=[6, 24], help="M; default: 6 24")
    parser.add_argument("--reasoning", type=int, default=Shape().reasoning, help="written tokens; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="after one that warms up; default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a tiny model and short texts, to check the script")
    given = parser.parse_args()
    shape = TINY if given.quick else replace(Shape(), reasoning=given.reasoning)
    lm = backbone(shape, torch.device(given.device), DTYPES[given.dtype])
    figures: list[dict[str, Any]] = []
    for batch in given.batch:
        thinking = [Side(batch, passes, latents) for latents in given.latents for passes in given.passes]
        figures += measure(lm, shape, [Side(batch), *thinking], given.rounds)
    run = {"device": given.device, "dtype": given.dtype, "threads": torch.get_num_threads(), "rounds": given.rounds}
    print(json.dumps({"shape": asdict(shape), **run, "sides": figures}))


if __name__ == "__main__":
    main()
