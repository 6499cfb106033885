"""Tests of the curriculum of latent steps, against loops over samples, passes and tokens in fp64.

The loops read each sample alone, without padding, mask or cache, and read the whole sequence again for every state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch.nn.functional import smooth_l1_loss

from data.collate import Collator
from data.reasoning_steps import StepBlocks
from data.records import Record
from kvcore.config import parse
from kvcore.errors import FieldError
from kvcore.types import BatchKV, Tensor
from student_trainer.config import RunConfig, TrainConfig
from student_trainer.loop.calibrate import calibrate
from student_trainer.loop.curriculum import Curriculum, curriculum_of
from student_trainer.loop.sample_order import SampleOrder
from student_trainer.model.capture import capture_kv
from student_trainer.model.distill_model import DistillModel, TrainBatch
from student_trainer.model.latent import LatentStudent, new_reasoning
from tests.support.tiny_models import build_model, tiny_spec
from tests.support.training_parts import RECORDS, TOKENIZER, aligner_of, fetch_for, one_rank, teacher_kv, train_config

Kind = Literal["lines", "equations"]
LATENTS, PER_STEP, PASSES = 6, 2, 3
STAGES = LATENTS // PER_STEP
WEIGHTS = {"step_ce_weight": 0.5, "reasoning_ce_weight": 0.4, "codi_weight": 0.7, "kv_weight": 5.0}
# Prompt, reasoning, answer; then by hand: the steps of the blocks, and what is text in stages 1, 2 and 3.
CASES: dict[Kind, list[tuple[tuple[str, str, str], list[str], list[str]]]] = {
    "lines": [
        (
            ("Add 1 and 2.", " 1+2=3\n3\n\n4*4=16\n7", " 3"),
            [" 1+2=3", "3", "4*4=16"],
            ["3\n\n4*4=16\n7", "4*4=16\n7", ""],
        ),
        (("A longer question: add 4 and 5.", "\n 4+5=9\n", " 999"), [" 4+5=9"], ["", "", ""]),
        (("Without steps.", "", " 1"), [], ["", "", ""]),
        (
            ("Two steps?", " 7-2=5 \n  5*3=15\n####", " 15"),
            [" 7-2=5", "  5*3=15"],
            ["  5*3=15\n####", "", ""],
        ),
    ],
    "equations": [
        (
            (
                "Clips?",
                " Half of 48 is <<48/2=24>>24.\nTogether <<48+24=72>>72.\nThen <<72-2=70>>70, and <<70*1=70>>70.",
                " 70",
            ),
            ["48/2=24", "48+24=72", "72-2=70"],
            [
                "<<48+24=72>>72.\nThen <<72-2=70>>70, and <<70*1=70>>70.",
                "<<72-2=70>>70, and <<70*1=70>>70.",
                "",
            ],
        ),
        (("A longer question: add 4 and 5.", "<<4+5=9>>", " 9"), ["4+5=9"], ["", "", ""]),
        (("Without an equation.", " No.", " 1"), [], ["", "", ""]),
        (("Two?", "<<7-2=5>> <<5*3=15>>", " 15"), ["7-2=5", "5*3=15"], ["<<5*3=15>>", "", ""]),
    ],
}


def records_of(kind: Kind) -> list[Record]:
    return [Record(str(number), *texts) for number, (texts, _, _) in enumerate(CASES[kind])]


def student_of(latents: int = LATENTS, passes: int = PASSES) -> LatentStudent:
    lm = build_model(tiny_spec("qwen3", layers=2, kv_heads=1, seed=3)).double()
    return LatentStudent(lm, new_reasoning(lm, latents, passes, seed=0).double())


def config_of(kind: Kind = "lines", teachers: Sequence[str] = (), **loss: Any) -> TrainConfig:
    return train_config(
        teachers=teachers,
        student={"latents": LATENTS, "latents_per_step": PER_STEP, "passes": PASSES},
        kv={"selection": {"selector": "right", "budget": LATENTS}},
        data={"steps": kind},
        loss={"step_ce_weight": 0.5, **loss},
        run={"curriculum_epochs": 1.0},
    )


def collator(kind: Kind = "lines") -> Collator:
    return Collator(TOKENIZER, 512, step_blocks=StepBlocks(kind, LATENTS, PER_STEP))


def model_of(kind: Kind = "lines", **loss: Any) -> DistillModel:
    return DistillModel(student_of(), [], {}, config_of(kind, **loss)).train()


def model_with_teacher(**loss: Any) -> DistillModel:
    """With one teacher, whose alignment is fitted on records that the tests do not use."""
    model = DistillModel(student_of(), [aligner_of("ada")], {"ada": 1.0}, config_of("lines", ["ada"], **loss))
    with one_rank():
        calibrate(model, RECORDS[:40], range(40), fetch_for(model, LATENTS), 40, lambda _: None)
    return model.train()


def batch_with_teacher(stage: int | None) -> TrainBatch:
    """The teacher has K/V for 6, 5, 0 and 3 slots; what the other slots hold is NaN."""
    kv = teacher_kv("ada", records_of("lines"), LATENTS, len(aligner_of("ada").layers_needed))
    for row, slots in enumerate((LATENTS, 5, 0, 3)):
        kv.mask_BM[row] &= torch.arange(LATENTS) < slots
    empty = ~kv.mask_BM[:, None, None, :, None]
    return TrainBatch(
        collator()(records_of("lines"), stage), (kv.map(lambda x_BLHMD: x_BLHMD.masked_fill(empty, math.nan)),)
    )


# ------------------------------------------------------------------------------------------------------ the reference


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


def embedded(student: LatentStudent, ids: Sequence[int]) -> list[Tensor]:
    table: Any = student.lm.get_input_embeddings()
    return [table.weight[token] for token in ids]


def states(student: LatentStudent, inputs: list[Tensor]) -> Tensor:
    """The last layer's state [T,E] of each input of one sequence."""
    return student.lm.base_model(inputs_embeds=torch.stack(inputs)[None], use_cache=False).last_hidden_state[0]


def surprise(student: LatentStudent, state_E: Tensor, token: int) -> Tensor:
    logits_V = student.lm.lm_head(state_E)
    return torch.logsumexp(logits_V, 0) - logits_V[token]


def latents_by_pass(student: LatentStudent, prompt: list[int], count: int) -> list[list[Tensor]]:
    """The inputs of the first `count` latents after each pass."""
    latents = [student.reasoning.first_inputs.weight[place] for place in range(count)]
    found: list[list[Tensor]] = []
    for _ in range(student.reasoning.passes):
        before = embedded(student, prompt)
        latents = [
            student.reasoning.projection(states(student, before + latents)[len(prompt) + place - 1])
            for place in range(count)
        ]
        found.append(latents)
    return found


def mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean() if values else torch.zeros((), dtype=torch.float64)


def by_loops(student: LatentStudent, kind: Kind, stage: int) -> dict[str, float]:
    """The losses of the cases in one stage: means over samples of means over a sample's tokens."""
    found: dict[str, list[Tensor]] = {"answer_ce": [], "rest_ce": [], "last": [], "all": []}
    for (prompt, _, answer), steps, rests in CASES[kind]:
        prompt_ids, rest_ids = TOKENIZER(prompt).input_ids, ids_of(rests[stage - 1])
        answer_ids = [*ids_of(answer), TOKENIZER.eos_token_id]
        after_pass = latents_by_pass(student, prompt_ids, stage * PER_STEP)
        read = embedded(student, prompt_ids) + after_pass[-1]
        text: list[Tensor] = []
        for place, token in enumerate(rest_ids + answer_ids):
            sequence = read + embedded(student, (rest_ids + answer_ids)[:place])
            text.append(surprise(student, states(student, sequence)[-1], token))
        found["rest_ce"].append(mean(text[: len(rest_ids)]))
        found["answer_ce"].append(mean(text[len(rest_ids) :]))
        by_pass: list[Tensor] = []
        for latents in after_pass:
            of_steps: list[Tensor] = []
            for block, step in enumerate(steps[:stage]):
                for place, token in enumerate(ids_of(step)[:PER_STEP]):
                    sequence = embedded(student, prompt_ids) + latents[: block * PER_STEP + place]
                    of_steps.append(surprise(student, states(student, sequence)[-1], token))
            by_pass.append(mean(of_steps))
        found["last"].append(by_pass[-1])
        found["all"].append(mean(by_pass))
    return {name: float(mean(values).detach()) for name, values in found.items()}


# ---------------------------------------------------------------------------------------------------------- the losses


def losses_of(model: DistillModel, batch: TrainBatch) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in model(batch).items() if value.dim() == 0}


@pytest.mark.parametrize("passes", ["last", "all"])
@pytest.mark.parametrize("stage", range(1, STAGES + 1))
@pytest.mark.parametrize("kind", ["lines", "equations"])
def test_losses_of_each_stage_equal_the_loops(kind: Kind, stage: int, passes: str) -> None:
    model = model_of(kind, step_ce_passes=passes, reasoning_ce_weight=0.0)
    found = losses_of(model, TrainBatch(collator(kind)(records_of(kind), stage), ()))
    expected = by_loops(model.student, kind, stage)
    # Qwen3 normalises in fp32.
    for name, reference in (("answer_ce", "answer_ce"), ("rest_ce", "rest_ce"), ("step_ce", passes)):
        assert found[name] == pytest.approx(expected[reference], rel=1e-6, abs=1e-12), name
    assert found["ce_loss"] == pytest.approx(found["answer_ce"] + found["rest_ce"], rel=1e-12)
    assert found["loss"] == pytest.approx(found["ce_loss"] + 0.5 * found["step_ce"], rel=1e-12)
    assert (found["rest_ce"] > 0) == (stage < STAGES)
    # The first pass settles the first latent, and the state before the second latent reads no other.
    assert (abs(expected["all"] / expected["last"] - 1) > 1e-3) == (stage > 1), "the passes differ"


def test_gradients_of_a_stage_reach_latents_and_text() -> None:
    model = model_of(reasoning_ce_weight=0.0)
    losses = model(TrainBatch(collator()(records_of("lines"), 2), ()))
    projection: Any = model.student.reasoning.projection
    table: Any = model.student.lm.get_input_embeddings()
    parameters: list[Any] = [projection[0].weight, table.weight]
    for name in ("answer_ce", "rest_ce", "step_ce"):
        assert all(one.norm() > 0 for one in torch.autograd.grad(losses[name], parameters, retain_graph=True))
    (of_inputs,) = torch.autograd.grad(losses["loss"], [model.student.reasoning.first_inputs.weight])
    assert of_inputs[: 2 * PER_STEP].norm() > 0
    assert of_inputs[2 * PER_STEP :].norm() == 0, "latents of later stages take no part"


def test_last_stage_equals_training_without_a_curriculum() -> None:
    model, records = model_of(codi_weight=0.7), records_of("lines")
    with_curriculum, without = (TrainBatch(collator()(records, stage), ()) for stage in (STAGES, None))
    assert losses_of(model, with_curriculum) == losses_of(model, without)


def test_evaluation_has_no_loss_of_remaining_steps() -> None:
    model = model_of().eval()
    found = losses_of(model, TrainBatch(collator()(records_of("lines")), ()))
    expected = by_loops(model.student, "lines", STAGES)
    assert "rest_ce" not in found
    assert found["ce_loss"] == pytest.approx(expected["answer_ce"], rel=1e-6)
    assert found["step_ce"] == pytest.approx(expected["last"], rel=1e-6)


def kv_by_loops(model: DistillModel, kv: BatchKV, stage: int) -> float:
    """Smooth L1 between latent i and slot i of the teacher, both in units of the layer's deviation."""
    (aligner,), count = model.aligners, stage * PER_STEP
    samples: list[Tensor] = []
    targets = aligner.targets(kv)
    for row, record in enumerate(records_of("lines")):
        prompt = TOKENIZER(record.prompt).input_ids
        read = embedded(model.student, prompt) + latents_by_pass(model.student, prompt, count)[-1]
        with capture_kv(model.student.lm) as capture:
            states(model.student, read)
        own = capture.columns(len(prompt), len(prompt) + count)
        slots = [slot for slot in range(count) if kv.mask_BM[row, slot]]
        parts: list[Tensor] = []
        for x_BLHMD, target_BLHMD, scale_L in zip(own, targets, aligner.scale_LK.T, strict=True):
            parts += [
                smooth_l1_loss(
                    x_BLHMD[0, layer, :, slot] / scale_L[layer], target_BLHMD[row, layer, :, slot] / scale_L[layer]
                )
                for layer in range(len(scale_L))
                for slot in slots
            ]
        samples += [mean(parts)] if parts else []
    return float(mean(samples).detach())


@pytest.mark.parametrize("stage", range(1, STAGES + 1))
def test_kv_loss_compares_only_the_latents_of_a_stage(stage: int) -> None:
    model, batch = model_with_teacher(kv_weight=5.0), batch_with_teacher(stage)
    assert losses_of(model, batch)["kv_objective"] == pytest.approx(
        kv_by_loops(model, batch.teachers[0], stage), rel=1e-5
    )


def codi_by_loops(student: LatentStudent, stage: int) -> float:
    """CODI's loss at the last position before the answer: after latents and remaining steps, and after all as text."""
    ours, theirs = list[Tensor](), list[Tensor]()
    for (prompt, reasoning, _), _, rests in CASES["lines"]:
        prompt_ids = TOKENIZER(prompt).input_ids
        latents = latents_by_pass(student, prompt_ids, stage * PER_STEP)[-1]
        start = embedded(student, prompt_ids)
        for inputs, found in (
            (start + latents + embedded(student, ids_of(rests[stage - 1])), ours),
            (start + embedded(student, ids_of(reasoning)), theirs),
        ):
            output = student.lm.base_model(inputs_embeds=torch.stack(inputs)[None], output_hidden_states=True)
            found.append(torch.stack([layer[0, -1] for layer in output.hidden_states[1:]]))
    layers = zip(torch.stack(ours, dim=1), torch.stack(theirs, dim=1), strict=True)
    return float(mean([smooth_l1_loss(mine, other) / other.std() for mine, other in layers]).detach())


@pytest.mark.parametrize("stage", [1, 2])
def test_all_losses_of_a_stage_add_up_with_their_weights(stage: int) -> None:
    model = model_with_teacher(**WEIGHTS)
    found = losses_of(model, batch_with_teacher(stage))
    assert found["codi_loss"] == pytest.approx(codi_by_loops(model.student, stage), rel=1e-5)
    expected = by_loops(model.student, "lines", stage)
    for name, reference in (("answer_ce", "answer_ce"), ("rest_ce", "rest_ce"), ("step_ce", "last")):
        assert found[name] == pytest.approx(expected[reference], rel=1e-6), name
    parts = {
        "answer_ce": 1.0,
        "rest_ce": 1.0,
        "reasoning_ce": WEIGHTS["reasoning_ce_weight"],
        "step_ce": WEIGHTS["step_ce_weight"],
        "codi_loss": WEIGHTS["codi_weight"],
        "kv_objective": WEIGHTS["kv_weight"],
    }
    assert found.keys() == {*parts, "ce_loss", "kv_loss", "loss"}
    assert all(found[name] > 0 for name in parts)
    assert found["loss"] == pytest.approx(sum(weight * found[name] for name, weight in parts.items()), rel=1e-6)


def test_losses_with_resampled_slots_compare_the_first_latents() -> None:
    """`align.time` spreads the teacher's slots over all latents; a stage has the first of them."""
    config = config_of("lines", ["ada"])
    tree = config.model_dump(mode="json") | {"align": {"time": "linear", "direction": "to_student"}}
    model = DistillModel(student_of(), [aligner_of("ada")], {"ada": 1.0}, parse(tree, TrainConfig)).train()
    whole = DistillModel(model.student, model.aligners, {"ada": 1.0}, config).train()
    with one_rank():
        calibrate(whole, RECORDS[:40], range(40), fetch_for(whole, LATENTS), 40, lambda _: None)
    model.load_frozen(whole.frozen_state())
    batch = batch_with_teacher(2)
    (kv,) = batch.teachers
    resampled = replace(kv.map(torch.zeros_like), mask_BM=kv.mask_BM.clone())
    for row in range(len(kv.mask_BM)):
        count = int(kv.mask_BM[row].sum())
        resampled.mask_BM[row] = count > 0
        for latent in range(LATENTS if count else 0):
            place = latent * (count - 1) / (LATENTS - 1)
            low, share = min(int(place), count - 1), place - int(place)
            for x_BLHMD, out_BLHMD in ((kv.k_BLHMD, resampled.k_BLHMD), (kv.v_BLHMD, resampled.v_BLHMD)):
                high_LHD = x_BLHMD[row, :, :, min(low + 1, count - 1)]
                out_BLHMD[row, :, :, latent] = (1 - share) * x_BLHMD[row, :, :, low] + share * high_LHD
    assert losses_of(model, batch)["kv_objective"] == pytest.approx(
        losses_of(whole, replace(batch, teachers=(resampled,)))["kv_objective"], rel=1e-4
    )


@pytest.mark.parametrize(("latents", "passes"), [(256, 8), (1, 8)])
@torch.no_grad()
def test_many_latents_and_passes_equal_the_loops(latents: int, passes: int) -> None:
    student = student_of(latents, passes)
    prompt = TOKENIZER("Add 1 and 2.").input_ids
    ids_1P = torch.tensor([prompt])
    thought = student.think(student.read_prompt(ids_1P, torch.ones_like(ids_1P).bool()))
    inputs = [student.reasoning.first_inputs.weight[place] for place in range(latents)]
    for _ in range(passes):
        hidden_TE = states(student, embedded(student, prompt) + inputs)
        inputs = [student.reasoning.projection(hidden_TE[len(prompt) + place - 1]) for place in range(latents)]
    torch.testing.assert_close(thought.latents_BME[0], torch.stack(inputs), rtol=1e-5, atol=1e-5)
    assert len(thought.earlier_BME) == passes - 1


# ------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("kind", ["lines", "equations"])
@pytest.mark.parametrize("stage", range(1, STAGES + 1))
def test_remaining_steps_are_between_latents_and_answer(kind: Kind, stage: int) -> None:
    batch = collator(kind)(records_of(kind), stage)
    for row, ((_, _, answer), steps, rests) in enumerate(CASES[kind]):
        following = [*ids_of(rests[stage - 1]), *ids_of(answer), TOKENIZER.eos_token_id]
        assert batch.following_ids_BF[row][batch.following_mask_BF[row]].tolist() == following
        assert (
            batch.following_mask_BF[row].tolist()
            == (torch.arange(batch.following_mask_BF.shape[1]) < len(following)).tolist()
        )
        blocks = [ids_of(step)[:PER_STEP] for step in steps[:stage]] + [[]] * (stage - len(steps))
        padded = [block + [0] * (PER_STEP - len(block)) for block in blocks]
        assert batch.step_ids_BM[row].tolist() == [token for block in padded for token in block]
        filled = [place < len(block) for block in blocks for place in range(PER_STEP)]
        assert batch.step_mask_BM[row].tolist() == filled


# -------------------------------------------------------------------------------------------------------------- stages


def order_of(count: int = 96, global_batch: int = 8, **run: Any) -> SampleOrder:
    settings = {"output_dir": "none", "global_batch": global_batch, "micro_batch": 1, **run}
    return SampleOrder(parse(settings, RunConfig), count, 0, 1)


def with_run(config: TrainConfig, **run: Any) -> TrainConfig:
    return config.model_copy(update={"run": config.run.model_copy(update=run)})


@pytest.mark.parametrize(
    ("epochs", "global_batch", "per_stage"), [(1.0, 8, 12), (0.5, 8, 6), (1.0, 9, 11), (2.0, 9, 21), (0.001, 8, 1)]
)
def test_stages_last_their_epochs_and_the_last_one_the_rest(epochs: float, global_batch: int, per_stage: int) -> None:
    config = with_run(config_of(), curriculum_epochs=epochs)
    curriculum = curriculum_of(config, order_of(epochs=20, global_batch=global_batch))
    assert curriculum is not None
    assert curriculum == Curriculum(STAGES, per_stage)
    expected = [1] * per_stage + [2] * per_stage + [3] * (per_stage + 5)
    assert [curriculum.stage(step) for step in range(len(expected))] == expected


def test_a_run_without_its_last_stage_is_refused() -> None:
    config = config_of()
    assert curriculum_of(config, order_of(steps=25)) == Curriculum(STAGES, 12)
    with pytest.raises(FieldError, match=r"^run\.curriculum_epochs: 3 stages of 12 steps need more than 24 steps, but"):
        curriculum_of(config, order_of(steps=24))
    assert curriculum_of(with_run(config, curriculum_epochs=None), order_of(steps=1)) is None


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"run": {"curriculum_epochs": 1.0}}, "run.curriculum_epochs: needs student.latents_per_step and"),
        ({"run": {"curriculum_epochs": 0}}, "run.curriculum_epochs: "),
        ({"loss": {"step_ce_passes": "all"}}, "loss.step_ce_passes: 'all' needs student.latents_per_step"),
        (
            {
                "student": {"latents": 6, "latents_per_step": 3, "passes": 1},
                "loss": {"step_ce_weight": 1.0, "step_ce_passes": "all"},
            },
            "loss.step_ce_passes: 'all' is the same as 'last' with student.passes 1",
        ),
        (
            {
                "run": {"curriculum_epochs": 1.0},
                "student": {"latents": 6, "latents_per_step": 6},
                "loss": {"step_ce_weight": 1.0},
            },
            r"run.curriculum_epochs: student.latents \(6\) are one block of student.latents_per_step \(6\)",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(sections: dict[str, Any], problem: str) -> None:
    with pytest.raises(FieldError, match=f"^{problem}"):
        train_config(**sections)
