"""Tests of low-rank adapters: what is trained, and that the merged model and the adapter alone give the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvcore.errors import FieldError
from kvcore.types import Tensor
from student_trainer.config import LoraConfig
from student_trainer.model.capture import capture_kv
from student_trainer.model.lora import add_lora, merged, save_adapter
from tests.support.tiny_models import FAMILIES, Family, build_model, save_tiny_model, tiny_spec

# peft and older releases of transformers use names that the newest release will drop.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)`:FutureWarning"
)

IDS = torch.randint(3, 384, (2, 9), generator=torch.Generator().manual_seed(0))


def settings(**changes: Any) -> LoraConfig:
    return LoraConfig.model_validate({"r": 4, "alpha": 6, "dropout": 0.0, **changes})


def adapted(directory: Path, family: Family, extra: dict[str, Any] | None = None, **changes: Any) -> PreTrainedModel:
    """A model from the directory with adapters as after training: none of their weights is zero."""
    spec = tiny_spec(family, layers=2, extra=extra or {})
    lm = AutoModelForCausalLM.from_pretrained(save_tiny_model(directory, spec), attn_implementation="sdpa")
    add_lora(lm, settings(**changes), str(directory), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in trained(lm).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return lm


def trained(lm: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in lm.named_parameters() if parameter.requires_grad}


def whole_state(lm: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in lm.named_parameters()}


@torch.no_grad()
def logits(lm: Any) -> Tensor:
    return lm.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_the_merged_model_and_the_adapter_alone_give_the_trained_logits(
    family: Family, tied: bool, tmp_path: Path
) -> None:
    lm = adapted(tmp_path / "base", family, {"tie_word_embeddings": tied})
    lm.save_pretrained(tmp_path / "merged", state_dict=merged(lm, whole_state(lm)))
    save_adapter(lm, whole_state(lm), tmp_path / "adapter")
    base: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before, expected = logits(base), logits(lm)
    assert (before - expected).abs().max() > 1.0, "the adapters change the logits"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    plain, report = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    assert not any(report.values())
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=0)
    with_adapter = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(with_adapter), expected, atol=1e-5, rtol=0)


def test_merged_weights_equal_the_formula_in_fp64(tmp_path: Path) -> None:
    lm = adapted(tmp_path, "qwen2")
    state = whole_state(lm)
    layer = "model.layers.1.mlp.up_proj"
    base, a, b = (
        state[f"{layer}.{part}.weight"].double() for part in ("base_layer", "lora_A.default", "lora_B.default")
    )
    found = merged(lm, state)
    torch.testing.assert_close(found[f"{layer}.weight"].double(), base + 6 / 4 * (b @ a), atol=1e-6, rtol=0)
    assert found.keys() == dict(build_model(tiny_spec("qwen2", layers=2)).named_parameters()).keys()
    assert state.keys() == whole_state(lm).keys(), "the argument is unchanged"


def test_adapters_start_without_effect_and_equal_on_all_ranks(tmp_path: Path) -> None:
    spec = tiny_spec("qwen3", layers=2)
    plain, one, other = (build_model(spec) for _ in range(3))
    add_lora(one, settings(), "base", seed=3)
    torch.rand(5)
    add_lora(other, settings(), "base", seed=3)
    assert logits(one).equal(logits(plain))
    ours, theirs = whole_state(one), whole_state(other)
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_every_linear_layer_but_the_head_is_adapted_by_default() -> None:
    lm = build_model(tiny_spec("qwen3", layers=2))
    add_lora(lm, settings(), "base", seed=0)
    names = {name.rsplit(".lora_")[0].removeprefix("model.layers.") for name in trained(lm)}
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    assert names == {
        f"{layer}.{part}"
        for layer in range(2)
        for part in [*(f"self_attn.{name}" for name in attention), *(f"mlp.{name}" for name in mlp)]
    }


def test_unknown_layers_are_refused_with_the_known_ones() -> None:
    lm = build_model(tiny_spec("qwen3", layers=1))
    with pytest.raises(FieldError, match=r"student\.lora\.target_modules: .*'q_pro'.* o_proj, q_proj.*'q_proj'\?"):
        add_lora(lm, settings(target_modules=("q_pro",)), "base", seed=0)
    with pytest.raises(FieldError, match="no linear layer 'lm_head'"):
        add_lora(lm, settings(target_modules=("lm_head",)), "base", seed=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_captured_keys_carry_gradients_also_where_nothing_before_them_is_trained(checkpointing: bool) -> None:
    gradients: list[dict[str, Tensor]] = []
    for targets in (("q_proj", "v_proj"), None):
        lm = build_model(tiny_spec("qwen3", layers=2))
        add_lora(lm, settings(target_modules=targets), "base", seed=0)
        if checkpointing:
            lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lm.train()
        with capture_kv(lm) as capture:
            lm.base_model(inputs_embeds=cast("Any", lm.get_input_embeddings())(IDS), use_cache=False)
        (capture.k_BHTD[1].sum() + capture.v_BHTD[0].sum()).backward()
        gradients.append({name: p.grad for name, p in trained(lm).items() if p.grad is not None})
    for found in gradients:
        assert found["model.layers.0.self_attn.v_proj.lora_B.default.weight"].abs().max() > 0
    assert "model.layers.1.self_attn.k_proj.lora_B.default.weight" in gradients[1]
