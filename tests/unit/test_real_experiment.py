"""Tests of the run on a real model: the student's layers, data, configurations, the clock of a step, and the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data.records import load_records
from experiments.demo.results import Replay
from experiments.real import real_report
from experiments.real.prepare_data import prepare
from experiments.real.real_config import (
    ARMS,
    FULL,
    QUICK,
    RealPaths,
    arm_config,
    latent_config,
    replay_config,
)
from experiments.real.real_models import kept_layers, without_layers
from experiments.real.real_results import RealResults, RealRunResult, explained_by_layer
from experiments.real.step_clock import StepClock
from kvcore.config import parse
from kvcore.errors import ConfigError
from kvdistill.report.finished_runs import read_run
from student_trainer.config import TrainConfig
from tests.support.finished_runs import write_run
from tests.support.tiny_models import build_model, build_tokenizer, tiny_spec

PATHS = RealPaths(Path("outputs/real"), quick=True)


def test_student_has_every_third_layer_and_all_other_weights() -> None:
    teacher: Any = build_model(tiny_spec("llama", layers=7, extra={"tie_word_embeddings": True}))
    student: Any = without_layers(teacher, kept_layers(7))
    ids = torch.tensor([[5, 9, 200, 31, 7]])
    # The reference leaves the other layers out of the teacher itself.
    teacher.model.layers = nn.ModuleList(layer for index, layer in enumerate(teacher.model.layers) if index % 3 == 0)
    with torch.no_grad():
        expected, found = (lm(ids, use_cache=False).logits for lm in (teacher, student))
    assert len(student.model.layers) == student.config.num_hidden_layers == 3
    assert torch.equal(found, expected)


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """A local copy of GSM8K with long and short questions, and a tokenizer."""
    build_tokenizer("qwen2").save_pretrained(str(tmp_path / "student"))
    for name, numbers in (("gsm8k", range(8)), ("gsm8k_test", range(6, 12))):
        rows = [
            {"question": f"What is {n} + 1? {'a' * 400 * (n % 4 == 3)}", "answer": f"It is.\n#### {n + 1}"}
            for n in numbers
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def prepared(copies: Path, train: int, val: int) -> tuple[set[str], set[str]]:
    files = copies / "train.jsonl", copies / "val.jsonl"
    prepare(*files, (train, val), data_dir=copies, tokenizer=copies / "student", max_tokens=100, seed=0)
    questions = tuple({record.prompt for record in load_records(file)} for file in files)
    return questions[0], questions[1]


def test_held_out_questions_come_from_the_test_split_and_are_new_and_short(copies: Path) -> None:
    train, val = prepared(copies, 6, 3)
    assert {prompt.split()[3] for prompt in train} == {"0", "1", "2", "4", "5", "6"}
    # 6 is in the training split too; 7 and 11 are too long.
    assert {prompt.split()[3] for prompt in val} == {"8", "9", "10"}


def test_training_split_is_divided_if_there_is_no_test_split(copies: Path) -> None:
    (copies / "gsm8k_test.jsonl").unlink()
    train, val = prepared(copies, 4, 2)
    assert (len(train), len(val)) == (4, 2)
    assert not train & val


def test_too_few_short_questions_are_refused(copies: Path) -> None:
    with pytest.raises(ConfigError, match="6 questions of at most 100 tokens, 7 are needed"):
        prepared(copies, 7, 1)


def without_output(config: dict[str, Any]) -> dict[str, Any]:
    tree = parse(config, TrainConfig).model_dump(mode="json")
    tree["run"].pop("output_dir")
    return tree


def test_arms_differ_only_in_teacher_and_control() -> None:
    ce, kv, shuffled = (without_output(arm_config(arm, 2, FULL, PATHS, 50051)) for arm in ARMS)
    for tree in (ce, kv, shuffled):
        tree.pop("align")
    assert (kv["kv"].pop("control"), shuffled["kv"].pop("control")) == ("none", "shuffled")
    assert kv == shuffled
    assert (ce.pop("teachers"), len(kv.pop("teachers"))) == ([], 1)
    ce.pop("kv")
    kv.pop("kv")
    assert ce == kv
    assert ce["run"]["seed"] == 2


def test_replay_differs_from_the_recording_only_in_mode_and_endpoints() -> None:
    record, offline = (without_output(replay_config(mode, 0, QUICK, PATHS, 50051)) for mode in ("record", "offline"))
    assert (record["kv"].pop("mode"), offline["kv"].pop("mode")) == ("record", "offline")
    assert record["teachers"][0].pop("endpoints")
    assert not offline["teachers"][0].pop("endpoints")
    assert record == offline


def test_latent_arms_start_from_the_trained_student_of_their_seed() -> None:
    for arm in ("latent_ce", "latent_kv"):
        assert latent_config(arm, 1, FULL, PATHS, 50051)["student"]["path"].endswith("quick/runs/ce-seed1/best_model")
        parse(latent_config(arm, 1, FULL, PATHS, 50051), TrainConfig)


class Body(nn.Linear):
    """Stands for a language model's body."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Body(3, 3)

    def forward(self, x: torch.Tensor, passes: int) -> torch.Tensor:
        for _ in range(passes):
            x = self.body(x)
        return x.sum()


def test_clock_counts_the_passes_of_steps_and_nothing_else() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.ones(3)
    with StepClock(Model, Body) as clock:
        for passes in (2, 3, 3):
            model(x, 1)  # A validation, without a step.
            model(x, passes).backward()
            optimizer.step()
    model(x, 1).backward()
    optimizer.step()
    assert [len(passes) for passes in clock.times.passes] == [2, 3, 3]
    assert len(clock.times.ends) == len(clock.times.forward) == len(clock.times.backward) == 3
    assert set(clock.times.medians()) == {"forward", "backward", "optimizer"}
    assert len(clock.times.median_passes()) == 3


def result(name: str, perplexity: float, taught: bool) -> RealRunResult:
    by_layer = {"k": [1.0, 0.5], "v": [0.9, None]}
    return RealRunResult(
        name=name,
        held_out={"ce_loss": 4.0, "answer_ce": 2.0, "perplexity": perplexity} | ({"kv_loss": 0.5} if taught else {}),
        explained=by_layer if taught else {},
        explained_after={"k": [1.0, 0.7], "v": [0.9, 0.8]} if taught else {},
        milliseconds={"forward": 10.0, "step": 50.0} | ({"wait": 1.0} if taught else {}),
        peak_memory_mb=2000.0,
        stall_fraction=0.01 if taught else None,
        bytes_per_sample=1000.0 if taught else None,
        cache_bytes_per_sample=12000.0 if taught else None,
        seconds=60.0,
    )


def results(ce: list[float], kv: list[float], shuffled: list[float]) -> RealResults:
    by_arm = {"ce": ce, "kv": kv, "shuffled": shuffled}
    return RealResults(
        seeds=tuple(range(len(ce))),
        arms={arm: [result(arm, value, arm != "ce") for value in values] for arm, values in by_arm.items()},
        latent={arm: result(arm, 7.0, arm == "latent_kv") for arm in ("latent_ce", "latent_kv")},
        served=[{"codec": "raw", "largest_KL": [[1.0]], "relative_KL": [[1e-7, 2e-7], [3e-7, 1e-7]]}],
        replay=Replay(6, 0.0, same_steps=True),
        server_mb=900.0,
        evaluation={"gsm8k_test": {"score": 0.0, "num_examples": 8}, "average": 0.0},
        extracted={},
        data={},
        settings={},
        seconds={"total": 600.0},
    )


def test_verdict_counts_seeds_whatever_the_outcome() -> None:
    good = real_report.verdict(results([84, 89], [70, 73], [172, 172]))
    assert good[0].startswith(
        "With K/V, the perplexity is lower than with cross-entropy alone in 2 of 2 seeds; with K/V of other samples, "
        "it is the highest in 2 of 2"
    )
    bad = real_report.verdict(results([84, 60], [70, 73], [172, 71]))
    assert "alone in 1 of 2 seeds; with K/V of other samples, it is the highest in 1 of 2" in bad[0]
    assert "72.0 without a teacher, 71.5 with its K/V, 121.5 with K/V of other samples" in bad[0]


def test_run_works_only_if_served_kv_and_replay_are_right() -> None:
    right = results([84], [70], [172])
    assert right.works
    assert not replace(right, replay=Replay(6, 1e-3, same_steps=True)).works
    served = [{"codec": "raw", "largest_KL": [[1.0]], "relative_KL": [[1e-7, 2e-3], [3e-7, 1e-7]]}]
    assert not replace(right, served=served).works


def test_explained_variance_is_that_of_layers_and_not_of_latents(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", layers=2)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"step": 30, "val/kv_loss/latent1": 0.3, "val/kv_loss/latent2": 0.4}) + "\n")
    found = explained_by_layer(read_run(folder, "run"))
    assert found == {"k": pytest.approx([0.8, 0.79]), "v": pytest.approx([0.6, 0.59])}


def test_report_is_written_with_a_row_per_arm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real_report.write_report(results([84, 89], [70, 73], [172, 172]), tmp_path)
    page = (tmp_path / "real.md").read_text(encoding="utf-8")
    assert "| kv | 4.000 / 4.000 | 2.000 / 2.000 | 70.0 / 73.0 | 0.500 / 0.500 | text, K/V of the teacher |" in page
    assert "| kv | before | v | 0.90 | - |" in page
    assert "84.0 / 89.0" in capsys.readouterr().out
    assert json.loads((tmp_path / "real.json").read_text(encoding="utf-8"))["works"] is True
