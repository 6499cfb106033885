"""Parts of the trainer in one process: a tiny student, K/V computed from the text, and a process group of one rank."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from align.aligner import Aligner
from align.head_dim_adapter import KVGeometry
from data.collate import Collator, StudentBatch
from data.records import Record
from data.synthetic import ChainTask, make_splits
from kvcore.config import parse
from kvcore.tensors.offsets import read_text
from kvcore.types import BatchKV, Tensor
from student_trainer.config import LossConfig, TrainConfig
from student_trainer.loop.calibrate import Fetch
from student_trainer.model.distill_model import DistillModel, TrainBatch
from student_trainer.model.latent import LatentStudent, new_reasoning
from tests.support.tiny_models import build_model, build_tokenizer, tiny_spec

LATENTS, PASSES = 3, 2
STUDENT = KVGeometry(2, 1, 16)
TEACHERS = {"ada": KVGeometry(3, 2, 8), "ben": KVGeometry(2, 2, 4)}
TOKENIZER: PreTrainedTokenizerFast = build_tokenizer("qwen2")
RECORDS: tuple[Record, ...] = tuple(make_splits(ChainTask(), 60, 1, 1, seed=0).train)


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """Run the block in a process group of one rank."""
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def collator() -> Collator:
    return Collator(TOKENIZER, 512)


def tiny_student() -> LatentStudent:
    lm = build_model(tiny_spec("qwen3", layers=2, kv_heads=1, seed=3))
    return LatentStudent(lm, new_reasoning(lm, LATENTS, PASSES, seed=0))


def aligner_of(
    teacher: str, direction: str = "to_student", head_adapter: str = "ridge", layer_map: str = "ratio"
) -> Aligner:
    return Aligner(TEACHERS[teacher], STUDENT, direction=direction, head_adapter=head_adapter, layer_map=layer_map)


def train_config(mode: str = "latent", teachers: Sequence[str] = (), **sections: Any) -> TrainConfig:
    """A configuration with paths and endpoints that do not exist; `sections` are merged one level deep."""
    tree: dict[str, Any] = {
        "student": {"path": "tiny", "mode": mode, "latents": LATENTS, "passes": PASSES},
        "kv": {"selection": {"selector": "right", "budget": LATENTS}},
        "data": {"train": "none.jsonl", "val": "none.jsonl"},
        "run": {"output_dir": "none", "steps": 1},
    }
    if teachers:
        tree["teachers"] = [{"name": name, "endpoints": ["127.0.0.1:1"]} for name in teachers]
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
    return parse(tree, TrainConfig)


def distill_model(
    weights: dict[str, float],
    *,
    mode: str = "latent",
    direction: str = "to_student",
    student: LatentStudent | None = None,
    loss: LossConfig | None = None,
    **sections: Any,
) -> DistillModel:
    """A model with one alignment per teacher in `weights`, not calibrated; `sections` as in `train_config`."""
    align = {"direction": direction} | sections.pop("align", {})
    sections |= {"align": align, "loss": (loss or LossConfig()).model_dump()}
    config = train_config(mode, **sections)
    aligners = [aligner_of(name, direction, config.align.head_adapter, config.align.layer_map) for name in weights]
    return DistillModel(student or tiny_student(), aligners, weights, config)


def _generator(seed: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(seed.encode()))


def teacher_kv(
    teacher: str, records: Sequence[Record], slots: int | None = LATENTS, layers: int | None = None
) -> BatchKV:
    """K/V that alignment can partly explain: they depend on the teacher and the last byte, plus noise per text.

    `slots`: the number of last tokens to keep; by default, every token with a known byte end. `layers`: the number of
    layers of the plan; by default, that of the default layer map.
    """
    geometry = TEACHERS[teacher]
    ends_of = [
        [end for end in read_text(TOKENIZER, record.text, add_special_tokens=True)[1] if end > 0] for record in records
    ]
    kept = [ends if slots is None else ends[-slots:] for ends in ends_of]
    width = max(map(len, kept))
    shape = (layers or len(aligner_of(teacher).layers_needed), geometry.heads, width, geometry.head_dim)
    k_BLHMD, v_BLHMD = torch.zeros(len(records), *shape), torch.zeros(len(records), *shape)
    mask_BM, ends_BM = torch.zeros(len(records), width, dtype=torch.bool), torch.full((len(records), width), -1)
    by_last_byte = 2 * torch.randn(2, 256, *shape[:2], shape[3], generator=_generator(teacher)) + 1
    for row, (record, ends) in enumerate(zip(records, kept, strict=True)):
        mask_BM[row, : len(ends)] = True
        ends_BM[row, : len(ends)] = torch.tensor(ends)
        last_bytes = [record.text.encode()[end - 1] for end in ends]
        generator = _generator(f"{teacher}/{record.text}")
        for x, table in zip((k_BLHMD, v_BLHMD), by_last_byte, strict=True):
            known_LHMD = table[last_bytes].permute(1, 2, 0, 3)
            x[row, :, :, : len(ends)] = known_LHMD + 0.3 * torch.randn(known_LHMD.shape, generator=generator)
    return BatchKV(k_BLHMD, v_BLHMD, mask_BM, ends_BM[:, None, None])


def train_batch(model: DistillModel, records: Sequence[Record], slots: int | None = LATENTS) -> TrainBatch:
    """A batch like the trainer's, with K/V of all the model's teachers."""
    asked = {name: len(aligner.layers_needed) for name, aligner in zip(model.weights, model.aligners, strict=True)}
    caches = (teacher_kv(name, records, slots, layers) for name, layers in asked.items())
    return TrainBatch(collator()(records), tuple(caches))


def fetch_for(model: DistillModel, slots: int | None = LATENTS) -> Fetch:
    """Fetches batches like `train_batch`, for calibration and validation."""
    return lambda batches: (train_batch(model, records, slots) for records in batches)


def text_logits(student: LatentStudent, tokens: StudentBatch) -> Tensor:
    """Logits that predict tokens 1 to T-1 of the texts."""
    return student.logits(student.read_text(tokens.text_ids_BT, tokens.text_mask_BT).hidden_BTE[:, :-1])
