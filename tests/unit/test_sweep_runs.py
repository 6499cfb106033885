"""Tests of a sweep's configuration and the runs in its plan."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvcore.config import load_config, parse
from kvcore.errors import ConfigError, FieldError
from kvdistill.sweep import sweep_table as table
from kvdistill.sweep.sweep_config import SweepConfig
from kvdistill.sweep.sweep_runs import SweepRun, plan
from kvdistill.sweep.sweep_table import Mean, Row

SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "sweeps"


def tree(**changes: Any) -> dict[str, Any]:
    return {
        "output_dir": "out",
        "seeds": [0, 1],
        "flags": {"student_model_name_or_path": "tiny", "teacher_models": ["a", "b"], "max_steps": 3},
        "matrix": {
            "kv_compression": ["right", "r-kv"],
            "share": {"few": {"math23k_ratio": 0.1}, "none": {"bf16": False}},
        },
        **changes,
    }


def planned(**changes: Any) -> list[SweepRun]:
    return plan(parse(tree(**changes), SweepConfig))


def test_plan_has_every_combination_and_seed_in_its_own_folder() -> None:
    runs = planned()
    assert [run.name for run in runs] == [
        f"{compression}/{share}/seed{seed}"
        for compression in ("right", "r-kv")
        for share in ("few", "none")
        for seed in (0, 1)
    ]
    assert [run.number for run in runs] == list(range(8))
    assert runs[0].options == {"kv_compression": "right", "share": "few"}
    assert runs[5].directory == Path("out/runs/r-kv/few/seed1")


def test_flags_reach_the_settings_with_their_types() -> None:
    first, *_, last = planned()
    assert (first.settings.kv_compression, first.settings.math23k_ratio, first.settings.bf16) == ("right", 0.1, True)
    assert (last.settings.kv_compression, last.settings.math23k_ratio, last.settings.bf16) == ("r_kv", 0.2, False)
    assert last.settings.teacher_models == ("a", "b")
    assert (last.settings.seed, last.settings.output_dir) == (1, last.directory)


def test_options_override_flags_and_flags_override_the_config_file(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump({"max_steps": 1, "max_length": 7, "kv_loss_type": "mse"}), encoding="utf-8")
    settings = planned(config=str(base), matrix={"kv_loss_type": ["cka"]})[0].settings
    assert (settings.max_steps, settings.max_length, settings.kv_loss_type) == (3, 7, "cka")
    other = tmp_path / "other.yaml"
    other.write_text("max_length: 9\n", encoding="utf-8")
    runs = planned(config=str(base), matrix={"models": {"one": {}, "two": {"config": str(other)}}})
    assert [run.settings.max_length for run in runs] == [7, 7, 9, 9]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matrix": {"kv_compression": ["right", "half"]}}, "run half/seed0: --kv_compression"),
        ({"flags": {"teacher_models": ["a"]}}, "--student-model-name-or-path: is required"),
        ({"flags": {"kv_compresion": "right"}}, "did you mean --kv_compression?"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml: no such configuration file"),
        ({"seeds": [1, 1]}, "seeds: must differ"),
        ({"seeds": []}, "seeds"),
        ({"matrix": {}}, "matrix"),
        ({"matrix": {"share": {}}}, "matrix.share: has no option"),
        ({"matrix": {"max_steps": [1, 1]}}, "matrix.max_steps: options must differ"),
        ({"matrix": {"student_model_name_or_path": ["org/model"]}}, "'org/model' names a folder"),
        ({"matrix": {"share": {"..": {}}}}, "'..' names a folder"),
        ({"matrix": {"seed": [3, 4]}}, "is set for each run; see seeds"),
        ({"flags": {"output_dir": "x"}}, "flags.output_dir: is set for each run"),
        ({"evaluation": {"model_path": "x"}}, "evaluation.model_path: is set for each best model"),
        ({"command": " "}, "command: is empty"),
        ({"comand": "x"}, "did you mean 'command'?"),
    ],
)
def test_plan_raises_for_a_wrong_setting_of_any_run(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(**changes)
    assert message in str(caught.value)


def test_missing_program_raises_with_its_name() -> None:
    with pytest.raises(ConfigError, match="no program 'torchrum'"):
        _ = planned(command="torchrum train.py")[0].command


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sweeps_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SHIPPED.parents[1])
    runs = plan(load_config(path, [], SweepConfig))
    assert len({run.training for run in runs}) == len(runs)
    assert len(runs) == len({run.name for run in runs})
    assert runs[0].sweep.output_dir == Path("outputs/sweeps") / path.stem
    assert len(runs[0].sweep.seeds) >= 3


def test_mean_has_students_t_interval() -> None:
    mean = Mean.of([50.0, 52.0, 57.0])
    assert mean.value == 53.0
    assert mean.half == pytest.approx(4.30265 * math.sqrt(13.0 / 3), rel=1e-5)
    assert Mean.of([4.0]) == Mean(4.0, None, 1)
    assert Mean.of([2.0, 2.0]).half == 0.0


def test_cell_names_the_number_of_seeds_if_some_are_missing() -> None:
    row = Row(("right",), "", [0, 1, 2], {"val": [50.0, 52.0, 57.0], "bbh": [40.0], "KV loss": [0.5, 0.5]})
    assert table._cell(row, "val") == "53.0 ± 9.0"
    assert table._cell(row, "bbh") == "40.0 (1 of 3 seeds)"
    assert table._cell(row, "KV loss") == "0.500 ± 0.000 (2 of 3 seeds)"
    assert table._cell(row, "gpqa") == "-"


def test_field_of_wrong_type_raises() -> None:
    with pytest.raises(FieldError, match="seeds"):
        planned(seeds=["0"])
