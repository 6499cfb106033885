"""Tests of the cross-entropy of reasoning steps from the latents, against loops over samples and latents in fp64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.whole_readings import latents_of
from data.collate import Collator, StudentBatch
from data.reasoning_steps import StepBlocks, steps_of
from data.records import Record
from kvcore.errors import FieldError
from student_trainer.loop.data_survey import survey
from student_trainer.model.distill_model import DistillModel, TrainBatch
from student_trainer.model.latent import LatentStudent, new_reasoning
from tests.support.tiny_models import build_model, tiny_spec
from tests.support.training_parts import PASSES, TOKENIZER, one_rank, train_config

LATENTS, PER_STEP = 6, 2
BLOCKS = StepBlocks("lines", LATENTS, PER_STEP)
RECORDS = (
    # More lines than blocks, and lines longer and shorter than a block.
    Record("a", "Add 1 and 2.", " 1+2=3\n3\n\n4*4=16\n7", " 3"),
    Record("b", "A longer question: add 4 and 5.", " 4+5=9", " 9"),
    Record("c", "Without steps.", "", " 1"),
)


def collator(blocks: StepBlocks | None = BLOCKS) -> Collator:
    return Collator(TOKENIZER, 512, step_blocks=blocks)


def model_of(weight: float) -> DistillModel:
    lm = build_model(tiny_spec("qwen3", layers=2, kv_heads=1, seed=3)).double()
    student = LatentStudent(lm, new_reasoning(lm, LATENTS, PASSES, seed=0).double())
    student_settings: dict[str, Any] = {"latents": LATENTS, "latents_per_step": PER_STEP if weight else None}
    config = train_config(student=student_settings, loss={"step_ce_weight": weight})
    model = DistillModel(student, [], {}, config)
    return model.train()


def by_loops(student: LatentStudent, batch: StudentBatch) -> torch.Tensor:
    """Each sample's mean of -log p(token i of step k | what is before latent i of block k); over all samples."""
    total = torch.zeros((), dtype=torch.float64)
    for row, record in enumerate(RECORDS):
        prompt_ids = batch.prompt_ids_BP[row : row + 1, batch.prompt_mask_BP[row]]
        whole = torch.ones_like(prompt_ids, dtype=torch.bool)
        inputs_1TE = latents_of(student, prompt_ids, whole)
        hidden_1TE = student.hidden(inputs_1TE, torch.ones(inputs_1TE.shape[:2], dtype=torch.bool))
        found = []
        for block, line in enumerate([line for line in record.reasoning.split("\n") if line][: LATENTS // PER_STEP]):
            for place, token in enumerate(TOKENIZER(line, add_special_tokens=False).input_ids[:PER_STEP]):
                before = prompt_ids.shape[1] + block * PER_STEP + place - 1
                logits_V = student.lm.lm_head(hidden_1TE[0, before])
                found.append(torch.logsumexp(logits_V, 0) - logits_V[token])
        if found:
            total = total + torch.stack(found).mean()
    return total / len(RECORDS)


def test_each_latent_predicts_its_token_of_its_step() -> None:
    model = model_of(0.5)
    batch = TrainBatch(collator()(RECORDS), ())
    losses = {name: float(value.detach()) for name, value in model(batch).items()}
    # Qwen3 normalises in fp32.
    assert losses["step_ce"] == pytest.approx(float(by_loops(model.student, batch.tokens).detach()), rel=1e-6)
    assert losses["loss"] == pytest.approx(losses["ce_loss"] + 0.5 * losses["step_ce"], rel=1e-9)


def test_gradient_reaches_latents_and_language_model() -> None:
    model = model_of(0.5)
    batch = TrainBatch(collator()(RECORDS), ())
    parameters = [model.student.reasoning.first_inputs.weight, model.student.lm.model.layers[0].self_attn.k_proj.weight]
    found = torch.autograd.grad(model(batch)["step_ce"], parameters)
    expected = torch.autograd.grad(by_loops(model.student, batch.tokens), parameters)
    for one, other in zip(found, expected, strict=True):
        assert float(one.norm()) > 0
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6 * float(other.norm()))


def test_steps_without_weight_are_not_scored() -> None:
    assert "step_ce" not in model_of(0.0)(TrainBatch(collator()(RECORDS), ()))


def test_targets_fill_each_block_from_its_start() -> None:
    batch = collator()(RECORDS)
    ids = [TOKENIZER(line, add_special_tokens=False).input_ids for line in (" 1+2=3", "3", "4*4=16")]
    expected = [*ids[0][:2], ids[1][0], 0, *ids[2][:2]]
    assert batch.step_ids_BM[0].tolist() == expected
    assert batch.step_mask_BM.int().tolist() == [[1, 1, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0], [0] * 6]
    assert collator(None)(RECORDS).step_ids_BM.shape == (3, 0)


def test_equations_are_found_between_their_brackets() -> None:
    text = " Half of 48 is <<48/2=24>>24.\nTogether <<48+24=72>>72 clips << x"
    assert steps_of(text, "equations") == ["48/2=24", "48+24=72"]
    assert steps_of(text, "lines") == [" Half of 48 is <<48/2=24>>24.", "Together <<48+24=72>>72 clips << x"]
    assert steps_of("", "lines") == steps_of("no equation", "equations") == []


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"loss": {"step_ce_weight": 0.05}}, "loss.step_ce_weight: needs student.latents_per_step"),
        ({"student": {"latents_per_step": 3}}, "student.latents_per_step: needs loss.step_ce_weight above 0"),
        ({"student": {"latents_per_step": 2}, "loss": {"step_ce_weight": 1}}, "2 does not divide student.latents"),
        (
            {"student": {"latents_per_step": 3, "mode": "token"}, "loss": {"step_ce_weight": 1}},
            "student.latents_per_step: needs student.mode 'latent'",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(sections: dict[str, Any], problem: str) -> None:
    with pytest.raises(FieldError, match=problem):
        train_config(**sections)


def test_what_the_blocks_leave_out_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    config = train_config(student={"latents": LATENTS, "latents_per_step": PER_STEP}, loss={"step_ce_weight": 0.05})
    lengths = [len(TOKENIZER(line, add_special_tokens=False).input_ids) for line in (" 1+2=3", "3", "4*4=16", " 4+5=9")]
    cut = sum(length > PER_STEP for length in lengths)
    with one_rank():
        survey(config, collator(), RECORDS, [])
        assert (
            "1 of the first 3 training samples have more steps than the 3 blocks of latents (at most 4)" in caplog.text
        )
        assert f"{100 * cut / 4:.1f} % of their steps have more than student.latents_per_step (2) tokens" in caplog.text
        assert f"(at most {max(lengths)})" in caplog.text
        caplog.clear()
        fitting = [replace(record, reasoning=" 3") for record in RECORDS]
        survey(config, collator(), fitting, [])
        assert "steps" not in caplog.text
        equations = config.model_copy(update={"data": config.data.model_copy(update={"steps": "equations"})})
        with pytest.raises(FieldError, match=r"^data\.steps: none of the first 3 training samples has equations"):
            survey(equations, collator(), RECORDS, [])


def test_reference_differs_between_latents() -> None:
    """The loops would not see a latent that reads another one's state if all states were alike."""
    model = model_of(0.5)
    tokens = collator()(RECORDS)
    rolled = {name: getattr(tokens, name).roll(1, dims=1) for name in ("step_ids_BM", "step_mask_BM")}
    shifted = replace(tokens, **rolled)
    found, other = (float(model(TrainBatch(each, ()))["step_ce"].detach()) for each in (tokens, shifted))
    assert not math.isclose(found, other, rel_tol=1e-3)
