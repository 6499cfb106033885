"""Tests of routing inside the model: the teachers' weights, the router loss and its gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from align.token_layout import at_student_tokens
from benchmarks.whole_readings import naive_cross_entropy
from fuse.similarity import Metric, teacher_similarity
from kvcore.types import TENSORS, BatchKV, Tensor
from student_trainer.config import LossConfig
from student_trainer.loop.calibrate import calibrate
from student_trainer.model import distill_model as model_module
from student_trainer.model import teacher_weights as fusion
from student_trainer.model.distill_model import DistillModel, TrainBatch
from student_trainer.model.losses import codi_loss
from student_trainer.model.router_loss import router_loss
from tests.support.training_parts import LATENTS, RECORDS, distill_model, fetch_for, one_rank, text_logits, train_batch

# The last record has a longer answer, so that the texts of the others are padded.
BATCH = (*RECORDS[40:43], replace(RECORDS[43], answer=RECORDS[43].answer + " or thereabouts"))
BOTH = {"ada": 1.0, "ben": 1.0}
KV_ALONE = LossConfig(reasoning_ce_weight=0.0, kv_weight=1.0)
SIMILARITY = {"kind": "similarity", "warmup_ratio": 0.0}


def model_of(
    mode: str = "latent", loss: LossConfig = KV_ALONE, weights: dict[str, float] = BOTH, **sections: Any
) -> DistillModel:
    """A model with two teachers, calibrated on records that no test reads."""
    torch.manual_seed(0)
    model = distill_model(weights, mode=mode, loss=loss, **sections)
    with one_rank():
        calibrate(model, RECORDS[:40], range(40), fetch_for(model, None), 40, lambda _: None)
    return model.train()


def noisy(kv: BatchKV, spoilt: str = "kv") -> BatchKV:
    """Returns the cache with strong noise in keys, values or both."""
    generator = torch.Generator().manual_seed(1)
    k, v = (
        x + 20 * (tensor in spoilt) * torch.randn(x.shape, generator=generator)
        for tensor, x in zip(TENSORS, (kv.k_BLHMD, kv.v_BLHMD), strict=True)
    )
    return replace(kv, k_BLHMD=k, v_BLHMD=v)


def weights_of(model: DistillModel, batch: TrainBatch, *teachers: BatchKV) -> list[float]:
    losses = model(TrainBatch(batch.tokens, teachers))
    return [float(losses[f"routing/weights_mean/{name}"].detach()) for name in BOTH]


def randomise_router(model: DistillModel) -> None:
    """A new router gives every teacher the same weight for every input."""
    assert model.fusion is not None
    for parameter in model.fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.2)


def gradients(model: DistillModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("mode", ["latent", "token"])
@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
def test_similarity_gives_more_weight_to_the_teacher_without_noise(mode: str, metric: str) -> None:
    model = model_of(mode, fuse=SIMILARITY | {"metric": metric, "temperature": 0.2})
    batch = train_batch(model, BATCH, LATENTS if mode == "latent" else None)
    ada, ben = batch.teachers
    # The dot product grows with the noise, so it separates the teachers only if both tensors are noisy.
    for spoilt in ("kv",) if metric == "dot" else ("k", "v", "kv"):
        without_ada, without_ben = (
            weights_of(model, batch, *pair) for pair in ((noisy(ada, spoilt), ben), (ada, noisy(ben, spoilt)))
        )
        assert sum(without_ada) == pytest.approx(1.0)
        assert without_ada[1] > without_ben[1]
        assert without_ben[0] > without_ada[0]


@pytest.mark.parametrize("mode", ["latent", "token"])
def test_similarity_compares_standardised_kv_at_tokens_with_equal_ends(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(mode, fuse=SIMILARITY)
    batch = train_batch(model, BATCH, LATENTS if mode == "latent" else None)
    compared: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(own: Tensor, theirs: Tensor, mask: Tensor, metric: Metric) -> Tensor:
        compared.append((own[0], theirs[0], mask[0]))
        return teacher_similarity(own, theirs, mask, metric)

    monkeypatch.setattr(fusion, "teacher_similarity", keep)
    model(batch)
    tokens = batch.tokens
    text = model.student.read_text(tokens.text_ids_BT, tokens.text_mask_BT)
    (aligner, _), (kv, _) = model.aligners, batch.teachers
    for column, own_BLHTD in enumerate((text.k_BLHTD, text.v_BLHTD)):
        own, theirs, mask_BLHM = compared[column]
        deviation_L11 = model.fused_variance_LK[:, column, None, None].float().sqrt()
        for b in range(len(BATCH)):
            own_ends, their_ends = tokens.text_byte_ends_BT[b].tolist(), kv.byte_ends_BLHM[b, 0, 0].tolist()
            text_tokens = [t for t, end in enumerate(own_ends) if end >= 0][1:]
            pairs = [(their_ends.index(own_ends[t]), t) for t in text_tokens if own_ends[t] in their_ends]
            places = [m if mode == "latent" else t for m, t in pairs]
            assert mask_BLHM[b, 0, 0].nonzero().flatten().tolist() == places
            for place, (m, t) in zip(places, pairs, strict=True):
                for found, raw in ((theirs, aligner.targets(kv)[column][b, :, :, m]), (own, own_BLHTD[b, :, :, t])):
                    expected_LHD = (raw - aligner.mean(TENSORS[column])) / deviation_L11
                    torch.testing.assert_close(found[b, :, :, place], expected_LHD, rtol=1e-4, atol=1e-4)


def test_teacher_without_common_tokens_gets_the_lowest_similarity() -> None:
    model = model_of(fuse=SIMILARITY)
    batch = train_batch(model, BATCH)
    ada, ben = batch.teachers
    for pair in ((ada, noisy(ben)), (noisy(ada), ben)):
        assert weights_of(model, batch, *pair) != pytest.approx([0.5, 0.5], abs=1e-3)
    disjoint = replace(ben, byte_ends_BLHM=ben.byte_ends_BLHM + 10_000)
    assert weights_of(model, batch, ada, disjoint) == pytest.approx([0.5, 0.5], abs=1e-6)


@pytest.mark.parametrize("kind", ["similarity", "learnable"])
def test_absent_teacher_gets_no_weight_and_samples_without_kv_are_ignored(kind: str) -> None:
    model = model_of(fuse={"kind": kind, "warmup_ratio": 0.0})
    batch = train_batch(model, BATCH)
    ada, ben = batch.teachers
    nothing = torch.zeros_like(ada.mask_BM)
    assert weights_of(model, batch, replace(ada, mask_BM=nothing), ben) == pytest.approx([0.0, 1.0])
    nothing = ada.mask_BM.clone()
    nothing[2] = False
    some = weights_of(model, batch, replace(ada, mask_BM=nothing), replace(ben, mask_BM=nothing))
    assert sum(some) == pytest.approx(1.0)


@pytest.mark.parametrize("mode", ["latent", "token"])
def test_router_reads_the_last_prompt_state_and_the_mean_of_filled_slots(mode: str) -> None:
    model = model_of(mode, fuse={"kind": "learnable", "router": "attention"})
    batch = train_batch(model, BATCH, LATENTS if mode == "latent" else None)
    ada, ben = batch.teachers
    ben.k_BLHMD[0, :, :, 1], ben.mask_BM[0, 1] = torch.nan, False
    assert model.fusion is not None
    assert model.fusion.router is not None
    read: list[tuple[Tensor, ...]] = []
    handle = model.fusion.router.register_forward_pre_hook(lambda _module, inputs: read.append(inputs))
    model(batch)
    handle.remove()
    ((state_BE, summary_BNF),) = read
    prompts = model.student.read_text(batch.tokens.prompt_ids_BP, batch.tokens.prompt_mask_BP)
    torch.testing.assert_close(state_BE, prompts.hidden_BTE[:, -1], rtol=1e-4, atol=1e-4)
    ends_BT, skipped = batch.tokens.text_byte_ends_BT, 1
    for n, (aligner, kv) in enumerate(zip(model.aligners, (ada, ben), strict=True)):
        laid_out = kv if mode == "latent" else at_student_tokens(kv, ends_BT, "boundary", skipped)
        for b in range(len(BATCH)):
            filled = laid_out.mask_BM[b].nonzero().flatten()
            means: list[Tensor] = []
            for column, target in enumerate(aligner.targets(laid_out)):
                centred = target[b][:, :, filled] - aligner.mean(TENSORS[column])[:, :, None]
                deviation_L = model.fused_variance_LK[:, column].float().sqrt()
                means.append((centred / deviation_L[:, None, None, None]).mean(dim=2).flatten())
            torch.testing.assert_close(summary_BNF[b, n], torch.cat(means), rtol=1e-4, atol=1e-4)


def test_similarity_uses_the_fixed_weights_in_the_first_steps() -> None:
    fuse = {"kind": "similarity", "choose": "top1", "warmup_ratio": 0.25}
    model = model_of(weights={"ada": 3.0, "ben": 1.0}, fuse=fuse)
    batch = train_batch(model, BATCH)
    ada, ben = batch.teachers
    assert model.fusion is not None
    for step in (0, 4):
        model.fusion.set_progress(0.0, step / 20)
        assert weights_of(model, batch, noisy(ada), ben) == pytest.approx([0.75, 0.25])
        absent = replace(ada, mask_BM=torch.zeros_like(ada.mask_BM))
        assert weights_of(model, batch, absent, ben) == pytest.approx([0.0, 1.0])
    model.fusion.set_progress(0.0, 5 / 20)
    of_ada, of_ben = weights_of(model, batch, noisy(ada), ben)
    assert of_ben > of_ada


def test_similarity_weights_have_no_gradient() -> None:
    model = model_of(fuse=SIMILARITY)
    fused = model(train_batch(model, BATCH))
    assert not fused["routing/weights_mean/ada"].requires_grad
    assert not fused["routing/entropy"].requires_grad


@pytest.mark.parametrize("mode", ["latent", "token"])
def test_router_loss_trains_router_and_adapters_but_not_the_student(mode: str) -> None:
    trained = {"head_adapter": "linear", "layer_map": "learned"}
    model = model_of(mode, align=trained, fuse={"kind": "learnable"})
    randomise_router(model)
    batch = train_batch(model, BATCH, LATENTS if mode == "latent" else None)
    from_router = gradients(model, model(batch)["routing/router_loss"])
    assert any(name.startswith("fusion.router") for name in from_router)
    assert any("maps" in name for name in from_router)
    assert any("logits_SL" in name for name in from_router)
    assert not any(name.startswith("student") for name in from_router)
    from_kv = gradients(model, model(batch)["kv_objective"])
    assert all(name.startswith("student") for name in from_kv)
    assert not any(name.startswith("routing") for name in model.eval()(batch) if name.endswith("loss"))


def test_router_loss_is_the_answer_cross_entropy_with_gradients_to_the_injected_kv() -> None:
    model = model_of(fuse={"kind": "learnable"})
    tokens = train_batch(model, BATCH).tokens
    text = model.student.read_text(tokens.text_ids_BT, tokens.text_mask_BT)
    answers = [answer_places(tokens.text_byte_ends_BT[row], tokens.text_mask_BT[row], row) for row in range(len(BATCH))]
    expected = naive_cross_entropy(
        text_logits(model.student, tokens), tokens.text_ids_BT[:, 1:], torch.tensor(answers)[:, 1:]
    )
    k_BLHTD, v_BLHTD = (x.detach().requires_grad_() for x in (text.k_BLHTD, text.v_BLHTD))
    every_BT = tokens.text_mask_BT
    loss = router_loss(model.student, tokens, k_BLHTD, v_BLHTD, every_BT)
    # Injecting the student's own K/V must not change its output.
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss.backward()
    direction = torch.randn(k_BLHTD.shape, generator=torch.Generator().manual_seed(0))
    step = 1e-2
    for moved, leaf in enumerate((k_BLHTD, v_BLHTD)):
        assert leaf.grad is not None
        ahead, behind = (
            float(
                router_loss(
                    model.student,
                    tokens,
                    k_BLHTD.detach() + (moved == 0) * sign * step * direction,
                    v_BLHTD.detach() + (moved == 1) * sign * step * direction,
                    every_BT,
                )
            )
            for sign in (1, -1)
        )
        assert (ahead - behind) / (2 * step) == pytest.approx(float((leaf.grad * direction).sum()), rel=2e-2)


def reasoning_places(ends_T: Tensor, row: int) -> list[bool]:
    record = BATCH[row]
    prompt, reasoning = len(record.prompt.encode()), len((record.prompt + record.reasoning).encode())
    return [prompt < end <= reasoning for end in ends_T.tolist()]


def answer_places(ends_T: Tensor, mask_T: Tensor, row: int) -> list[bool]:
    """Mask of the answer tokens, including the end-of-text token, which has no byte end."""
    reasoning = len((BATCH[row].prompt + BATCH[row].reasoning).encode())
    pairs = zip(ends_T.tolist(), mask_T.tolist(), strict=True)
    return [there and (end > reasoning or end < 0) for end, there in pairs]


def test_kv_are_injected_only_at_reasoning_tokens() -> None:
    model = model_of(fuse={"kind": "learnable"})
    tokens = train_batch(model, BATCH).tokens
    text = model.student.read_text(tokens.text_ids_BT, tokens.text_mask_BT)
    k_BLHTD, v_BLHTD = text.k_BLHTD.detach(), text.v_BLHTD.detach()
    inside_BT = torch.tensor([reasoning_places(ends_T, row) for row, ends_T in enumerate(tokens.text_byte_ends_BT)])

    def loss_with(moved_BT: Tensor, mask_BT: Tensor) -> float:
        moved = 9 * moved_BT[:, None, None, :, None]
        return float(router_loss(model.student, tokens, k_BLHTD + moved, v_BLHTD + moved, mask_BT))

    every_BT = torch.ones_like(inside_BT)
    own = loss_with(~every_BT, every_BT)
    assert loss_with(every_BT, ~inside_BT) == own
    for t in range(inside_BT.shape[1]):
        one_BT = torch.zeros_like(inside_BT)
        one_BT[:, t] = True
        assert (loss_with(one_BT, every_BT) != own) == bool(inside_BT[:, t].any())


def test_router_loss_uses_the_student_as_of_calibration() -> None:
    model = model_of(fuse={"kind": "learnable"})
    batch = train_batch(model, BATCH)
    names = ("routing/router_loss", "answer_ce")
    router_loss_before, answered = (float(model(batch)[name].detach()) for name in names)
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.mul_(1.5)
    router_loss_after, answered_after = (float(model(batch)[name].detach()) for name in names)
    assert router_loss_after == router_loss_before
    assert answered_after != answered
    assert not any("judge" in name for name in (*model.state_dict(), *dict(model.named_parameters())))


@pytest.mark.parametrize("mode", ["latent", "token"])
def test_router_loss_reads_teacher_kv_at_tokens_with_equal_ends(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(mode, fuse={"kind": "learnable"})
    batch = train_batch(model, BATCH, LATENTS if mode == "latent" else None)
    seen: list[tuple[Tensor, ...]] = []
    monkeypatch.setattr(
        model_module, "router_loss", lambda *arguments: (seen.append(arguments[2:]), router_loss(*arguments))[1]
    )
    model(batch)
    ((k_BLHTD, v_BLHTD, mask_BT),) = seen
    for row, ends_T in enumerate(batch.tokens.text_byte_ends_BT.tolist()):
        for t, end in enumerate(ends_T):
            # The first token of the text is an attention sink, which token mode skips.
            slots = [kv.byte_ends_BLHM[row, 0, 0].tolist() for kv in batch.teachers]
            teachers_with_slot = [
                n for n, ends in enumerate(slots) if end >= 0 and end in ends and (mode == "latent" or t > 0)
            ]
            assert bool(mask_BT[row, t]) == bool(teachers_with_slot)
            for x_BLHTD, column in ((k_BLHTD, 0), (v_BLHTD, 1)) if teachers_with_slot else ():
                found = [
                    model.aligners[n].targets(batch.teachers[n])[column][row, :, :, slots[n].index(end)]
                    for n in teachers_with_slot
                ]
                torch.testing.assert_close(x_BLHTD[row, :, :, t], sum(found) / len(found), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("choose", ["soft", "top1"])
@pytest.mark.parametrize("router", ["mlp", "gate", "attention"])
def test_every_router_runs_with_soft_and_top1_weights(router: str, choose: str) -> None:
    model = model_of(fuse={"kind": "learnable", "router": router, "choose": choose})
    losses = model(train_batch(model, BATCH))
    named = gradients(model, losses["loss"])
    assert any(name.startswith("fusion.router") for name in named)
    weights = [float(losses[f"routing/weights_mean/{name}"]) for name in BOTH]
    assert weights == pytest.approx([0.5, 0.5] if choose == "soft" else [1.0, 0.0])
    assert float(losses["routing/entropy"].detach()) == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-5)


def test_loss_is_the_weighted_sum_of_its_parts() -> None:
    loss = LossConfig(kv_weight=3.0, reasoning_ce_weight=0.5, codi_weight=2.0)
    model = model_of(loss=loss, fuse={"kind": "learnable", "entropy_weight": 0.05})
    found = {name: float(value.detach()) for name, value in model(train_batch(model, BATCH)).items()}
    expected = (
        found["answer_ce"]
        + 0.5 * found["reasoning_ce"]
        + 3.0 * found["kv_objective"]
        + 2.0 * found["codi_loss"]
        + found["routing/router_loss"]
        - 0.05 * found["routing/entropy"]
    )
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert found["codi_loss"] > 0


def test_codi_loss_compares_the_last_states_before_the_answer() -> None:
    model = model_of(loss=LossConfig(codi_weight=1.0))
    batch = train_batch(model, BATCH)
    tokens = batch.tokens
    thought = model.student.think(model.student.read_prompt(tokens.prompt_ids_BP, tokens.prompt_mask_BP))
    answer = model.student.read_answer(thought, tokens.answer_ids_BA, tokens.answer_mask_BA, all_layers=True)
    assert answer.before_answer_BSE is not None
    output = model.student.lm(tokens.text_ids_BT, attention_mask=tokens.text_mask_BT.long(), output_hidden_states=True)
    states_BSTE = torch.stack(output.hidden_states[1:], dim=1)
    before: list[Tensor] = []
    for row, record in enumerate(BATCH):
        reasoning = len((record.prompt + record.reasoning).encode())
        last = tokens.text_byte_ends_BT[row].tolist().index(reasoning)
        before.append(states_BSTE[row, :, last])
    expected = codi_loss(answer.before_answer_BSE, torch.stack(before))
    assert float(model(batch)["codi_loss"].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_slots_are_resampled_to_the_latents() -> None:
    selection = {"selection": {"selector": "full", "span": "all"}}
    model = model_of(align={"time": "linear"}, kv=selection)
    plain = train_batch(model, BATCH, None)
    losses = model.eval()(plain)
    assert torch.isfinite(losses["kv_loss"])
    # Slots of the prompt and the answer must not affect the loss.
    changed_outside: list[BatchKV] = []
    for kv in plain.teachers:
        ends_BM = kv.byte_ends_BLHM[:, 0, 0]
        starts_B = torch.tensor([len(record.prompt.encode()) for record in BATCH])[:, None]
        stops_B = torch.tensor([len((record.prompt + record.reasoning).encode()) for record in BATCH])[:, None]
        outside_BM = (ends_BM <= starts_B) | (ends_BM > stops_B)
        changed_outside.append(replace(kv, k_BLHMD=kv.k_BLHMD + 100 * outside_BM[:, None, None, :, None]))
    changed = model(TrainBatch(plain.tokens, tuple(changed_outside)))
    assert float(changed["kv_loss"]) == pytest.approx(float(losses["kv_loss"]), rel=1e-5)
    # A token inside the reasoning belongs to it even if its byte end is unknown.
    hidden: list[BatchKV] = []
    for kv in plain.teachers:
        ends_BLHM = kv.byte_ends_BLHM.clone()
        for row, record in enumerate(BATCH):
            ends_BLHM[row, 0, 0, int((ends_BLHM[row, 0, 0] > len(record.prompt.encode())).nonzero()[1])] = -1
        hidden.append(replace(kv, byte_ends_BLHM=ends_BLHM))
    unknown = model(TrainBatch(plain.tokens, tuple(hidden)))
    assert float(unknown["kv_loss"]) == pytest.approx(float(losses["kv_loss"]), rel=1e-6)
    inside = tuple(replace(kv, v_BLHMD=kv.v_BLHMD + 1) for kv in plain.teachers)
    assert float(model(TrainBatch(plain.tokens, inside))["kv_loss"]) != pytest.approx(
        float(losses["kv_loss"]), rel=1e-3
    )


def test_validation_reports_the_error_by_tensor_layer_and_head() -> None:
    model = model_of().eval()
    losses = model(train_batch(model, BATCH))
    assert losses["kv_error_KLH"].shape == (len(TENSORS), 2, 1)
    assert float(losses["kv_error_KLH"].mean()) == pytest.approx(float(losses["kv_loss"]), rel=1e-5)
