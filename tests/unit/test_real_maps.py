"""Tests of the comparison of maps on a real model: the arms' configurations, the means, the table and the file."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from experiments.real import maps, maps_report
from experiments.real.maps_config import (
    ARMS,
    FULL,
    REFERENCE,
    MapArm,
    healing_config,
    healing_name,
    map_config,
    planned,
    run_name,
)
from experiments.real.real_config import RealPaths
from experiments.real.real_results import RealRunResult
from kvcore.config import parse
from student_trainer.config import TrainConfig

PATHS = RealPaths(Path("outputs/maps"), quick=False)


RANKS = {"basis4": 4, "basis16": 16, "basis64": 64, "shuffled16": 16, "basis16_int4": 16, "basis16_pca20": 16}
QUALITIES = {"pca10": 0.1, "pca20": 0.2, "pca40": 0.4, "pca60": 0.6, "shuffled_pca40": 0.4, "basis16_pca20": 0.2}


def tree(arm: MapArm) -> dict[str, Any]:
    config = parse(map_config(arm, 2, FULL, PATHS, 50051), TrainConfig).model_dump(mode="json")
    assert config["run"].pop("output_dir") == f"outputs/maps/full/runs/{arm.name}-seed2"
    return config


def test_arms_with_a_teacher_differ_only_in_the_map_the_codec_and_the_control() -> None:
    trees = {arm.name: tree(arm) for arm in ARMS}
    assert {name: one["kv"].pop("control") for name, one in trees.items() if name.startswith("shuffled")} == {
        "shuffled16": "shuffled",
        "shuffled_pca40": "shuffled",
    }
    assert not trees["ce"]["teachers"]
    changed = {
        name: {field for field, value in one.pop("align").items() if value != trees[REFERENCE]["align"][field]}
        for name, one in trees.items()
        if name not in ("ce", REFERENCE)
    }
    assert changed == {
        **{name: {"basis_rank"} for name in RANKS},
        "to_student": {"direction"},
        "reduced16": {"direction", "ridge_rank"},
        **{name: set() for name in ("raw", "int6", "int4", *QUALITIES) if name not in RANKS},
    }
    trees[REFERENCE].pop("align")
    codecs = {name: one["kv"]["codec"].pop("name") for name, one in trees.items()}
    assert {name: codec for name, codec in codecs.items() if codec != "int8"} == {
        "raw": "raw",
        "int6": "int6",
        "int4": "int4",
        "basis16_int4": "int4",
        **dict.fromkeys(QUALITIES, "pca"),
    }
    assert {name: one["kv"]["codec"].pop("quality") for name, one in trees.items() if name in QUALITIES} == QUALITIES
    for name in trees.keys() - QUALITIES.keys():
        assert trees[name]["kv"]["codec"].pop("quality") is None
    for name, one in trees.items():
        one["kv"].pop("control", None)
        assert name == "ce" or one == trees[REFERENCE]
        assert one["run"] == trees["ce"]["run"]
        assert one["optim"] == trees["ce"]["optim"]


def test_ranks_are_those_in_the_names() -> None:
    ranks = {arm.name: tree(arm)["align"]["basis_rank"] for arm in ARMS if tree(arm)["align"]["basis_rank"]}
    assert ranks == RANKS
    assert {arm.name for arm in ARMS if tree(arm)["align"]["ridge_rank"] == 16} == {"reduced16"}


def test_healed_arms_differ_from_the_others_only_in_the_student_and_the_folder() -> None:
    for arm in ARMS:
        config = map_config(arm, 2, FULL, PATHS, 50051)
        healed = map_config(arm, 2, FULL, PATHS, 50051, healing=60)
        assert healed["student"].pop("path") == "outputs/maps/full/runs/healing60-seed2/best_model"
        assert healed["run"].pop("output_dir") == f"outputs/maps/full/runs/{arm.name}-healed60-seed2"
        del config["student"]["path"], config["run"]["output_dir"]
        assert healed == config


def test_healing_trains_the_cut_student_on_cross_entropy_alone_in_another_order_than_the_arms() -> None:
    healing = healing_config(2, 60, FULL, PATHS)
    config = parse(healing, TrainConfig)
    assert (config.student.path, config.teachers, config.run.steps) == ("outputs/maps/models/student", (), 60)
    start = map_config(ARMS[0], 2, FULL, PATHS, 50051, healing=60)["student"]["path"]
    assert str(config.run.output_dir / "best_model") == start
    assert config.run.seed not in (0, 1, 2)
    assert healing_config(1, 60, FULL, PATHS)["run"]["seed"] != config.run.seed
    assert len({healing_name(seed, steps) for seed in (1, 2) for steps in (30, 60)}) == 4


@pytest.mark.parametrize("steps", ["0", "-1", "some"])
def test_healing_for_no_steps_is_refused(steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        maps.main(["--arms", "ce", f"--healed={steps}"])
    assert f"expected a number of steps of at least 1; got '{steps}'" in capsys.readouterr().err


def test_all_arms_of_a_seed_run_before_the_next_seed() -> None:
    assert [run_name(arm, seed) for arm, seed in planned(ARMS[:2], (0, 3))] == [
        "ce-seed0",
        "heads-seed0",
        "ce-seed3",
        "heads-seed3",
    ]


def run(loss: float, sent: float | None = None, explained: tuple[float, ...] = ()) -> RealRunResult:
    return RealRunResult(
        name="",
        held_out={"ce_loss": loss, "perplexity": math.exp(loss)},
        explained={},
        explained_after={"k": list(explained), "v": [value / 2 for value in explained]} if explained else {},
        milliseconds={},
        peak_memory_mb=1.0,
        stall_fraction=None,
        bytes_per_sample=sent,
        cache_bytes_per_sample=None if sent is None else 12_000.0,
        seconds=1.0,
    )


RUNS = {
    "ce": [run(4.5), run(4.7), run(4.3)],
    REFERENCE: [run(4.0, 1000.0, (1.0, 0.5)), run(4.3, 1200.0, (0.9, 0.4)), run(3.9, 800.0, (0.8, 0.6))],
    "basis16": [run(4.1, 100.0, (0.9, 0.3)), run(4.2, 90.0, (0.9, 0.3)), run(4.1, 110.0, (0.9, 0.3))],
}
SHOWN = {name: name for name in RUNS}


def test_differences_are_between_runs_of_the_same_seed() -> None:
    arms = maps_report.summarise(SHOWN, RUNS)
    found = arms["basis16"].minus_reference
    assert found is not None
    differences = [0.1, -0.1, 0.2]
    assert found.value == pytest.approx(statistics.fmean(differences))
    # 4.30265: Student's t with two degrees of freedom, 97.5 %.
    assert found.half == pytest.approx(4.30265 * statistics.stdev(differences) / math.sqrt(3), rel=1e-5)
    assert arms[REFERENCE].minus_reference is None
    assert arms["ce"].cross_entropy.value == pytest.approx(4.5)
    assert arms["ce"].perplexity.value == pytest.approx(statistics.fmean(map(math.exp, (4.5, 4.7, 4.3))))


def test_bytes_and_explained_variance_are_means_over_seeds() -> None:
    arms = maps_report.summarise(SHOWN, RUNS)
    assert arms[REFERENCE].bytes_per_sample == pytest.approx(1000.0)
    assert arms[REFERENCE].share_of_cache == pytest.approx(1 / 12)
    assert arms[REFERENCE].explained == pytest.approx({"k": 0.7, "v": 0.35})
    assert (arms["ce"].bytes_per_sample, arms["ce"].share_of_cache, arms["ce"].explained) == (None, None, {})


def test_without_the_reference_there_are_no_differences() -> None:
    arms = maps_report.summarise(SHOWN, {"ce": RUNS["ce"]})
    assert arms["ce"].minus_reference is None


def test_table_has_a_row_per_arm_with_each_seed() -> None:
    lines = maps_report.table(maps_report.summarise(SHOWN, RUNS)).splitlines()
    assert len(lines) == 5
    assert lines[2] == (
        "| ce | 90.0 / 109.9 / 73.7 | 91.2 | 4.500 / 4.700 / 4.300 | 4.500 ± 0.497 | +0.433 ± 0.143 | - | - | - |"
    )
    assert lines[3].endswith("| - | 1,000 | 1/12 | 0.70 / 0.35 |")
    assert lines[4].endswith("| +0.067 ± 0.379 | 100 | 1/120 | 0.60 / 0.30 |")


def test_one_seed_has_no_interval() -> None:
    lines = maps_report.table(
        maps_report.summarise(SHOWN, {name: runs[:1] for name, runs in RUNS.items()})
    ).splitlines()
    assert lines[2] == "| ce | 90.0 | 90.0 | 4.500 | 4.500 | +0.500 | - | - | - |"


def test_report_writes_json_and_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = maps_report.MapsResults((0, 1, 2), maps_report.summarise(SHOWN, RUNS), {}, {"steps": 30})
    maps_report.write_report(results, tmp_path)
    written = json.loads((tmp_path / "maps.json").read_text(encoding="utf-8"))
    assert written["arms"]["basis16"]["minus_reference"]["value"] == pytest.approx(0.0667, abs=1e-4)
    assert [one["held_out"]["ce_loss"] for one in written["arms"]["ce"]["runs"]] == [4.5, 4.7, 4.3]
    assert written["settings"] == {"steps": 30}
    assert maps_report.table(results.arms) in capsys.readouterr().out


def test_report_of_healed_students_has_a_file_of_its_own_and_says_where_the_arms_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    healed = [run(math.log(50.0)), run(math.log(60.0))]
    results = maps_report.MapsResults((0, 1), maps_report.summarise(SHOWN, RUNS), {}, {}, 60, healed)
    maps_report.write_report(results, tmp_path)
    written = json.loads((tmp_path / "maps_healed60.json").read_text(encoding="utf-8"))
    assert [one["held_out"]["perplexity"] for one in written["healed"]] == pytest.approx([50.0, 60.0])
    assert not (tmp_path / "maps.json").exists()
    assert "perplexity by seed before the arms, after 60 steps: 50.0 / 60.0\n" in capsys.readouterr().out
