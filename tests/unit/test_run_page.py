"""Tests of the page of a run: steps, metrics, time and teachers."""

from __future__ import annotations

import json
import math
from html import unescape
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from student_trainer.config import TrainConfig
from student_trainer.kv_sources.kv_batch import STAGES, TeacherSums
from student_trainer.monitoring.run_page import add_live_page, render_page
from student_trainer.monitoring.run_state import RunState
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
    assert "Routing weights" in shown
    assert "<b>ada</b> 0.75 ben 0.25" in shown


def test_names_are_escaped(config: TrainConfig, run: RunState) -> None:
    page = render_page(config, run.snapshot())
    assert "<b>" not in page
    assert page.count("<script") == 1


def test_page_before_the_first_step_has_no_metrics(config: TrainConfig) -> None:
    shown = words(render_page(config, RunState().snapshot()))
    assert "Starting" in shown
    assert "No step yet." in shown
    assert "time left" not in shown
    assert "Teachers" not in shown


def test_failed_run_is_marked(config: TrainConfig, run: RunState) -> None:
    run.phase = "failed"
    assert 'class="state bad"' in render_page(config, run.snapshot())


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
    assert "script-src 'sha256-" in policy
