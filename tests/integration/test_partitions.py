"""Tests of a student that ZeRO-3 partitions, before there is an engine; on one rank, with real DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kvcore.config import parse
from kvcore.errors import FieldError
from student_trainer.config import StudentConfig, TrainConfig
from student_trainer.loop import checkpoint, ds_engine
from student_trainer.loop.student_loading import load_student
from student_trainer.model import lm_head
from student_trainer.model.partitions import gathered_in_passes, is_partitioned, set_value
from tests.support.tiny_models import save_tiny_model, tiny_spec

WEIGHTS = "model.safetensors"
IDS = torch.arange(3, 15).reshape(2, 6)

pytestmark = [
    pytest.mark.usefixtures("one_rank"),
    pytest.mark.filterwarnings(
        "ignore:`is_gradient_checkpointing`:FutureWarning", "ignore::DeprecationWarning", "ignore::FutureWarning:torch"
    ),
]


def saved(directory: Path, **changes: Any) -> str:
    return str(save_tiny_model(directory / "model", tiny_spec("qwen3", layers=2, **changes)))


def loaded(path: str, **settings: Any) -> tuple[Any, Any]:
    """The student whole, and partitioned."""
    config = StudentConfig.model_validate({"path": path, **settings})
    whole, shared = (load_student(config, 0, partitioned=partitioned)[0] for partitioned in (False, True))
    return whole, shared


def gradients(lm: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the gradients of the trained parameters."""
    trained = {name: parameter for name, parameter in lm.named_parameters() if parameter.requires_grad}
    with gathered_in_passes(lm):
        # Two passes, so that parameters are gathered again for their gradients.
        loss = lm(input_ids=IDS, labels=IDS).loss + lm(input_ids=IDS.flip(0), labels=IDS).loss.square()
        found = torch.autograd.grad(loss, list(trained.values()))
    return loss.detach(), dict(zip(trained, found, strict=True))


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({}, {}),
        ({"extra": {"tie_word_embeddings": True}}, {"gradient_checkpointing": True}),
        ({}, {"lora": {"r": 4, "dropout": 0.0}, "gradient_checkpointing": True}),
    ],
    ids=["plain", "tied, checkpointed", "LoRA"],
)
def test_losses_and_gradients_equal_those_of_the_whole_student(
    tmp_path: Path, model: dict[str, Any], settings: dict[str, Any]
) -> None:
    whole, shared = loaded(saved(tmp_path, **model), **settings)
    own = [parameter for name, parameter in shared.named_parameters() if "lora_" not in name]
    assert all(is_partitioned(parameter) and parameter.numel() == 0 for parameter in own)
    (loss, expected), (shared_loss, found) = gradients(whole.train()), gradients(shared.train())
    torch.testing.assert_close(shared_loss, loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    assert all(parameter.numel() == 0 for parameter in own), "partitioned again after the passes"
    assert all(parameter.requires_grad == (settings.get("lora") is None) for parameter in own)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_held_is_gathered_once_for_all_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    _, shared = loaded(saved(tmp_path, extra={"tie_word_embeddings": tied}))
    head, gathers = shared.lm_head.weight, list[int]()
    all_gather = head.all_gather
    monkeypatch.setattr(head, "all_gather", lambda **found: gathers.append(head.numel()) or all_gather(**found))
    monkeypatch.setattr(lm_head, "_CHUNK_LOGITS", 384 * 2)
    with gathered_in_passes(shared, held=shared.lm_head):
        address = head.data_ptr()
        hidden_BTE = shared.model(input_ids=IDS).last_hidden_state
        loss = lm_head.token_cross_entropy(shared, hidden_BTE, IDS, torch.ones_like(IDS, dtype=torch.bool)).sum()
        torch.autograd.grad(loss, list(shared.parameters()))
        assert head.data_ptr() == address
    assert gathers == [0]
    assert head.numel() == 0, "partitioned again"


class Supervised(nn.Module):
    """The student's cross-entropy, as an engine expects it."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.lm(input_ids=ids, labels=ids).loss}


def test_training_and_resuming_give_the_losses_of_the_whole_student(tmp_path: Path) -> None:
    path = saved(tmp_path)
    run = {"output_dir": str(tmp_path), "steps": 4, "global_batch": 2, "micro_batch": 2}
    losses: dict[str, list[float]] = {}
    for name, partitioned, stage, resumes in (("whole", False, 0, False), ("shared", True, 3, True)):
        config = parse(
            {
                "student": {"path": path},
                "data": {"train": "x"},
                "run": run | {"zero_stage": stage},
                "optim": {"lr": 0.01},
            },
            TrainConfig,
        )
        losses[name] = []
        for first, last in ((0, 2), (2, 4)) if resumes else ((0, 4),):
            module = Supervised(load_student(config.student, 0, partitioned=partitioned)[0])
            if first > 0:
                checkpoint.at(tmp_path, first).load_weights(module)
            engine = ds_engine.Engine(module, config, 1)
            if first > 0:
                checkpoint.at(tmp_path, first).restore(engine)
            losses[name] += [engine.micro_step(IDS)["loss"].item() for _ in range(first, last)]
            checkpoint.save(tmp_path, engine, {}, {"step": last, "identity": {}}, 9)
            engine.close()
    assert losses["shared"] == pytest.approx(losses["whole"], abs=1e-5)
    assert losses["whole"][0] - losses["whole"][-1] > 0.5, "the losses move"


def test_a_value_that_is_set_is_used_in_passes(tmp_path: Path) -> None:
    whole, shared = loaded(saved(tmp_path))
    for lm in (whole, shared):
        set_value(lm.model.norm.weight, torch.linspace(-1.0, 1.0, 48))
    torch.testing.assert_close(gradients(shared)[0], gradients(whole)[0])


def test_weights_that_do_not_belong_to_the_model_are_refused(tmp_path: Path) -> None:
    path = Path(saved(tmp_path))
    tensors = load_file(path / WEIGHTS)
    for change, problem in (
        ({"model.norm.scale": torch.ones(2)}, "that Qwen3ForCausalLM does not have"),
        ({}, "lacks 1"),
    ):
        changed = tensors | change
        if not change:
            del changed["model.norm.weight"]
        save_file(changed, path / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(FieldError, match=problem):
            load_student(StudentConfig(path=str(path)), 0, partitioned=True)
