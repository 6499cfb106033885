"""Tests of a student that is its own teacher in the stages of a curriculum, against loops over slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import smooth_l1_loss

from data.collate import Collator
from data.reasoning_steps import StepBlocks
from data.records import Record
from kvcore.types import Tensor
from student_trainer.model.distill_model import DistillModel, TrainBatch
from student_trainer.model.latent import LatentStudent, new_reasoning
from tests.support.tiny_models import build_model, tiny_spec
from tests.support.training_parts import TOKENIZER, train_config

LATENTS, PER_STEP, PASSES, LAYERS = 6, 2, 2, 2
RECORDS = (
    Record("long", "Start at 3.", " 3 + 4 = 7\n7 x 2 = 14\n14 - 5 = 9\n9 + 1 = 10\n####", " 10"),
    Record("short", "What is 2 + 3?", " 5", " 5"),
    Record("middle", "Add.", " 1 + 5 = 6\n6 x 2\n####", " 12"),
)


def model_of(control: str, *, projection: bool = True) -> DistillModel:
    lm = build_model(tiny_spec("qwen3", layers=LAYERS, kv_heads=2, seed=3))
    config = train_config(
        self_teacher=True,
        student={"latents": LATENTS, "latents_per_step": PER_STEP, "passes": PASSES, "projection": projection},
        kv={"selection": {"selector": "r_kv", "scope": "head", "budget": LATENTS}, "control": control},
        loss={"step_ce_weight": 0.5, "kv_scale": "none"},
        run={"curriculum_epochs": 1.0},
    )
    model = DistillModel(
        LatentStudent(lm, new_reasoning(lm, LATENTS, PASSES, seed=0, projects=projection)), [], {}, config
    )
    model.freeze(torch.full((LAYERS, 2), 0.5), torch.full((LAYERS, 2), 0.7))
    return model.train()


def objective_by_loops(model: DistillModel, batch: TrainBatch, stage: int) -> float:
    """Between latent i of a stage and slot i of the target that all latents have."""
    tokens, count = batch.tokens, stage * PER_STEP
    *targets, mask_BM = model.own_target(batch)
    thought = model.student.think(model.student.read_prompt(tokens.prompt_ids_BP, tokens.prompt_mask_BP), count)
    read = model.student.read_answer(thought, tokens.answer_ids_BA, tokens.answer_mask_BA)
    samples: list[Tensor] = []
    for row in range(len(RECORDS)):
        slots = [slot for slot in range(count) if mask_BM[row, slot]]
        pairs: list[tuple[Tensor, Tensor]] = list(zip((read.k_BLHMD, read.v_BLHMD), targets, strict=True))
        samples.append(
            torch.stack([smooth_l1_loss(a[row, :, :, at], b[row, :, :, at]) for a, b in pairs for at in slots]).mean()
        )
    return float(torch.stack(samples).mean().detach())


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("control", "projection"), [("none", True), ("none", False), ("shuffled", True)])
def test_latents_of_a_stage_keep_the_slots_of_the_last_stage(control: str, projection: bool, stage: int) -> None:
    model = model_of(control, projection=projection)
    collator = Collator(TOKENIZER, 512, step_blocks=StepBlocks("lines", LATENTS, PER_STEP))
    batch = TrainBatch(collator(RECORDS, stage), ())
    losses: dict[str, Any] = model(batch)
    assert float(losses["kv_objective"].detach()) == pytest.approx(objective_by_loops(model, batch, stage), rel=1e-5)
    losses["kv_objective"].backward()
    gradient_ME = model.student.reasoning.first_inputs.weight.grad
    assert gradient_ME is not None
    reached = gradient_ME.norm(dim=1) > 0
    # With as many passes as latents, the latents depend on the prompt alone.
    assert bool(reached.any()) == (stage * PER_STEP > PASSES)
    assert not reached[stage * PER_STEP :].any(), "latents of later stages take no part"


def test_text_that_trains_the_reasoning_is_whole_in_every_stage() -> None:
    model = model_of("none")
    collator = Collator(TOKENIZER, 512, step_blocks=StepBlocks("lines", LATENTS, PER_STEP))
    first, last = (model(TrainBatch(collator(RECORDS, stage), ())) for stage in (1, 3))
    assert float(first["reasoning_ce"].detach()) == pytest.approx(float(last["reasoning_ce"].detach()), rel=1e-6)
    for mine, other in zip(*(model.own_target(TrainBatch(collator(RECORDS, at), ())) for at in (1, 3)), strict=True):
        torch.testing.assert_close(mine, other)
