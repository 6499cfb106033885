"""Tests of `python -m experiments.paper`: valid runs, kept runs, intervals, and the page with the tables."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.paper import __main__ as paper
from experiments.paper.paper_report import ArmResult, TableResult, as_json, from_json, rows, table_text
from experiments.paper.paper_runs import PaperRuns
from experiments.paper.paper_tables import TABLES
from kvcore.config import load_config, parse
from kvcore.files import write_json
from student_trainer.config import TrainConfig

PORTS = {name: 50050 + number for number, name in enumerate(("teacher_a", "teacher_b", "bad_teacher", "itself"))}
ROOT = Path(__file__).resolve().parents[2]
STORED = sorted((ROOT / "experiments" / "paper" / "results").glob("*.json"))


def runs_of(name: str, output: Path, seeds: tuple[int, ...] = (0, 1)) -> PaperRuns:
    return PaperRuns(name, TABLES[name], output, TABLES[name].settings, seeds)


@pytest.mark.parametrize("name", TABLES)
def test_every_run_of_a_table_is_valid_and_starts_from_a_model_of_an_earlier_run(name: str, tmp_path: Path) -> None:
    runs = runs_of(name, tmp_path)
    made = {"student"}
    plan = runs.plan(Path("student"), PORTS)
    for run in plan:
        config = parse(run["config"], TrainConfig)
        assert config.student.path in made
        made.add(str(config.run.output_dir / "best_model"))
    assert len({run["config"]["run"]["output_dir"] for run in plan}) == len(plan) == 2 * len(runs.arms)


@pytest.mark.parametrize("name", TABLES)
def test_arms_of_a_table_take_equal_steps_from_equal_data(name: str, tmp_path: Path) -> None:
    plan = runs_of(name, tmp_path).plan(Path("student"), PORTS)
    shared = {json.dumps([run["config"][key] for key in ("data", "optim")]) for run in plan}
    assert len(shared) == 1
    assert len({run["config"]["run"]["steps"] for run in plan}) == 1


def finish(run: dict[str, Any]) -> None:
    folder = Path(run["config"]["run"]["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text("{}", encoding="utf-8")


def test_finished_runs_are_kept_until_their_configuration_changes(tmp_path: Path) -> None:
    runs = runs_of("methods", tmp_path)
    runs.prepare_runs()
    plan = runs.plan(Path("student"), PORTS)
    assert runs.unfinished(plan) == plan
    for run in plan[:3]:
        finish(run)
    other_ports = runs.plan(Path("student"), {name: port + 100 for name, port in PORTS.items()})
    assert runs.unfinished(other_ports) == other_ports[3:]
    changed = runs.plan(Path("another"), PORTS)
    assert runs.unfinished(changed) == changed
    assert not Path(plan[0]["config"]["run"]["output_dir"], "result.json").exists()


def result_of(**accuracies: list[float]) -> TableResult:
    arms = [ArmResult(name, values, [10.0] * len(values)) for name, values in accuracies.items()]
    return TableResult("title", "abc", "2 cores", [0, 1, 2], "base", {}, arms, {})


def test_rows_have_means_and_paired_differences_with_intervals() -> None:
    (base, other) = rows(result_of(base=[0.1, 0.2, 0.3], other=[0.2, 0.3, 0.4]))
    # Student's t with two degrees of freedom: 4.303 standard errors of 10 / sqrt(3) points.
    assert base == ["base", "10.0 / 20.0 / 30.0", "20.0 ± 24.8", "-", "10"]
    assert other == ["other", "20.0 / 30.0 / 40.0", "30.0 ± 24.8", "+10.0 ± 0.0", "10"]


def test_result_survives_its_json_file() -> None:
    found = result_of(base=[0.1], other=[0.2])
    assert from_json(json.loads(json.dumps(as_json(found)))) == found


def test_unknown_arm_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert paper.main(["--tables", "methods", "--arms", "KX", "--output", str(tmp_path)]) != 0
    assert "there is no arm 'KX'" in capsys.readouterr().err


def test_an_arm_that_a_later_table_lacks_is_refused_before_the_first_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(paper, "run_table", lambda name, *_, **__: ran.append(name))
    arms = ["--arms", "KV, T=6", "--output", str(tmp_path)]
    assert paper.main(["--tables", "methods", "selectors", *arms]) != 0
    assert ran == []
    assert paper.main(["--tables", "methods", *arms]) == 0
    assert ran == ["methods"]


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_results_page_shows_the_stored_results(path: Path) -> None:
    found = from_json(json.loads(path.read_text(encoding="utf-8")))
    table = TABLES[path.stem]
    assert [arm.name for arm in found.arms] == [arm.name for arm in table.arms]
    assert found.seeds == [0, 1, 2]
    assert not found.commit.endswith("+")
    assert table_text(found) in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_quick_run_changes_steps_and_items_only() -> None:
    for table in TABLES.values():
        assert table.quick_steps < table.settings.arm_steps
        assert replace(table.settings, arm_steps=table.quick_steps).task == table.settings.task


def shown_commands(**variables: str) -> list[str]:
    bash = shutil.which("bash")
    assert bash is not None
    return subprocess.run(
        [bash, "experiments/paper/run.sh", "--show"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
    ).stdout.splitlines()


def test_script_for_a_gpu_trains_valid_runs_of_each_method_and_seed() -> None:
    shown = shown_commands(METHODS="kava lotus", SEEDS="4 5")
    trained: list[tuple[str, str, int]] = []
    for line in map(shlex.split, shown):
        if "train" in line:
            preset = Path(ROOT, line[line.index("--config") + 1])
            changes = [line[place + 1] for place, word in enumerate(line) if word == "--set"]
            config = load_config(preset, changes, TrainConfig)
            trained.append((config.run.output_dir.name, config.student.mode, config.run.seed))
    assert trained == [
        (f"{method}_qwen0.5b_aug-seed{seed}{stage}", mode, seed)
        for seed in (4, 5)
        for method, stage, mode in (("kava", "", "latent"), ("lotus", "_written", "token"), ("lotus", "", "latent"))
    ]
    assert sum("eval" in line for line in map(shlex.split, shown)) == 4


@pytest.mark.parametrize(("scores", "evaluated"), [(None, False), (["val"], False), (["val", "gsm8k_test"], True)])
def test_script_for_a_gpu_evaluates_runs_that_have_only_been_validated(
    scores: list[str] | None, evaluated: bool, tmp_path: Path
) -> None:
    run = tmp_path / "kava_qwen0.5b_aug-seed0"
    run.mkdir()
    (run / "summary.json").touch()
    if scores is not None:
        write_json(run / "eval_results.json", {name: {"score": 50.0, "num_examples": 2} for name in scores})
    shown = shown_commands(METHODS="kava", SEEDS="0", OUTPUT=str(tmp_path))
    assert not any("train" in shlex.split(line) for line in shown)
    assert any("gsm8k_test" in line for line in shown) != evaluated
