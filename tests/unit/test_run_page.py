"""Tests of the page of a run: steps, metrics, time and teachers."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from student_trainer.config import TrainConfig
from student_trainer.kv_sources.kv_batch import STAGES, TeacherSums
from student_trainer.monitoring.run_charts import run_charts
from student_trainer.monitoring.run_page import add_live_page, render_page
from student_trainer.monitoring.run_state import Prediction, RunState
from tests.support.begun_run import begun_run
from tests.support.training_parts import train_config


@pytest.fixture
def config() -> TrainConfig:
    return train_config(run={"output_dir": "outputs/night<script>"})


@pytest.fixture
def run() -> RunState:
    """A run after one of ten steps. One teacher has a live and a dead replica, the other comes from a store."""
    figures = {"train/loss": 2.5, "train/kv_loss": 0.875, "train/samples_per_second": 1210.4, "val/loss": math.nan}
    weights = {"routing/weights_mean/<b>ada</b>": 0.75, "routing/weights_mean/ben": 0.25}
    waiting = {"kv/stall_fraction": 0.051, "kv/bytes_per_sample": 4096.0}
    state = begun_run("<b>ada</b>", figures | weights | waiting)
    sums = TeacherSums(64, 3, 64 * 2048.0, dict.fromkeys(STAGES, 0.064) | {"prefill": 0.64})
    state.account(4.0, {"stall": 1.0, "decode": 0.5, "align": 0.5, "prefill": 0.1}, {"<b>ada</b>": sums})
    return state


def words(page: str) -> str:
    """The text of a page without tags."""
    inside = page[page.index("<main>") : page.index("</main>")]
    inside = re.sub("<script.*?</script>", "", inside)
    return " ".join(unescape("".join(f" {part.split('>', 1)[-1]}" for part in inside.split("<"))).split())


def test_page_shows_progress_and_metrics(config: TrainConfig, run: RunState) -> None:
    shown = words(render_page(config, run.snapshot()))
    assert "Training, running for 0:00:0" in shown
    for part in (
        "step 1 of 10",
        "loss 2.5 training",
        "KV loss 0.875",
        "samples/s 1,210",
        "stall 5.1%",
        "K/V per sample 4.1 kB",
        "stall 25.0% decode 12.5% align 12.5% train 50.0%",
        "bottleneck train",
    ):
        assert part in shown, part


def test_page_shows_the_health_of_each_teacher(config: TrainConfig, run: RunState) -> None:
    shown = words(render_page(config, run.snapshot()))
    assert "<b>ada</b> 1 of 2 up alive:2 0:00:00 ago 1 1 64 3 2.0 kB" in shown
    assert "ben from the store - - - - 0 0 -" in shown
    assert "<b>ada</b>: dead:1 does not answer: UNAVAILABLE: connection refused" in shown
    assert "<b>ada</b> 1 10 1 1 1 1" in shown


def test_charts_have_one_colour_per_teacher_in_the_order_of_the_configuration(run: RunState) -> None:
    run.log(1, {"routing/weights_mean/ada": 0.75})
    charts = {chart.title: chart for chart in run_charts(run.snapshot(), ["ben", "cai", "ada"])}
    assert [*charts["Routing weights"].curves] == ["ben", "cai", "ada"]
    assert charts["KV loss"].lines[1] == (1.0, "predicts the mean")


def test_page_marks_best_models_checkpoints_and_failovers(config: TrainConfig, run: RunState) -> None:
    run.note("checkpoint", "checkpoint")
    run.stepped(2, 64)
    run.note("best", "best validation so far")
    run.log(3, {"kv/switches/ben": 0.0})
    run.log(4, {"kv/switches/ben": 2.0})
    run.log(5, {"kv/switches/ben": 2.0})
    assert data_of(render_page(config, run.snapshot()))["events"] == [
        {"step": 1, "kind": "checkpoint", "text": "checkpoint"},
        {"step": 2, "kind": "best", "text": "best validation so far"},
        {"step": 4, "kind": "failover", "text": "failover of ben"},
    ]


def test_page_shows_answers_of_the_last_validation(config: TrainConfig, run: RunState) -> None:
    assert "Answers" not in words(render_page(config, run.snapshot()))
    run.validated([Prediction("1 + 1 = <b>?", "2", "3" * 400, correct=False)])
    shown = words(render_page(config, run.snapshot()))
    assert f"Answers in the last validation prompt expected answer correct 1 + 1 = <b>? 2 {'3' * 300}… no" in shown


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json">(.*?)</script>', page)
    assert found
    return json.loads(found[1])


def test_names_are_escaped(config: TrainConfig, run: RunState) -> None:
    page = render_page(config, run.snapshot())
    assert "<b>" not in page
    assert page.count("<script") == 4, "the data of the charts and three scripts"


def test_page_before_the_first_step_has_no_metrics(config: TrainConfig) -> None:
    shown = words(render_page(config, RunState().snapshot()))
    assert "Loading the student" in shown
    assert "No step yet." in shown
    assert "time left" not in shown
    assert "Teachers" not in shown


def test_failed_run_is_marked_with_its_problem(config: TrainConfig, run: RunState) -> None:
    run.phase, run.problem = "failed", "<b>ada</b> is gone"
    page = render_page(config, run.snapshot())
    assert 'class="state bad"' in page
    assert "Failed at step 1: <b>ada</b> is gone" in words(page)
    assert "<title>Failed: night" in page


def test_finished_run_says_so_and_names_the_saved_page(config: TrainConfig, run: RunState) -> None:
    run.phase = "done"
    page = render_page(config, run.snapshot())
    assert "Finished after 0:00:0" in words(page)
    assert "time left" not in words(page)
    assert 'data-ended="The run has ended. outputs/night&lt;script&gt;/run.html is this page as a file."' in page


def test_state_json_has_the_whole_state_with_null_for_non_finite_values(config: TrainConfig, run: RunState) -> None:
    app = FastAPI()
    add_live_page(app, config, run)
    client = TestClient(app)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    state: dict[str, Any] = json.loads(client.get("/state.json").text, parse_constant=refuse)
    assert (state["step"], state["steps"], state["phase"]) == (1, 10, "training")
    assert state["history"]["train/loss"] == [[1, 2.5]]
    assert state["scalars"]["val/loss"] is None
    assert state["teachers"]["<b>ada</b>"]["health"]["endpoints"][0]["problem"]
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
