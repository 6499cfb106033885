"""Measures codecs on a model's K/V of real texts: bytes, both errors, and speed on one thread.

A server reads the texts and sends all layers in fp32. Then each codec encodes and decodes each text's K/V layer by
layer. Bytes are relative to bf16. An error is the norm of the difference over a norm: that of the K/V (`error`), or of
what varies in them, without the mean of each layer's channels over all tokens (`error_of_varying`). Both are means over
the layers. Speeds are MB of bf16 input per second; encoding includes measuring its error. Prints one JSON object as its
last line.

Examples:
  python -m benchmarks.codec --model outputs/real/models/teacher --data outputs/real/full/data/val.jsonl
  python -m benchmarks.codec --model HuggingFaceTB/SmolLM2-135M-Instruct --data val.jsonl --tokens 24
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.served import ENVIRONMENT
from data.records import load_records
from kvcore.plan import CodecSpec
from kvcore.tensors.codec import decode, encode, layer_bytes
from kvcore.types import TENSORS, Tensor, TensorKind
from kvdistill.client import TeacherClient
from student_trainer.launching.local_teachers import LocalTeachers

TEXTS_PER_REQUEST = 4
SPECS = (
    CodecSpec(name="bf16"),
    CodecSpec(name="int8"),
    CodecSpec(name="int6"),
    CodecSpec(name="int4"),
    CodecSpec(name="int4", group_size=32),
    CodecSpec(name="int4", group_size=16),
)


@dataclass(frozen=True, slots=True)
class Texts:
    """Keys or values of all texts, each [L,H,M,D], and per layer the norms that errors are divided by."""

    kind: TensorKind
    x_LHMD: list[Tensor]
    norm_L: Tensor
    varying_norm_L: Tensor


def read_kv(model: str, texts: Sequence[str], tokens: int) -> list[Texts]:
    """The K/V of all layers, from a server on this machine; of the last `tokens` tokens, or of all if 0."""
    selection: dict[str, Any] = {"selector": "right", "budget": tokens} if tokens else {}
    found: dict[TensorKind, list[Tensor]] = {kind: [] for kind in TENSORS}
    with (
        tempfile.TemporaryDirectory() as logs,
        LocalTeachers({"teacher": model}, Path(logs), device="cpu", dtype="fp32", environment=ENVIRONMENT) as endpoints,
        TeacherClient(endpoints["teacher"]) as client,
    ):
        for start in range(0, len(texts), TEXTS_PER_REQUEST):
            kv = client.fetch(texts[start : start + TEXTS_PER_REQUEST], codec="raw", **selection)
            for row, slots in enumerate(kv.mask_BM.sum(dim=1).tolist()):
                found["k"].append(kv.k_BLHMD[row, :, :, :slots].clone())
                found["v"].append(kv.v_BLHMD[row, :, :, :slots].clone())
    return [_texts(kind, tensors) for kind, tensors in found.items()]


def _texts(kind: TensorKind, x_LHMD: list[Tensor]) -> Texts:
    all_LHMD = torch.cat(x_LHMD, dim=2).double()
    varying_LHMD = all_LHMD - all_LHMD.mean(dim=2, keepdim=True)
    return Texts(kind, x_LHMD, all_LHMD.flatten(1).norm(dim=1), varying_LHMD.flatten(1).norm(dim=1))


def measure(texts: Texts, spec: CodecSpec) -> dict[str, float]:
    """Bytes, errors and speeds of one codec for keys or for values."""
    encode_s = decode_s = sent = elements = 0.0
    square_L = torch.zeros_like(texts.norm_L)
    for x_LHMD in texts.x_LHMD:
        began = time.perf_counter()
        layers = [encode(x_HMD[None], texts.kind, spec) for x_HMD in x_LHMD]
        encode_s += time.perf_counter() - began
        began = time.perf_counter()
        decoded_LHMD = torch.cat([decode(layer.parts, texts.kind, spec) for layer in layers])
        decode_s += time.perf_counter() - began
        square_L += (decoded_LHMD - x_LHMD).double().square().flatten(1).sum(dim=1)
        sent += sum(part.numel() * part.element_size() for layer in layers for part in layer.parts.values())
        elements += x_LHMD.numel()
    return {
        "smaller_than_bf16": 2 * elements / sent,
        "error": float((square_L.sqrt() / texts.norm_L).mean()),
        "error_of_varying": float((square_L.sqrt() / texts.varying_norm_L).mean()),
        "encode_mb_s": 2e-6 * elements / encode_s,
        "decode_mb_s": 2e-6 * elements / decode_s,
    }


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each figure over the rounds."""
    return {name: float(f"{statistics.median(each[name] for each in rounds):.4g}") for name in rounds[0]}


def run(model: str, texts: Sequence[str], tokens: int, rounds: int) -> dict[str, Any]:
    """All codecs, in turn in each round; the first round is not counted."""
    torch.set_num_threads(1)
    both = read_kv(model, texts, tokens)
    _, heads, _, head_dim = both[0].x_LHMD[0].shape
    slots = [x_LHMD.shape[2] for x_LHMD in both[0].x_LHMD]
    whole = 4 * heads * head_dim * sum(slots)
    found: dict[str, dict[str, Any]] = {}
    measured = [[[measure(kv, spec) for kv in both] for spec in SPECS] for _ in range(rounds + 1)][1:]
    for number, spec in enumerate(SPECS):
        by_kind = {kv.kind: medians([each[number][place] for each in measured]) for place, kv in enumerate(both)}
        sent = sum(layer_bytes(spec, heads, each, head_dim) for each in slots)
        found[f"{spec.name}, groups of {spec.group_size}"] = {"smaller_than_bf16": round(whole / sent, 3), **by_kind}
    return {"texts": len(texts), "tokens": sum(slots), "codecs": found}


def main() -> None:
    """Parses the arguments, runs the benchmark and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the teacher: a directory or hub id")
    parser.add_argument("--data", type=Path, required=True, help="records, such as val.jsonl")
    parser.add_argument("--texts", type=int, default=32, help="number of records to read; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=0, help="the last tokens of each text; all by default")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    given = parser.parse_args()
    texts = [record.text for record in load_records(given.data)[: given.texts]]
    print(json.dumps({"benchmark": "codec", **run(given.model, texts, given.tokens, given.rounds)}))


if __name__ == "__main__":
    main()
