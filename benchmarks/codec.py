"""Measures codecs on a model's K/V of real texts: bytes, both errors, and speed on one thread.

A server reads the texts and sends all layers in fp32. Then each codec encodes and decodes each text's K/V layer by
layer. Bytes are relative to bf16. An error is the norm of the difference over a norm, and the mean over the layers:

- `error`: over the norm of the keys, or of the values.
- `error_of_varying`: over the norm of what varies in them, without the mean of each channel over all tokens.
- `error_together`: the difference in keys and values over the norm of keys and values.

Speeds are MB of bf16 input per second; encoding includes measuring its error. The maps of `pca` are fitted to other
texts than those that are measured, for some qualities, and for equal errors of keys and values. Prints one JSON object
as its last line.

Examples:
  python -m benchmarks.codec --model outputs/real/models/teacher --data val.jsonl --calibration-data train.jsonl
  python -m benchmarks.codec --model HuggingFaceTB/SmolLM2-135M-Instruct --data val.jsonl --tokens 24
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.teacher_basis import BasisStatistics
from benchmarks.served import ENVIRONMENT
from data.records import load_records
from kvcore.plan import CODED, CodecSpec
from kvcore.tensors.codec import decode, encode
from kvcore.tensors.entropy_coding import decode_codes, encode_codes
from kvcore.tensors.kv_map import KVMap
from kvcore.types import TENSORS, BatchKV, Tensor, TensorKind
from kvdistill.client import TeacherClient
from student_trainer.launching.local_teachers import LocalTeachers

TEXTS_PER_REQUEST = 4
QUALITIES = (0.02, 0.05, 0.1, 0.2, 0.4)
# Errors of the codec `pca` over the norm of keys and of values.
EQUAL_ERRORS = (0.01, 0.03, 0.05)
SPECS = (
    CodecSpec(name="bf16"),
    CodecSpec(name="int8"),
    CodecSpec(name="int6"),
    CodecSpec(name="int4"),
    CodecSpec(name="int4", group_size=32),
    CodecSpec(name="int4", group_size=16),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """The figures of one codec for keys or for values, and each layer's squared error, summed over all texts."""

    figures: dict[str, float]
    square_L: Tensor


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


def measure(texts: Texts, spec: CodecSpec) -> Measured:
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
    return Measured(figures(texts, square_L, sent, elements, encode_s, decode_s), square_L)


def fitted(calibration: Sequence[Texts]) -> tuple[BasisStatistics, KVMap]:
    """The statistics of the K/V of texts, and all their principal components."""
    layers, heads, _, head_dim = calibration[0].x_LHMD[0].shape
    sums = BasisStatistics(range(layers), heads * head_dim)
    for k_LHMD, v_LHMD in zip(calibration[0].x_LHMD, calibration[1].x_LHMD, strict=True):
        ends_M = torch.arange(1, k_LHMD.shape[2] + 1)
        mask_BM = torch.ones(1, len(ends_M), dtype=torch.bool)
        mask_BM[:, 0] = False  # The first token is an attention sink.
        sums.add(BatchKV(k_LHMD[None], v_LHMD[None], mask_BM, ends_M.expand(1, 1, 1, -1)), mask_BM)
    return sums, sums.basis(heads * head_dim)[0]


def measure_coded(texts: Texts, kv_map: KVMap) -> Measured:
    """Bytes, errors and speeds of the codec `pca` for keys or for values."""
    encode_s = decode_s = sent = elements = 0.0
    square_L = torch.zeros_like(texts.norm_L)
    spec, kind = CodecSpec(name=CODED), texts.kind
    for x_LHMD in texts.x_LHMD:
        began = time.perf_counter()
        coded: list[bytes] = []
        for layer, x_HMD in enumerate(x_LHMD):
            codes_BHMD = encode(kv_map.apply(x_HMD[None], layer, kind), kind, spec).parts["codes"]
            coded.append(encode_codes(codes_BHMD[0, 0].numpy(), kv_map.classes(layer, kind)))
        encode_s += time.perf_counter() - began
        began = time.perf_counter()
        slots = x_LHMD.shape[2]
        codes = [decode_codes(each, slots, kv_map.classes(layer, kind)) for layer, each in enumerate(coded)]
        y_LHMD = torch.as_tensor(np.stack(codes)).float()[:, None]
        decoded_LHMD = kv_map.decoded(y_LHMD[None], kind)[0]
        decode_s += time.perf_counter() - began
        square_L += (decoded_LHMD - x_LHMD).double().square().flatten(1).sum(dim=1)
        sent += sum(map(len, coded))
        elements += x_LHMD.numel()
    return Measured(figures(texts, square_L, sent, elements, encode_s, decode_s), square_L)


def figures(
    texts: Texts, square_L: Tensor, sent: float, elements: float, encode_s: float, decode_s: float
) -> dict[str, float]:
    """The figures of one codec from its sums over all texts."""
    return {
        "smaller_than_bf16": 2 * elements / sent,
        "error": float((square_L.sqrt() / texts.norm_L).mean()),
        "error_of_varying": float((square_L.sqrt() / texts.varying_norm_L).mean()),
        "encode_mb_s": 2e-6 * elements / encode_s,
        "decode_mb_s": 2e-6 * elements / decode_s,
    }


def error_together(both: Sequence[Texts], measured: Sequence[Measured]) -> float:
    """The error of keys and values over the norm of both, the mean over the layers."""
    square_L = torch.stack([each.square_L for each in measured]).sum(dim=0)
    norm_L = torch.stack([texts.norm_L.square() for texts in both]).sum(dim=0).sqrt()
    return float((square_L.sqrt() / norm_L).mean())


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each figure over the rounds."""
    return {name: float(f"{statistics.median(each[name] for each in rounds):.4g}") for name in rounds[0]}


def coded_maps(both: Sequence[Texts], calibration: Sequence[Texts]) -> dict[str, tuple[KVMap, KVMap]]:
    """The maps of `pca` for keys and values, by the name of their setting."""
    sums, kv_map = fitted(calibration)
    _, heads, _, head_dim = both[0].x_LHMD[0].shape

    def coded(quality: float) -> KVMap:
        return sums.coded(kv_map, quality, (heads, head_dim))

    found = {f"pca, quality {quality:g}": (coded(quality), coded(quality)) for quality in QUALITIES}
    for error in EQUAL_ERRORS:
        ratios = [float((texts.norm_L / texts.varying_norm_L).mean()) for texts in calibration]
        found[f"pca, error {error:g} of both"] = coded(error * ratios[0]), coded(error * ratios[1])
    return found


def run(model: str, texts: Sequence[str], calibration: Sequence[str], tokens: int, rounds: int) -> dict[str, Any]:
    """All codecs, in turn in each round; the first round is not counted."""
    torch.set_num_threads(1)
    both = read_kv(model, texts, tokens)
    maps = coded_maps(both, read_kv(model, calibration, tokens))
    slots = [x_LHMD.shape[2] for x_LHMD in both[0].x_LHMD]
    measured: dict[str, list[list[Measured]]] = {}
    for number in range(rounds + 1):
        for spec in SPECS:
            each = [measure(kv, spec) for kv in both]
            measured.setdefault(f"{spec.name}, groups of {spec.group_size}", []).append(each)
        for name, kv_maps in maps.items():
            each = [measure_coded(kv, kv_map) for kv, kv_map in zip(both, kv_maps, strict=True)]
            measured.setdefault(name, []).append(each)
        print(f"round {number} of {rounds}", file=sys.stderr)
    found: dict[str, dict[str, Any]] = {}
    for name, rounds_of in measured.items():
        by_kind = {kv.kind: medians([each[place].figures for each in rounds_of[1:]]) for place, kv in enumerate(both)}
        smaller = len(both) / sum(1 / each["smaller_than_bf16"] for each in by_kind.values())
        together = float(f"{error_together(both, rounds_of[-1]):.4g}")
        found[name] = {"smaller_than_bf16": round(smaller, 3), "error_together": together, **by_kind}
    return {"texts": len(texts), "calibration_texts": len(calibration), "tokens": sum(slots), "codecs": found}


def main() -> None:
    """Parses the arguments, runs the benchmark and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the teacher: a directory or hub id")
    parser.add_argument("--data", type=Path, required=True, help="records, such as val.jsonl")
    parser.add_argument("--texts", type=int, default=32, help="number of records to read; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=0, help="the last tokens of each text; all by default")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument(
        "--calibration-data",
        type=Path,
        help="records to fit pca to; by default those of --data after the measured ones",
    )
    parser.add_argument("--calibration", type=int, default=64, help="number of these records; default: %(default)s")
    given = parser.parse_args()
    records = load_records(given.data)
    others = records[given.texts :] if given.calibration_data is None else load_records(given.calibration_data)
    if not others:
        parser.error(f"--data: all of its {len(records)} records are measured; set --calibration-data or fewer --texts")
    texts, calibration = ([record.text for record in part] for part in (records[: given.texts], others))
    found = run(given.model, texts, calibration[: given.calibration], given.tokens, given.rounds)
    print(json.dumps({"benchmark": "codec", **found}))


if __name__ == "__main__":
    main()
