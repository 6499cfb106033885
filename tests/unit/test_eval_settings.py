"""Tests of the evaluation's flags."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.config import BENCHMARKS, FLAGS
from evaluation.multi_task_eval import main
from kvcore.errors import EXIT_USAGE, ConfigError, FieldError
from tests.support.tiny_models import save_tiny_model, tiny_spec


def read(*arguments: str):
    return FLAGS.read(arguments, "multi_task_eval.py")


def test_documented_flags_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVDISTILL_DATA_DIR", raising=False)
    settings = read("--model_path", "m/best_model", "--eval_datasets", "gpqa", "bbh", "--output_file", "m/results.json")
    assert settings.model_path == "m/best_model"
    assert settings.eval_datasets == ("gpqa", "bbh")
    assert settings.output == Path("m/results.json")
    assert settings.data_dir is None
    assert settings.limit is None


def test_all_benchmarks_are_the_default() -> None:
    settings = read("--model_path", "m", "--limit", "5")
    assert settings.eval_datasets == BENCHMARKS
    assert settings.limit == 5


def test_default_output_is_next_to_the_model(tmp_path: Path) -> None:
    (tmp_path / "best_model").mkdir()
    assert read("--model_path", str(tmp_path / "best_model")).output == tmp_path / "eval_results.json"
    with pytest.raises(FieldError, match=r"--model_path: there is no directory 'Qwen/Qwen2.5-1.5B'; .* --output_file"):
        _ = read("--model_path", "Qwen/Qwen2.5-1.5B").output


def test_results_that_cannot_be_written_are_refused_before_any_question(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    model = save_tiny_model(tmp_path / "model", tiny_spec("qwen2"))
    capsys.readouterr()
    flags = ["--model_path", str(model), "--output_file", str(model / "config.json/results.json"), "--device", "cpu"]
    assert main(flags, "kvdistill eval") == EXIT_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert "--output_file: " in line
    assert "config.json is a file; choose another directory" in line


def test_errors_name_the_flag() -> None:
    with pytest.raises(ConfigError, match="--eval_dataset: unknown flag; did you mean --eval_datasets"):
        read("--model_path", "m", "--eval_dataset", "gpqa")
    with pytest.raises(FieldError, match="--model-path: is required"):
        read("--limit", "3")
    with pytest.raises(FieldError, match=r"--limit: .*greater than or equal to 1"):
        read("--model_path", "m", "--limit", "0")
    with pytest.raises(FieldError, match=r"--limit: .*valid integer \(got 'many'\)"):
        read("--model_path", "m", "--limit", "many")
    with pytest.raises(FieldError, match=r"--output_file: .*ends in .json"):
        read("--model_path", "m", "--output_file", "results")
    with pytest.raises(FieldError, match="--device: expected auto, cpu, cuda or cuda:N"):
        read("--model_path", "m", "--device", "gpu")


def test_help_has_examples_and_imports_no_heavy_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read("--help")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "Examples:" in shown
    assert all(name in shown for name in BENCHMARKS)
    code = "import sys, evaluation.multi_task_eval; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "lm_eval", "datasets"} & set(loaded)
