"""Tests of alignment end to end, from the teacher's K/V to the student's: within one model, and across families."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from align.aligner import Aligner
from align.calibration import Calibration, LayerCalibration, StudentRead
from align.head_dim_adapter import KVGeometry
from align.token_layout import at_student_tokens, at_teacher_slots
from data.collate import Collator
from data.records import Record, epoch_order
from data.synthetic import ChainTask, make_splits
from experiments.demo.demo_config import ModelName
from experiments.demo.make_models import make_model
from experiments.demo.tokenizers import build_tokenizer
from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.tensors.codec import decode_batch
from kvcore.tensors.projections import kv_projections
from kvcore.types import TENSORS, BatchKV, EncodedSampleKV
from student_trainer.model.capture import capture_kv
from student_trainer.monitoring.alignment_report import AlignmentReport
from teacher_server.config import ServeConfig
from teacher_server.engines import load_engine
from teacher_server.engines.base import LayerResult, PlannedSample, SampleFailure, TeacherEngine
from tests.support.tiny_models import Family, save_tiny_model, tiny_spec

pytestmark = [pytest.mark.slow, pytest.mark.nightly]


def chains() -> tuple[Record, ...]:
    """Chain arithmetic of several lengths. With a single length, a token's position nearly determines its content, and
    shuffled samples explain nearly as much variance as true pairs."""
    records = [
        record
        for operations in range(2, 8)
        for record in make_splits(ChainTask(operations=operations), 512, 1, 1, seed=0).train
    ]
    return tuple(records[place] for place in epoch_order(len(records), seed=0, epoch=0))


RECORDS = chains()
EVERYTHING, EXACT = Selection(selector="full", span="all"), CodecSpec(name="raw")
STEPS, BATCH = 150, 32


@dataclass(frozen=True)
class Model:
    """A model that can be read as a student and served as a teacher."""

    lm: PreTrainedModel
    collator: Collator
    engine: TeacherEngine

    @property
    def geometry(self) -> KVGeometry:
        info = self.engine.info
        return KVGeometry(info.layers, info.kv_heads, info.head_dim)

    @torch.no_grad()
    def read(self, records: Sequence[Record]) -> StudentRead:
        """Read the records as a student: the content K/V, and the byte ends of the tokens."""
        tokens = self.collator(records)
        with capture_kv(self.lm) as capture:
            self.lm(input_ids=tokens.text_ids_BT, attention_mask=tokens.text_mask_BT.long(), use_cache=False)
        return StudentRead(*capture.columns(0, tokens.text_ids_BT.shape[1]), tokens.text_byte_ends_BT)

    def serve(self, records: Sequence[Record], plan: KVPlan) -> BatchKV:
        """Serve the records as a teacher: run the plan and decode the result."""
        return decode_batch([_served(self.engine, record, plan) for record in records])


def _served(engine: TeacherEngine, record: Record, plan: KVPlan) -> EncodedSampleKV:
    tokens = engine.tokenize(record.sample())
    results: list[LayerResult] = []
    failures: list[SampleFailure] = []
    engine.run([PlannedSample(tokens, plan)], results.append, failures.append, lambda _row: True)
    assert not failures
    assert [result.layer for result in results] == list(plan.layers)
    return EncodedSampleKV(
        sample_id=record.id,
        key="",
        layers=plan.layers,
        codec=plan.codec,
        parts={name: torch.stack([result.parts[name][0] for result in results]) for name in results[0].parts},
        positions=results[0].positions,
        token_ids_T=torch.tensor(tokens.token_ids, dtype=torch.int32),
        byte_ends_T=torch.tensor(tokens.byte_ends, dtype=torch.int32),
        relative_error={},
    )


def loaded(directory: Path) -> Model:
    lm = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    engine = load_engine(ServeConfig(model=str(directory), device="cpu", dtype="fp32"))
    return Model(lm, Collator(AutoTokenizer.from_pretrained(directory), 512), engine)


def trained(name: ModelName, directory: Path) -> tuple[Model, list[float]]:
    """A model trained from scratch to generate the reasoning and the answer, and its losses."""
    tokenizer = build_tokenizer(name, RECORDS)
    make_model(name, tokenizer, directory)
    lm, collator = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), Collator(tokenizer, 64)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3)
    losses: list[float] = []
    for step in range(STEPS):
        tokens = collator(RECORDS[step * BATCH % len(RECORDS) :][:BATCH])
        logits = lm(input_ids=tokens.text_ids_BT, attention_mask=tokens.text_mask_BT.long(), use_cache=False).logits
        wanted = tokens.text_ids_BT.masked_fill(~tokens.text_mask_BT, -100)[:, 1:]
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    lm.save_pretrained(directory)
    return loaded(directory), losses


def calibrated(teacher: Model, student: Model, samples: int, **settings: Any) -> tuple[Aligner, KVPlan]:
    """An aligner that is fitted on the first `samples` records, in batches."""
    aligner = Aligner(teacher.geometry, student.geometry, **settings)
    plan = KVPlan(layers=aligner.layers_needed, selection=EVERYTHING, codec=EXACT)
    batches = [RECORDS[start : start + BATCH] for start in range(0, samples, BATCH)]
    passes = [LayerCalibration] if aligner.needs_layer_pass else []
    for kind in (*passes, Calibration):
        calibration = kind(aligner)
        for number, chosen in enumerate(batches):
            sample_B = torch.arange(len(chosen)) + number * BATCH
            calibration.update(teacher.serve(chosen, plan), sample_B, student.read(chosen))
        calibration.finish()
    return aligner, plan


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """A Llama teacher and a Qwen2 student that differ in tokenizer, depth, heads, head dimension and rope theta."""
    models: list[Model] = []
    names: tuple[ModelName, ...] = ("teacher_b", "student")
    for name in names:
        model, losses = trained(name, tmp_path_factory.mktemp(name))
        assert sum(losses[-10:]) < 0.5 * sum(losses[:10]), f"{name} has learnt nothing"
        models.append(model)
    teacher, student = models
    assert teacher.lm.config.model_type == "llama"
    assert student.lm.config.model_type == "qwen2"
    for of in (
        lambda model: model.geometry.layers,
        lambda model: model.geometry.heads,
        lambda model: model.geometry.head_dim,
        lambda model: model.lm.config.rope_parameters["rope_theta"],
        lambda model: model.engine.info.tokenizer_fingerprint,
    ):
        assert of(teacher) != of(student)
    return teacher, student


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("adapter", ["identity", "ridge", "procrustes", "pool"])
def test_alignment_is_the_identity_when_teacher_and_student_are_the_same_model(
    family: Family, adapter: str, tmp_path: Path
) -> None:
    """The tolerance is the precision of the fit: the weakest ridge penalty, 1e-6, affects features that hardly vary."""
    model = loaded(save_tiny_model(tmp_path, tiny_spec(family)))
    assert len(kv_projections(model.lm)) == model.geometry.layers
    aligner, plan = calibrated(model, model, 96, head_adapter=adapter)
    assert plan.layers == tuple(range(model.geometry.layers))
    assert aligner.report()["layer_map"] == {str(layer): [[layer, 1.0]] for layer in plan.layers}
    chosen = RECORDS[200:216]
    kv, own = model.serve(chosen, plan), model.read(chosen)
    laid_out = at_student_tokens(kv, own.byte_ends_BT)
    assert torch.equal(laid_out.mask_BM, own.byte_ends_BT >= 0)
    rows, tokens = laid_out.mask_BM.nonzero(as_tuple=True)
    for tensor, target, mine in zip(TENSORS, aligner.targets(laid_out), (own.k_BLHTD, own.v_BLHTD), strict=True):
        miss = (target - aligner.student_view(mine, tensor))[rows, :, :, tokens].abs()
        assert float(miss.max()) < (1e-3 if adapter == "ridge" else 1e-5)
        if adapter != "identity":
            assert min(aligner.adapter.explained_variance(tensor)) > 0.999999
    for theirs, mine in ((kv.k_BLHMD, own.k_BLHTD), (kv.v_BLHMD, own.v_BLHTD)):
        assert theirs is not None
        at_slots, mask_BLHM = at_teacher_slots(mine, own.byte_ends_BT, kv)
        assert torch.equal(mask_BLHM[:, 0, 0], kv.byte_ends_BLHM[:, 0, 0] >= 0)
        torch.testing.assert_close(at_slots[mask_BLHM], theirs[mask_BLHM], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"direction": "to_teacher"}, {"layer_map": "cka"}, {"tokens": "overlap"}],
    ids=["ratio", "to_teacher", "cka", "overlap"],
)
def test_alignment_across_families_explains_more_variance_than_shuffled_samples(
    families: tuple[Model, Model], settings: dict[str, Any], tmp_path: Path
) -> None:
    teacher, student = families
    aligner, _ = calibrated(teacher, student, 320, **settings)
    AlignmentReport({"llama": aligner.report()}).write(tmp_path)
    report = json.loads((tmp_path / "alignment.json").read_text(encoding="utf-8"))["teachers"]["llama"]
    page = (tmp_path / "alignment.html").read_text(encoding="utf-8")
    assert 'alt="llama: explained variance by layer"' in page
    for tensor in TENSORS:
        true, control = report["explained_variance"][tensor], report["explained_variance_shuffled"][tensor]
        for layer in range(student.geometry.layers):
            assert true[layer] > control[layer] + 0.2
            assert f"<td>{true[layer]:.3f}</td><td>{control[layer]:.3f}</td>" in page
    coverage = report["coverage"]["student_tokens"]
    assert 0.5 < coverage["paired"] / coverage["seen"] <= 1.0
