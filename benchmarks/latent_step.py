"""Compares a latent student's step with the prompt's K/V kept and with every pass reading the whole sequence again.

A step is forward and backward pass of answer and reasoning cross-entropy and of a loss on the latents' K/V. The two
sides take turns in one process, and the medians over the rounds are reported; peak memory is measured in a process for
each side. `matrix_tflop` counts the floating-point operations of matrix products, so its ratio is the speed-up that a
machine without other costs would show. Prints one JSON object as its last line.

Examples:
  python -m benchmarks.latent_step
  python -m benchmarks.latent_step --passes 6 --latents 150 --batch 2 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peak_memory import peak_mib
from benchmarks.whole_readings import answer_reading, naive_cross_entropy
from kvcore.types import Tensor
from student_trainer.model.latent import LatentStudent, new_reasoning
from student_trainer.model.losses import mean_over_tokens

SIDES = ("kept", "again")


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of model and batch: tokens of prompt, reasoning, latents and answer."""

    prompt: int = 100
    reasoning: int = 120
    latents: int = 24
    answer: int = 20
    passes: int = 3
    batch: int = 4
    layers: int = 10
    hidden: int = 576
    vocabulary: int = 49152


def step_of(shape: Shape, side: str) -> Callable[[], None]:
    """One step of a new student with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 8 // 3,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=shape.hidden // 192,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=True,
    )
    lm = LlamaForCausalLM(config)
    student = LatentStudent(lm, new_reasoning(lm, shape.latents, shape.passes, seed=0)).train()
    prompt_BP = torch.randint(shape.vocabulary, (shape.batch, shape.prompt))
    continuation_BR = torch.randint(shape.vocabulary, (shape.batch, shape.reasoning + shape.answer))
    losses = _kept if side == "kept" else _again

    def step() -> None:
        student.zero_grad()
        losses(student, prompt_BP, continuation_BR, continuation_BR[:, shape.reasoning :]).backward()

    return step


def _kept(student: LatentStudent, prompt_BP: Tensor, continuation_BR: Tensor, answer_BA: Tensor) -> Tensor:
    prompt = student.read_prompt(prompt_BP, torch.ones_like(prompt_BP).bool())
    answer_mask_BA, continuation_mask_BR = torch.ones_like(answer_BA).bool(), torch.ones_like(continuation_BR).bool()
    answer = student.read_answer(student.think(prompt), answer_BA, answer_mask_BA)
    text = student.read_continuation(prompt, continuation_BR, continuation_mask_BR)
    answer_ce = mean_over_tokens(student.cross_entropy(answer.hidden_BAE, answer_BA, answer_mask_BA), answer_mask_BA)
    text_loss_BR = student.cross_entropy(text.hidden_BRE, continuation_BR, continuation_mask_BR)
    return answer_ce + mean_over_tokens(text_loss_BR, continuation_mask_BR) + _kv_loss(answer.k_BLHMD, answer.v_BLHMD)


def _again(student: LatentStudent, prompt_BP: Tensor, continuation_BR: Tensor, answer_BA: Tensor) -> Tensor:
    text_BT = torch.cat([prompt_BP, continuation_BR], dim=1)
    mask_BT, answer_mask_BA = torch.ones_like(text_BT).bool(), torch.ones_like(answer_BA).bool()
    hidden_BAE, k_BLHMD, v_BLHMD = answer_reading(
        student, prompt_BP, torch.ones_like(prompt_BP).bool(), answer_BA, answer_mask_BA
    )
    logits_BTV = student.logits(student.read_text(text_BT, mask_BT).hidden_BTE[:, :-1])
    target_BT = mask_BT[:, 1:].clone()
    target_BT[:, : prompt_BP.shape[1] - 1] = False
    answer_ce = naive_cross_entropy(student.logits(hidden_BAE), answer_BA, answer_mask_BA)
    return answer_ce + naive_cross_entropy(logits_BTV, text_BT[:, 1:], target_BT) + _kv_loss(k_BLHMD, v_BLHMD)


def _kv_loss(k_BLHMD: Tensor, v_BLHMD: Tensor) -> Tensor:
    return k_BLHMD.square().mean() + v_BLHMD.square().mean()


def measure(shape: Shape, rounds: int) -> dict[str, object]:
    """Medians of both sides, and how many times faster keeping the prompt is."""
    steps = {side: step_of(shape, side) for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds + 1):
        for side, step in steps.items():
            began = time.perf_counter()
            step()
            if number > 0:
                seconds[side].append(time.perf_counter() - began)
    tflop = {side: _tflop(step) for side, step in steps.items()}
    medians = {side: statistics.median(each) for side, each in seconds.items()}
    memory = {side: peak_mib(step_of, shape, side) for side in SIDES}
    both = all(memory.values())
    return {
        "shape": asdict(shape),
        "rounds": rounds,
        "median_step_s": medians,
        "times_faster": statistics.median(a / k for a, k in zip(seconds["again"], seconds["kept"], strict=True)),
        "matrix_tflop": tflop,
        "fewer_matrix_products": tflop["again"] / tflop["kept"],
        "peak_mib": memory,
        "memory_share": memory["kept"] / memory["again"] if both else None,  # type: ignore[operator]
    }


def _tflop(step: Callable[[], None]) -> float:
    """10^12 floating-point operations of the matrix products of one step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 1e12


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Shape):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each side; default: %(default)s")
    arguments = vars(parser.parse_args())
    rounds = arguments.pop("rounds")
    print(json.dumps(measure(Shape(**arguments), rounds)))


if __name__ == "__main__":
    main()
