"""Compares cross-entropy in chunks with cross-entropy of whole logits: time and peak memory of forward and backward.

Each side runs in processes of its own, in turns; medians over the rounds are reported. Prints one JSON object as its
last line.

Examples:
  python -m benchmarks.cross_entropy
  python -m benchmarks.cross_entropy --vocabulary 49152 --batch 8 --tokens 256
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peak_memory import peak_mib
from student_trainer.model.lm_head import logits_of, token_cross_entropy

SIDES = ("chunks", "whole")


def loss_of(side: str, vocabulary: int, batch: int, tokens: int, hidden: int) -> Callable[[], float]:
    """Forward and backward pass of the loss on random hidden states; returns its seconds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=hidden // 64,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    lm = LlamaForCausalLM(config)
    # The gradient of the head exists on both sides, so it does not count.
    lm.get_output_embeddings().weight.grad = torch.zeros(vocabulary, hidden)  # type: ignore[union-attr]
    hidden_BTE = torch.randn(batch, tokens, hidden, requires_grad=True)
    targets_BT = torch.randint(vocabulary, (batch, tokens))

    def run() -> float:
        began = time.perf_counter()
        if side == "chunks":
            loss = token_cross_entropy(lm, hidden_BTE, targets_BT, torch.ones_like(targets_BT).bool()).mean()
        else:
            loss = cross_entropy(logits_of(lm, hidden_BTE).flatten(0, 1).float(), targets_BT.flatten())
        loss.backward()
        return time.perf_counter() - began

    return run


def main() -> None:
    """Runs the benchmark and prints its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("vocabulary", 152064), ("batch", 4), ("tokens", 512), ("hidden", 256), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    shape = vars(parser.parse_args())
    rounds = shape.pop("rounds")
    runs = {side: loss_of(side, *shape.values()) for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    peaks: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, run in runs.items():
            seconds[side].append(run())
            peaks[side].append(peak_mib(loss_of, side, *shape.values()) or float("inf"))
    memory = {side: statistics.median(each) for side, each in peaks.items()}
    print(
        json.dumps(
            {
                "shape": shape,
                "rounds": rounds,
                "median_s": {side: statistics.median(each) for side, each in seconds.items()},
                "median_peak_mib": memory,
                "memory_share": memory["chunks"] / memory["whole"],
            }
        )
    )


if __name__ == "__main__":
    main()
