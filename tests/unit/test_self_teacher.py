"""Tests of a student that is its own teacher, compared with loops over single samples in a plain transformers pass."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.whole_readings import answer_reading
from data.records import Record
from kvcore.models.attention_taps import ATTENTION_NAME
from kvcore.types import TENSORS, Tensor
from student_trainer.config import LossConfig
from student_trainer.loop import ds_engine
from student_trainer.loop.calibrate import scale_own_targets
from student_trainer.loop.kv_weight import auto_kv_weight
from student_trainer.loop.sample_order import SampleOrder
from student_trainer.loop.training_context import TrainingContext
from student_trainer.loop.validation import validate
from student_trainer.model.distill_model import DistillModel, TrainBatch
from student_trainer.model.latent import LatentStudent, new_reasoning
from student_trainer.model.lora import add_lora
from tests.support.naive_selection import best, centred, keydiff_scores, margin, mean_scores, r_kv_scores, random_scores
from tests.support.tiny_models import FAMILIES, Family, build_model, tiny_spec
from tests.support.training_parts import RECORDS, TOKENIZER, collator, one_rank, train_config

LATENTS, HEADS, HEAD_DIM, LAYERS = 5, 2, 16, 2
KaVa: dict[str, Any] = {"selector": "r_kv", "scope": "head", "importance_weight": 0.1}
# Reasonings of other lengths: shorter than the latents, none, and long ones.
BATCH: tuple[Record, ...] = (
    Record("long", "Start at 3. Add 4.", " 3 + 4 = 7, so 0; 0 x 2 = 0; 0 - 5 = 2.", " 2"),
    Record("short", "What is 2 + 3, and how?", " 5", " 5."),
    Record("none", "What is 1 + 1?", "", " two"),
    Record("middle", "Add.", " 1 + 5 = 6; 6 x 2.", " The answer is 2."),
    Record("equal", "Subtract 5.", " 0 - 5 = 2, all modulo", " 2"),
)


@dataclass
class Naive:
    """One sample read by a plain transformers model, without padding or cache."""

    keys: list[list[Tensor]]  # By layer and head, [N,D].
    values: list[list[Tensor]]
    importance: list[list[list[float]]]  # By layer, head and token.


def student_of(family: Family = "qwen3") -> LatentStudent:
    lm = build_model(tiny_spec(family, layers=LAYERS, kv_heads=HEADS, seed=3))
    return LatentStudent(lm, new_reasoning(lm, LATENTS, 2, seed=0))


def model_of(
    selection: dict[str, Any] | None = None, family: Family = "qwen3", control: str = "none", **sections: Any
) -> DistillModel:
    """A model in training mode, whose scale and variance differ in each layer and tensor."""
    kv = {"selection": {**(KaVa if selection is None else selection), "budget": LATENTS}, "control": control}
    student = {"latents": LATENTS, **sections.pop("student", {})}
    model = DistillModel(
        student_of(family), [], {}, train_config(self_teacher=True, kv=kv, student=student, **sections)
    )
    spread_LK = torch.tensor([[0.5, 0.8], [1.1, 1.7]])
    model.freeze(spread_LK, spread_LK.square() * 1.3)
    return model.train()


def batch_of(records: Sequence[Record] = BATCH) -> TrainBatch:
    return TrainBatch(collator()(records), ())


@torch.no_grad()
def naive_reading(student: LatentStudent, record: Record, pool: str = "max") -> Naive:
    """Content keys from the layers' inputs, values from the cache, and importance from the attentions, in fp64."""
    lm: Any = copy.deepcopy(student.lm).double().eval()
    lm.set_attn_implementation("eager")
    tokens = collator().tokens(record)
    ids = [*tokens.prompt_ids, *tokens.reasoning_ids, *tokens.answer_ids]
    start = len(tokens.prompt_ids)
    end = start + len(tokens.reasoning_ids)
    output = lm(torch.tensor([ids]), use_cache=True, output_attentions=True, output_hidden_states=True)
    found = Naive([], [], [])
    for number, layer in enumerate(lm.model.layers):
        attention = layer.self_attn
        k_THD = attention.k_proj(layer.input_layernorm(output.hidden_states[number][0])).unflatten(-1, (-1, HEAD_DIM))
        k_THD = attention.k_norm(k_THD) if hasattr(attention, "k_norm") else k_THD
        v_HTD = output.past_key_values.layers[number].values[0]
        found.keys.append([k_THD[start:end, head] for head in range(HEADS)])
        # A cache with a sliding window lacks the first values.
        v_THD = attention.v_proj(layer.input_layernorm(output.hidden_states[number][0])).unflatten(-1, (-1, HEAD_DIM))
        torch.testing.assert_close(v_THD.transpose(0, 1)[:, -v_HTD.shape[1] :], v_HTD)
        found.values.append([v_THD[start:end, head] for head in range(HEADS)])
        found.importance.append(_importance(output.attentions[number][0], start, end, len(ids), pool))
    return found


def _importance(attention_QTT: Tensor, start: int, end: int, total: int, pool: str) -> list[list[float]]:
    shared = attention_QTT.shape[0] // HEADS
    by_head: list[list[float]] = []
    for head in range(HEADS):
        scores: list[float] = []
        for token in range(start, end):
            pooled: list[float] = []
            for row in range(end, total):
                weights = [float(attention_QTT[head * shared + one, row, token]) for one in range(shared)]
                pooled.append(max(weights) if pool == "max" else sum(weights) / shared)
            scores.append(sum(pooled) / len(pooled))
        by_head.append(scores)
    return by_head


def naive_positions(naive: Naive, selection: dict[str, Any], record: Record) -> list[list[list[int]]]:
    """The selected tokens, by layer and head."""
    count, scope, selector = len(naive.keys[0][0]), selection.get("scope", "sample"), selection["selector"]
    tokens = collator().tokens(record)
    text = [*tokens.prompt_ids, *tokens.reasoning_ids, *tokens.answer_ids, 2]
    weight = selection.get("importance_weight", 0.5)
    by_layer: list[list[list[float]]] = []
    for layer in range(LAYERS):
        scores: list[list[float]] = []
        for head in range(HEADS):
            keys = naive.keys[layer][head].tolist()
            if selector == "right":
                scores.append([float(place) for place in range(count)])
            elif selector == "random":
                chooser = {"sample": 0, "layer": layer, "head": layer * HEADS + head}[scope]
                scores.append([float(x) for x in random_scores(selection.get("seed", 0), text, chooser, count)])
            elif selector == "keydiff":
                scores.append(keydiff_scores(keys))
            else:
                keys = centred(keys) if selector == "r_kv_centred" else keys
                scores.append(r_kv_scores(keys, naive.importance[layer][head], weight))
        by_layer.append(scores)
    if scope == "sample":
        common = mean_scores([scores for layer in by_layer for scores in layer])
        by_layer = [[common] * HEADS for _ in range(LAYERS)]
    elif scope == "layer":
        by_layer = [[mean_scores(scores)] * HEADS for scores in by_layer]
    assert all(margin(scores, LATENTS) > 1e-6 for layer in by_layer for scores in layer), "no near ties"
    return [[best(scores, range(count), LATENTS) for scores in layer] for layer in by_layer]


def naive_losses(model: DistillModel, selection: dict[str, Any], records: Sequence[Record]) -> dict[str, float]:
    """KV objective (smooth L1) and normalised error, as loops over samples, layers, heads and slots."""
    tokens = collator()(records)
    answers = (tokens.answer_ids_BA, tokens.answer_mask_BA)
    with torch.no_grad():
        _, *own = answer_reading(model.student, tokens.prompt_ids_BP, tokens.prompt_mask_BP, *answers)
    objective, error, samples = 0.0, 0.0, 0
    for row, record in enumerate(records):
        naive = naive_reading(model.student, record, selection.get("importance_pool", "max"))
        if not len(naive.keys[0][0]):
            continue
        samples += 1
        places = naive_positions(naive, selection, record)
        for kind, target in enumerate((naive.keys, naive.values)):
            for layer in range(LAYERS):
                scale = float(model.fused_scale_LK[layer, kind])
                variance = float(model.fused_variance_LK[layer, kind])
                for head in range(HEADS):
                    kept = places[layer][head]
                    for slot, place in enumerate(kept):
                        mine = own[kind][row, layer, head, slot].double().tolist()
                        share = 1 / (HEAD_DIM * len(kept) * HEADS * LAYERS * len(TENSORS))
                        for a, b in zip(mine, target[layer][head][place].tolist(), strict=True):
                            gap = abs(a - b) / scale
                            objective += share * (0.5 * gap * gap if gap < 1 else gap - 0.5)
                            error += share * (a - b) ** 2 / variance
    return {"kv_objective": objective / samples, "kv_loss": error / samples}


def kv_losses(model: DistillModel, records: Sequence[Record] = BATCH) -> dict[str, float]:
    return {name: float(model(batch_of(records))[name].detach()) for name in ("kv_objective", "kv_loss")}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_equals_loops_over_single_samples(family: Family) -> None:
    model = model_of(family=family)
    assert kv_losses(model) == pytest.approx(naive_losses(model, KaVa, BATCH), rel=2e-5)


@pytest.mark.parametrize(
    "selection",
    [
        {"selector": "r_kv", "scope": "head", "importance_weight": 1.0},
        {"selector": "r_kv", "scope": "head", "importance_weight": 1.0, "importance_pool": "mean"},
        {"selector": "r_kv", "scope": "layer", "importance_weight": 0.5},
        {"selector": "r_kv", "scope": "sample", "importance_weight": 0.0},
        {"selector": "r_kv_centred", "scope": "head"},
        {"selector": "keydiff", "scope": "sample"},  # In layer 0 alone, equal tokens tie.
        {"selector": "right"},
        {"selector": "random", "scope": "head", "seed": 4},
        {"selector": "random", "scope": "layer", "seed": 4},
        {"selector": "random", "scope": "sample"},
    ],
    ids=lambda selection: "-".join(map(str, selection.values())),
)
def test_every_selector_and_scope_selects_as_the_loops_do(selection: dict[str, Any]) -> None:
    model = model_of(selection)
    assert kv_losses(model) == pytest.approx(naive_losses(model, selection, BATCH), rel=2e-5)


def test_a_padded_batch_gives_each_sample_the_target_that_it_has_alone() -> None:
    model = model_of()
    k_BLHMD, v_BLHMD, mask_BM = model.own_target(batch_of())
    assert k_BLHMD.shape == v_BLHMD.shape == (len(BATCH), LAYERS, HEADS, LATENTS, HEAD_DIM)
    for row, record in enumerate(BATCH):
        k_LHMD, v_LHMD, mask_M = (x[0] for x in model.own_target(batch_of([record])))
        torch.testing.assert_close((k_BLHMD[row], v_BLHMD[row]), (k_LHMD, v_LHMD), atol=1e-5, rtol=1e-5)
        assert mask_BM[row].equal(mask_M)


def test_a_sample_with_fewer_tokens_than_latents_has_empty_slots_at_the_end() -> None:
    model = model_of()
    k_BLHMD, _, mask_BM = model.own_target(batch_of())
    counts = [min(LATENTS, len(collator().tokens(record).reasoning_ids)) for record in BATCH]
    assert {0, LATENTS} < set(counts), "the batch has an empty reasoning, a short one and longer ones"
    for row, count in enumerate(counts):
        assert mask_BM[row].tolist() == [True] * count + [False] * (LATENTS - count)
        assert not k_BLHMD[row, :, :, count:].any()
    reasoned = [record for record in BATCH if record.reasoning]
    assert kv_losses(model) == pytest.approx(kv_losses(model, reasoned), rel=1e-5), "an empty one counts nowhere"
    nothing = kv_losses(model, [BATCH[2]])
    assert nothing == {"kv_objective": 0.0, "kv_loss": 0.0}


def test_the_target_has_no_gradient_and_the_latents_have_one() -> None:
    model = model_of()
    assert not any(x.requires_grad for x in model.own_target(batch_of()))
    losses = model(batch_of())
    losses["kv_objective"].backward(retain_graph=True)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # Only the answer's reading has tokens beyond the prompt; if the target trained, the reasoning's would change.
    table = gradients["student.lm.model.embed_tokens.weight"]
    tokens = collator()(BATCH)
    prompts = set(tokens.prompt_ids_BP[tokens.prompt_mask_BP].tolist())
    assert set(table.abs().sum(dim=1).nonzero().flatten().tolist()) <= prompts
    assert gradients["student.reasoning.first_inputs.weight"].abs().sum() > 0
    assert gradients["student.lm.model.layers.0.self_attn.k_proj.weight"].abs().sum() > 0


def test_the_target_follows_the_current_weights() -> None:
    model = model_of()
    before, _, _ = model.own_target(batch_of())
    with torch.no_grad():
        for parameter in model.student.lm.parameters():
            parameter.mul_(1.05)
    after, _, _ = model.own_target(batch_of())
    assert (before - after).abs().max() > 1e-2
    assert kv_losses(model) == pytest.approx(naive_losses(model, KaVa, BATCH), rel=2e-5)


def test_the_total_has_the_weighted_kv_loss_in_training_and_in_validation() -> None:
    model = model_of(loss=LossConfig(kv_weight=5.0, reasoning_ce_weight=0.5).model_dump())
    training = {name: float(x.detach()) for name, x in model(batch_of()).items()}
    ce_loss = training["answer_ce"] + 0.5 * training["reasoning_ce"]
    assert training["ce_loss"] == pytest.approx(ce_loss, rel=1e-6)
    assert training["loss"] == pytest.approx(ce_loss + 5.0 * training["kv_objective"], rel=1e-6)
    with torch.no_grad():
        validation = model.eval()(batch_of())
    assert "reasoning_ce" not in validation
    for name in ("answer_ce", "kv_objective", "kv_loss"):
        assert float(validation[name]) == pytest.approx(training[name], rel=1e-5)
    assert float(validation["ce_loss"]) == float(validation["answer_ce"])
    assert validation["kv_error_KLH"].shape == (len(TENSORS), LAYERS, HEADS)
    assert validation["kv_target_BM"].sum(dim=1).tolist() == model.own_target(batch_of())[2].sum(dim=1).tolist()


def test_the_shuffled_control_trains_on_the_sample_before_and_validates_on_its_own() -> None:
    model, own = model_of(control="shuffled"), model_of()
    k_BLHMD, v_BLHMD, mask_BM = own.own_target(batch_of())
    shuffled = model.own_target(batch_of())
    for row in range(len(BATCH)):
        for found, expected in zip(shuffled, (k_BLHMD, v_BLHMD, mask_BM), strict=True):
            torch.testing.assert_close(found[row], expected[row - 1])
    assert kv_losses(model)["kv_loss"] != pytest.approx(kv_losses(own)["kv_loss"], rel=1e-3)
    assert kv_losses(model.eval()) == pytest.approx(kv_losses(own.eval()), rel=1e-6)


def test_scale_and_variance_are_those_of_the_targets_of_the_calibration_samples() -> None:
    model = model_of()
    records = [*BATCH, *RECORDS[:4]]
    with one_rank():
        scale_own_targets(
            model, records, range(len(records)), lambda batches: map(batch_of, batches), 4, lambda _: None
        )
    targets = [naive_reading(model.student, record) for record in records]
    for kind in range(len(TENSORS)):
        for layer in range(LAYERS):
            slots: list[Tensor] = []
            for record, naive in zip(records, targets, strict=True):
                if record.reasoning:
                    places = naive_positions(naive, KaVa, record)[layer]
                    heads = (naive.keys, naive.values)[kind][layer]
                    slots.append(torch.cat([x_ND[place] for x_ND, place in zip(heads, places, strict=True)], dim=1))
            x_NF = torch.cat(slots)
            deviation, variance = x_NF.std(unbiased=False), x_NF.var(dim=0, unbiased=False).mean()
            assert float(model.fused_scale_LK[layer, kind]) == pytest.approx(float(deviation), rel=1e-5)
            assert float(model.fused_variance_LK[layer, kind]) == pytest.approx(float(variance), rel=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_checkpointing_keeps_losses_and_gradients(lora: bool) -> None:
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        model = model_of(student={"lora": {"r": 2, "dropout": 0.0}} if lora else {})
        if lora:
            settings: Any = model._config.student.lora
            add_lora(model.student.lm, settings, "base", seed=1)
            for name, parameter in model.student.lm.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
        if checkpointing:
            model.student.lm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        losses = model.train()(batch_of())
        losses["kv_objective"].backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": losses["kv_objective"].detach(), **gradients})
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys()
    assert any(".k_proj" in name for name in plain)
    for name, value in plain.items():
        torch.testing.assert_close(value, checkpointed[name], atol=1e-6, rtol=1e-4)


def test_a_few_steps_lower_the_kv_loss() -> None:
    torch.manual_seed(0)
    model = model_of(loss=LossConfig(kv_weight=10.0).model_dump())
    records = RECORDS[:16]
    with one_rank():
        scale_own_targets(model, records, range(16), lambda batches: map(batch_of, batches), 8, lambda _: None)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses: list[float] = []
    for _ in range(30):
        step = model(batch_of(records))
        losses.append(float(step["kv_loss"].detach()))
        optimizer.zero_grad()
        step["loss"].backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


def test_the_automatic_weight_compares_its_gradient_with_that_of_the_cross_entropy() -> None:
    model = model_of()
    weight = auto_kv_weight(model, [batch_of()], 1.0, lambda _: None)
    losses, parameters = model(batch_of()), [p for p in model.parameters() if p.requires_grad]
    lengths: list[float] = []
    both = [torch.autograd.grad(losses[name], parameters, retain_graph=True, allow_unused=True) for name in _COMPARED]
    for gradients in both:
        shared = [g for g, *others in zip(gradients, *both, strict=True) if all(other is not None for other in others)]
        lengths.append(math.sqrt(sum(float(g.double().square().sum()) for g in shared)))
    assert weight == pytest.approx(lengths[0] / lengths[1], rel=1e-5)


_COMPARED = ("ce_loss", "kv_objective")


def test_validation_averages_over_the_samples_with_reasoning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ds_engine, "device", lambda: torch.device("cpu"))
    model = model_of().eval()

    def validated(records: Sequence[Record], micro_batch: int) -> dict[str, float]:
        run = {"micro_batch": micro_batch, "global_batch": micro_batch}
        config = train_config(self_teacher=True, run=run, data={"answer_tokens": 2})
        order = SampleOrder(config.run, len(records), 0, 1)
        context = TrainingContext(config, TOKENIZER, collator(), (), records, {}, model, order, None, {})
        with one_rank():
            found = validate(model, context, lambda batches: map(batch_of, batches), torch.device("cpu"))
        assert found.kv_error_KLH is not None
        assert float(found.kv_error_KLH.mean()) == pytest.approx(found.metrics["val/kv_loss"])
        return found.metrics

    reasoned = validated([record for record in BATCH if record.reasoning], 4)
    for micro_batch in (1, 2, 5):
        found = validated(BATCH, micro_batch)
        for name in ("val/kv_loss", "val/kv_loss/k/layer1", "val/kv_loss/latent5"):
            assert found[name] == pytest.approx(reasoned[name], rel=1e-5), name


def test_numbers_that_are_not_finite_reach_the_loss_instead_of_stopping_one_rank() -> None:
    model = model_of()
    with torch.no_grad():
        model.student.lm.get_parameter("model.layers.1.self_attn.v_proj.weight").fill_(math.nan)
        model.student.lm.get_parameter("model.layers.1.self_attn.k_proj.weight").fill_(math.inf)
    assert not math.isfinite(kv_losses(model)["kv_loss"])


def test_the_saved_configuration_names_no_attention_of_its_own() -> None:
    model = model_of()
    assert model.student.lm.config._attn_implementation == ATTENTION_NAME
    assert ATTENTION_NAME not in str(model.student.lm.config.to_dict())
