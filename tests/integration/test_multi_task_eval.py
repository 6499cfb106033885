"""Tests of the evaluation command with tiny models and local copies of the datasets: scores and output files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evaluation.config import BENCHMARKS, EvalSettings
from evaluation.latent_lm import LatentLM
from evaluation.models import load_model
from evaluation.multi_task_eval import evaluate, main
from kvcore.errors import ConfigError, FieldError
from student_trainer.model.latent import new_reasoning, save_reasoning
from student_trainer.model.pretrained import load_pretrained
from tests.support.benchmark_data import write_benchmarks
from tests.support.servers import REPOSITORY
from tests.support.tiny_models import save_tiny_model, tiny_spec

pytestmark = pytest.mark.slow

PROMPTS = [f"Question: What is {index}+{index}?\nAnswer:" for index in range(4)]
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{gold}}}}"
generation_kwargs: {{until: ["Question:"], do_sample: false, max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOICE_TASK = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: [one, two, three]
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training run with a student that reasons in latents."""
    directory = tmp_path_factory.mktemp("stage3_learnable")
    student = save_tiny_model(directory / "best_model", tiny_spec("qwen3", layers=2, kv_heads=1, seed=3))
    lm, _ = load_pretrained(str(student), "auto", "path")
    reasoning = new_reasoning(lm, 3, 2, seed=5)
    save_reasoning(reasoning, reasoning.state_dict(), student)
    return directory


@pytest.fixture
def validated(stage: Path) -> Path:
    entry = {"dataset": "val", "metric": "accuracy", "score": 12.5, "num_examples": 8, "split": "validation"}
    (stage / "eval_results.json").write_text(json.dumps({"val": entry, "average": 12.5}), encoding="utf-8")
    return stage


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("copies")
    write_benchmarks(directory, 2)
    return directory


def run(*arguments: str, data_dir: Path) -> subprocess.CompletedProcess[str]:
    """Run the guide's command in the repository root."""
    environment = {**os.environ, "KVDISTILL_DATA_DIR": str(data_dir), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "evaluation/multi_task_eval.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


def test_command_of_the_guide_scores_all_seven_benchmarks(validated: Path, copies: Path) -> None:
    output = validated / "eval_results.json"
    arguments = ["--model_path", str(validated / "best_model"), "--eval_datasets", *BENCHMARKS]
    done = run(*arguments, "--output_file", str(output), "--limit", "1", "--max_new_tokens", "8", data_dir=copies)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    table = {name: entry["score"] for name, entry in results.items() if name != "average"}
    assert list(table) == ["val", *BENCHMARKS]
    assert results["average"] == pytest.approx(sum(table[name] for name in BENCHMARKS) / 7)
    for name in BENCHMARKS:
        entry = results[name]
        questions = {"bbh": 27, "cmmlu_subset": 12, "ceval_subset": 12}.get(name, 1)
        assert entry["dataset"] == name
        assert entry["num_examples"] == questions
        assert 0.0 <= entry["ci95"][0] <= entry["score"] <= entry["ci95"][1] <= 100.0
        lines = (validated / "eval_results" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        scores = [json.loads(line)["score"] for line in lines]
        assert len(scores) == questions
        assert entry["score"] == pytest.approx(100 * sum(scores) / questions)
    assert "7 of 7, ceval_subset" in done.stderr
    assert "\r" not in done.stderr


def test_missing_dataset_fails_and_writes_nothing(
    validated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    write_benchmarks(tmp_path, 1)
    (tmp_path / "math500.jsonl").unlink()
    before = (validated / "eval_results.json").read_bytes()
    arguments = ["--model_path", str(validated / "best_model"), "--eval_datasets", "gsm8k_test", "math500"]
    assert main([*arguments, "--data_dir", str(tmp_path)], "multi_task_eval.py") == 2
    shown = capsys.readouterr().err
    assert "multi_task_eval.py: 1 of 2 datasets cannot be evaluated, so none was" in shown
    assert "math500" in shown.splitlines()[-1]
    assert (validated / "eval_results.json").read_bytes() == before


@pytest.mark.parametrize("latent", [True, False])
def test_local_task_scores_the_answers_of_the_model(
    latent: bool, stage: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = stage / "best_model" if latent else save_tiny_model(tmp_path / "plain", tiny_spec("qwen2", layers=1))
    model: Any = load_model(str(path), "auto", "cpu", 4)
    assert isinstance(model, LatentLM) == latent
    settings = {"until": ["Question:"], "do_sample": False, "max_gen_toks": 6}
    written = model.generate_until([_Request(prompt, settings) for prompt in PROMPTS], disable_tqdm=True)
    rows = [{"prompt": prompt, "gold": text} for prompt, text in zip(PROMPTS, written, strict=True)]
    rows[2]["gold"] = "something else"
    likelihoods = [model.loglikelihood([_Request(PROMPTS[0], f" {choice}")], disable_tqdm=True) for choice in _CHOICES]
    likeliest = max(range(3), key=lambda place: likelihoods[place][0][0])
    chosen = [{"prompt": PROMPTS[0], "gold": likeliest}, {"prompt": PROMPTS[0], "gold": (likeliest + 1) % 3}]
    for name, task, data in (("sums", TASK, rows), ("choices", CHOICE_TASK, chosen)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
        (tmp_path / f"{name}.yaml").write_text(task.format(path=file), encoding="utf-8")
    results = evaluate(
        EvalSettings(
            model_path=str(path),
            eval_datasets=("sums", "choices"),
            tasks_dir=tmp_path,
            output_file=tmp_path / "out" / "scores.json",
        )
    )
    assert results["sums"]["score"] == 75.0
    assert results["choices"]["score"] == 50.0
    assert results["average"] == 62.5
    assert "val" not in results
    lines = (tmp_path / "out" / "scores" / "sums.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["output"] for line in lines] == written
    unfinished = sum(not json.loads(line)["finished"] for line in lines)
    assert unfinished
    assert results["sums"]["unfinished_answers"] == unfinished / 4
    assert f"{25 * unfinished:.1f} % of the answers were cut off before their end" in caplog.text
    assert results["choices"]["unfinished_answers"] == 0.0


def test_task_that_needs_beam_search_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "sums.jsonl").write_text(json.dumps({"prompt": "2+2", "gold": "4"}) + "\n", encoding="utf-8")
    for beams in (1, 4):
        task = TASK.format(path=tmp_path / "sums.jsonl").replace("max_gen_toks: 6", f"num_beams: {beams}")
        (tmp_path / "sums.yaml").write_text(task, encoding="utf-8")
        settings = EvalSettings(
            model_path="nowhere", eval_datasets=("sums",), tasks_dir=tmp_path, output_file=tmp_path / "out.json"
        )
        problem = "'nowhere' is not a directory" if beams == 1 else "sums: its task sets num_beams=4 for generation"
        with pytest.raises(ConfigError, match=problem):
            evaluate(settings)


def test_validation_results_are_kept_only_for_the_same_model(validated: Path, copies: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "best_model", tiny_spec("qwen2", layers=1))
    same = {"eval_datasets": ("truthfulqa",), "data_dir": copies, "limit": 1}
    output = validated / "eval_results.json"
    assert "val" not in evaluate(EvalSettings(model_path=str(other), output_file=output, **same))
    assert "val" not in evaluate(EvalSettings(model_path=str(validated / "best_model"), **same))


def test_damaged_results_file_is_not_overwritten(stage: Path, copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVDISTILL_DATA_DIR", raising=False)
    (stage / "eval_results.json").write_text("{", encoding="utf-8")
    settings = {"eval_datasets": ("truthfulqa",), "data_dir": copies, "limit": 1}
    with pytest.raises(FieldError, match="is not JSON"):
        evaluate(EvalSettings(model_path=str(stage / "best_model"), **settings))
    with pytest.raises(ConfigError, match="--data_dir"):
        evaluate(EvalSettings(model_path=str(stage / "best_model"), eval_datasets=("bbh",)))


class _Request:
    """The part of lm-eval's request that a model reads."""

    task_name = "made-up"

    def __init__(self, *arguments: Any) -> None:
        self.args = arguments


_CHOICES = ("one", "two", "three")
