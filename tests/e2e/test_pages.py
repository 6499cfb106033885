"""Tests of the web pages of a teacher server and of a training run, in a real browser, while both are working."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml
from playwright.sync_api import Browser
from prometheus_client.parser import text_string_to_metric_families

from kvcore.plan import CodecSpec, KVPlan, Selection
from tests.support.browser import DESKTOP, PHONE, Scheme, Shown, chromium, shown
from tests.support.servers import (
    REPOSITORY,
    TeacherClient,
    TeacherProcess,
    refused,
    running_teacher,
    token_samples,
    wait_until,
)
from tests.support.training import make_world

pytestmark = pytest.mark.slow

NAME = "<b>qwen</b><script>alert(1)</script>"
LOOKS: list[tuple[tuple[int, int], Scheme]] = [
    (size, scheme) for size in (PHONE, DESKTOP) for scheme in ("light", "dark")
]
PLAN = KVPlan(layers=(0, 1), selection=Selection(selector="full", span="all"), codec=CodecSpec(name="int8"))


@dataclass
class Training:
    """A training run and the address of its page."""

    process: subprocess.Popen[bytes]
    url: str

    def step(self) -> int:
        return httpx.get(f"{self.url}state.json").json()["step"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    log = tmp_path_factory.mktemp("teacher") / "log"
    with running_teacher("fake:layers=3", log, engine="fake", name=NAME, stream_window_bytes=1 << 20) as teacher:
        yield teacher


@pytest.fixture(scope="module")
def training(teacher: TeacherProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    """A run that outlasts the tests, with a replica that does not answer and HTML in its name."""
    world = make_world(tmp_path_factory.mktemp("world"))
    endpoints = {"ada": ["127.0.0.1:1", teacher.endpoint], "ben": [teacher.endpoint]}
    long = {"output_dir": str(world.directory / "<i>night"), "steps": 100_000, "eval_every": 5}
    config = world.config("night", endpoints, run=long, align={"calibration_samples": 16})
    path, log = world.directory / "run.yaml", world.directory / "log"
    path.write_text(yaml.safe_dump({**config, "monitor": {"port": 0}}), encoding="utf-8")
    command = [sys.executable, "-m", "kvdistill", "train", "--config", str(path)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=out, stderr=out)
    try:
        wait_until(lambda: "monitor: " in log.read_text(encoding="utf-8") or process.poll() is not None)
        url = address(log)
        training = Training(process, url)
        wait_until(lambda: training.step() > 5)
        yield training
    finally:
        process.kill()
        process.wait()


def address(log: Path) -> str:
    text = log.read_text(encoding="utf-8")
    assert "monitor: " in text, text
    return text.split("monitor: ")[1].split()[0]


def assert_no_defects(page: Shown) -> None:
    for size, scheme in LOOKS:
        page.set_appearance(size, scheme)
        assert page.overflow_pixels() <= 0, (size, scheme)
        assert page.low_contrast_texts() == [], (size, scheme)
        assert page.legends_without_a_curve() == 0, (size, scheme)
        assert (page.background_brightness() < 64) == (scheme == "dark")
    assert page.complaints == []
    assert page.requests_to_other_hosts() == []


def updates_in_place(page: Shown, condition: str) -> None:
    """Wait until a condition on `main` holds, and check that the page was not reloaded or scrolled."""
    page.set_appearance(PHONE, "light")
    page.page.evaluate("scrollTo(0, 200)")
    page.page.evaluate("window.kept = true")
    page.page.wait_for_function(f"() => {{ const main = document.querySelector('main'); return {condition} }}")
    assert page.page.evaluate("[scrollY, window.kept]") == [200, True]


def test_teacher_page_shows_the_model_the_open_calls_and_the_errors(browser: Browser, teacher: TeacherProcess) -> None:
    bad = KVPlan(layers=(0, 99), selection=PLAN.selection, codec=PLAN.codec)
    with shown(browser, teacher.url("/")) as page, TeacherClient(teacher.endpoint) as client:
        assert page.page.inner_text("h1") == NAME
        assert "No request is open." in page.texts()
        refused(lambda: list(client.call(bad, token_samples(1, 4))))
        open_stream = client.call(PLAN, token_samples(200, 4000), "night/step7")
        next(open_stream)
        updates_in_place(page, "main.innerText.includes('800,000')")
        page_text = page.texts()
        for part in ("Ready, up for 0:0", "3 layers of 2 KV heads of 16", "tokens/s", "of at most 128", "night/step7"):
            assert part in page_text, part
        assert "INVALID_ARGUMENT (Describe)" not in page_text
        assert "INVALID_ARGUMENT (StreamKV)" in page_text
        assert_no_defects(page)
        assert page.page.locator("main b, main script").count() == 0
        open_stream.cancel()


def test_metrics_of_a_run_cover_the_run_and_each_teacher(training: Training) -> None:
    text = httpx.get(f"{training.url}metrics").text
    found = {
        (sample.name.removeprefix("kvdistill_train_"), *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["step",] > 5
    assert found["planned_steps",] == 100_000
    # Each step has 8 samples. A teacher's samples are counted when their step is logged.
    assert found["samples_total",] == 8 * found["step",]
    for teacher in ("ada", "ben"):
        assert 8 * 5 <= found["teacher_samples_total", teacher] <= found["samples_total",]
        assert found["teacher_missing_samples_total", teacher] == 0
        assert found["teacher_received_bytes_total", teacher] > 0
        assert found["teacher_stage_seconds_total", teacher, "prefill"] > 0
        assert found["teacher_weight_ratio", teacher] == 0.5
        assert found["teacher_staleness_seconds", teacher] < 120
    assert found["teacher_endpoint_up", "127.0.0.1:1", "ada"] == 0
    assert [key[0] for key, value in found.items() if key[0] in ("bottleneck", "phase") and value] == [
        "phase",
        "bottleneck",
    ]
    assert found["busy_seconds_total", "train"] > found["busy_seconds_total", "align"] > 0
    assert {("loss", "loss"), ("loss", "kv_loss"), ("validation_kv_loss",), ("stall_ratio",)} <= set(found)


def test_page_of_a_run_updates_and_shows_when_the_run_has_ended(browser: Browser, training: Training) -> None:
    with shown(browser, training.url) as page:
        assert page.page.inner_text("h1") == "<i>night"
        page_text = page.texts()
        for part in ("of 100,000", "time left", "KV loss", "stall", "accuracy", "bottleneck", "1 of 2 up", "1 of 1 up"):
            assert part in page_text, part
        assert "127.0.0.1:1 does not answer" in page_text
        titles = page.page.locator("figure h3").all_inner_texts()
        assert titles[:2] == ["Loss", "KV loss (1: predicting the mean)"]
        assert "Routing weights" in titles
        assert page.page.locator("figure polyline").count() >= 7
        updates_in_place(page, f"main.querySelector('progress').value > {training.step()}")
        assert_no_defects(page)
        assert page.page.locator("main i:not(.key i)").count() == 0
        training.process.send_signal(signal.SIGTERM)
        page.page.wait_for_selector("#stale:not([hidden])")
        assert page.page.inner_text("#stale").startswith("No answer since ")
        assert training.process.wait(60) == 1
