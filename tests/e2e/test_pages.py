"""The pages of a teacher server and of a training run, in a real browser, while both are at work."""

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
    """A run, and where its page is."""

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
    """A run of far more steps than it will take, with a replica that does not answer and a name that is no markup."""
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


def has_no_fault(page: Shown) -> None:
    for size, scheme in LOOKS:
        page.looks(size, scheme)
        assert page.too_wide() <= 0, (size, scheme)
        assert page.faint() == [], (size, scheme)
        assert page.legends_without_a_curve() == 0, (size, scheme)
        assert (page.ground() < 64) == (scheme == "dark")
    assert page.complaints == []
    assert page.elsewhere() == []


def stays_where_it_is(page: Shown, condition: str) -> None:
    """Waits until something holds of `main`, without the page being loaded anew or scrolled."""
    page.looks(PHONE, "light")
    page.page.evaluate("scrollTo(0, 200)")
    page.page.evaluate("window.kept = true")
    page.page.wait_for_function(f"() => {{ const main = document.querySelector('main'); return {condition} }}")
    assert page.page.evaluate("[scrollY, window.kept]") == [200, True]


def test_a_teachers_page_says_what_it_is_who_is_connected_and_what_went_wrong(
    browser: Browser, teacher: TeacherProcess
) -> None:
    bad = KVPlan(layers=(0, 99), selection=PLAN.selection, codec=PLAN.codec)
    with shown(browser, teacher.url("/")) as page, TeacherClient(teacher.endpoint) as client:
        assert page.page.inner_text("h1") == NAME
        assert "No request is open." in page.texts()
        refused(lambda: list(client.call(bad, token_samples(1, 4))))
        open_stream = client.call(PLAN, token_samples(200, 4000), "night/step7")
        next(open_stream)
        stays_where_it_is(page, "main.innerText.includes('800,000')")
        said = page.texts()
        for part in ("Ready, up for 0:0", "3 layers of 2 KV heads of 16", "tokens/s", "of at most 128", "night/step7"):
            assert part in said, part
        assert "INVALID_ARGUMENT (Describe)" not in said
        assert "INVALID_ARGUMENT (StreamKV)" in said
        has_no_fault(page)
        assert page.page.locator("main b, main script").count() == 0
        open_stream.cancel()


def test_a_runs_metrics_follow_it_and_each_of_its_teachers(training: Training) -> None:
    text = httpx.get(f"{training.url}metrics").text
    found = {
        (sample.name.removeprefix("kvdistill_train_"), *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["step",] > 5
    assert found["planned_steps",] == 100_000
    # Of each step's 8 samples; a sample counts for a teacher once its step is logged.
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


def test_a_runs_page_follows_it_and_says_so_when_it_has_ended(browser: Browser, training: Training) -> None:
    with shown(browser, training.url) as page:
        assert page.page.inner_text("h1") == "<i>night"
        said = page.texts()
        for part in ("of 100,000", "time left", "KV loss", "stall", "accuracy", "bottleneck", "1 of 2 up", "1 of 1 up"):
            assert part in said, part
        assert "127.0.0.1:1 does not answer" in said
        titles = page.page.locator("figure h3").all_inner_texts()
        assert titles[:2] == ["Loss", "KV loss (1: predicting the mean)"]
        assert "Routing weights" in titles
        assert page.page.locator("figure polyline").count() >= 7
        stays_where_it_is(page, f"main.querySelector('progress').value > {training.step()}")
        has_no_fault(page)
        assert page.page.locator("main i:not(.key i)").count() == 0
        training.process.send_signal(signal.SIGTERM)
        page.page.wait_for_selector("#stale:not([hidden])")
        assert page.page.inner_text("#stale").startswith("No answer since ")
        assert training.process.wait(60) == 1
