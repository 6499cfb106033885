"""Tests of the benchmark of a training step: every arm on toy models, and the figures that it derives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import train_step
from benchmarks.train_step_arms import ARMS, COMPARED, PASSES
from benchmarks.train_step_process import BenchmarkError, Job, measured
from tests.support.servers import REPOSITORY


def raw(step: float, **changes: Any) -> dict[str, Any]:
    times = {"step": step, "cpu": step / 2, "parts": {"forward": 0.4 * step, "backward": 0.5 * step}, "passes": [0.1]}
    return times | {"peak_mib": 300.0, "grown_mib": 100.0} | changes


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_arm_is_measured_and_printed() -> None:
    command = [sys.executable, "-m", "tests.support.toy_train_step"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert list(found["arms"]) == list(ARMS)
    assert list(found["supply"]) == ["supply_free", "supply_0.8", "supply_1.0", "supply_1.2"]
    assert len(found["ratios"]) == 2 * 2 * len(COMPARED)
    assert min(found["ratios"].values()) > 0
    assert list(found["memory"]["arms"]) == ["online", "in_process", "online_lora", "in_process_lora"]
    assert len(found["memory"]["ratios"]) == 4
    for name, arm in found["arms"].items():
        taught = ARMS[name].kv != "text"
        inside = ARMS[name].kind == "in_process"
        # A latent step reads the prompt, its latents in every pass, the answer, and the reasoning as text.
        assert len(arm["passes_ms"]) == (3 + PASSES if ARMS[name].mode == "latent" else 1 + inside)
        assert {"wait", "decode", "align"} <= set(arm["parts_ms"]) if taught else "wait" not in arm["parts_ms"]
        assert ("stall_share" in arm) == taught
        assert f"| `{name}` |" in ended.stderr


@pytest.mark.slow
def test_failed_process_is_reported_with_its_log(tmp_path: Path) -> None:
    config: dict[str, Any] = {"student": {"path": str(tmp_path / "none")}, "data": {"train": "none.jsonl"}}
    config["run"] = {"output_dir": str(tmp_path), "steps": 1}
    with pytest.raises(BenchmarkError, match=r"(?s)online ended with code 1; the end of its log.*none\.jsonl"):
        measured(Job("kvdistill", config), tmp_path / "online.log")


def test_parts_and_the_rest_add_up_to_the_median_step() -> None:
    found = train_step.figures([raw(0.1), raw(0.3), raw(0.2)])
    assert found["step_ms"] == 200.0
    assert found["parts_ms"] == {"forward": 80.0, "backward": 100.0, "other": 20.0}
    assert found["passes_ms"] == [100.0]
    assert found["cpu_ms"] == 100.0
    assert "stall_share" not in found


def test_ratios_compare_the_arms_of_a_round() -> None:
    # The machine is four times slower in the second round.
    found = {"online": [raw(0.3), raw(1.2), raw(0.6)], "offline": [raw(0.2), raw(0.8), raw(0.5)], "text": [raw(0.1)]}
    assert train_step.ratios(found) == {"online_over_offline": 1.5, "online_over_offline_cpu": 1.5}


def test_replay_gets_its_recording() -> None:
    assert train_step.with_recordings(["latent_offline_lora", "plain"]) == [
        "plain",
        "latent_record_lora",
        "latent_offline_lora",
    ]
    assert list(train_step.with_recordings(list(ARMS))) == list(ARMS)


def test_table_has_a_row_for_each_arm_and_ratio() -> None:
    arm = train_step.figures([raw(0.2)])
    slow = train_step.figures([raw(0.2, fetch=0.1, stall_share=0.25)])
    result = {"arms": {"text": arm}, "supply": {"supply_0.8": slow}, "ratios": {"text_over_plain": 0.9}}
    lines = train_step.table(result).splitlines()
    assert lines[2] == "| `text` | 200 | 100 |  |  |  | 80 | 100 |  | 20 |  |  | 300 | 100 |"
    assert lines[3] == "| `supply_0.8` | 200 | 100 |  |  |  | 80 | 100 |  | 20 | 100 | 25.0% | 300 | 100 |"
    assert lines[-1] == "| `text_over_plain` | 0.90 |"
    assert len({line.count("|") for line in lines[:4]}) == 1
