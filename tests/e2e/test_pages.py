"""Tests of the web pages of a teacher server and of a training run, in a real browser, while both are working."""

from __future__ import annotations

import contextlib
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
from tests.support.training import World, make_world

pytestmark = pytest.mark.slow

NAME = "<b>qwen</b><script>alert(1)</script>"
LOOKS: list[tuple[tuple[int, int], Scheme]] = [
    (size, scheme) for size in (PHONE, DESKTOP) for scheme in ("light", "dark")
]
# The number of charts that reach into the next one.
TOO_WIDE = """[...document.querySelectorAll("figure.chart")].filter(
  (figure) => figure.querySelector("canvas").getBoundingClientRect().right > figure.getBoundingClientRect().right + 1
).length"""
PLAN = KVPlan(layers=(0, 1), selection=Selection(selector="full", span="all"), codec=CodecSpec(name="int8"))


@dataclass
class Training:
    """A training run and the address of its page."""

    process: subprocess.Popen[bytes]
    url: str
    saved: Path

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
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def training(world: World, teacher: TeacherProcess) -> Iterator[Training]:
    """A run that outlasts the tests, with a replica that does not answer and HTML in its name."""
    endpoints = {"ada": ["127.0.0.1:1", teacher.endpoint], "ben": [teacher.endpoint]}
    with running_training(world, endpoints, "<i>night", 100_000) as training:
        # Requests take time from the training process.
        wait_until(lambda: training.step() > 5, 100, every_s=0.5)
        yield training


@contextlib.contextmanager
def running_training(world: World, endpoints: dict[str, list[str]], name: str, steps: int) -> Iterator[Training]:
    """A run inside the block, which starts when its page can be read."""
    output = world.directory / name
    run = {"output_dir": str(output), "steps": steps, "eval_every": 5}
    config = world.config("night", endpoints, run=run, align={"calibration_samples": 16})
    path, log = world.directory / "run.yaml", world.directory / f"{name}.log"
    path.write_text(yaml.safe_dump({**config, "monitor": {"port": 0}}), encoding="utf-8")
    command = [sys.executable, "-m", "kvdistill", "train", "--config", str(path)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=out, stderr=out)
    try:
        wait_until(lambda: "monitor: " in log.read_text(encoding="utf-8") or process.poll() is not None)
        yield Training(process, address(log), output / "run.html")
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
        assert page.page.locator("main b:not(.key b), main script:not([type='application/json'])").count() == 0
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
        titles = [title.strip() for title in page.page.locator("figure h3").all_inner_texts()]
        assert titles[:4] == ["Cross-entropy", "KV loss", "Validation accuracy", "Routing weights"]
        assert {"Learning rate", "Memory of rank 0"} <= {*titles}
        assert page.page.locator("figure canvas").count() == len(titles)
        assert "Answers in the last validation" in page_text
        has_values_under_the_pointer(page)
        updates_in_place(page, f"main.querySelector('progress').value > {training.step()}")
        assert_no_defects(page)
        assert page.page.locator("main i:not(.key i, .mark i)").count() == 0
        training.process.send_signal(signal.SIGTERM)
        page.page.wait_for_selector("main [data-ended]")
        assert "stopped by a signal" in page.page.inner_text(".state")
        page.page.wait_for_selector("#stale:not([hidden])")
        assert page.page.inner_text("#stale").startswith("The run has ended. ")
        assert training.process.wait(60) == 143
    with shown(browser, training.saved.as_uri()) as page:
        assert "stopped by a signal" in page.page.inner_text(".state.bad")
        assert page.page.locator("figure canvas").count() == len(titles)
        has_values_under_the_pointer(page)
        assert_no_defects(page)


def test_an_open_page_shows_that_the_run_has_finished(browser: Browser, world: World, teacher: TeacherProcess) -> None:
    endpoints = {"ada": [teacher.endpoint], "ben": [teacher.endpoint]}
    with running_training(world, endpoints, "short", 8) as training, shown(browser, training.url) as page:
        page.page.wait_for_selector("main [data-ended]", timeout=100_000)
        for part in ("Finished after 0:0", "8 of 8", "accuracy", "Answers in the last validation"):
            assert part in page.texts(), part
        page.page.wait_for_selector("#stale:not([hidden])")
        assert page.page.inner_text("#stale").startswith("The run has ended. ")
        assert training.process.wait(60) == 0
        assert training.saved.is_file()


def test_a_page_of_a_process_that_was_killed_says_since_when_it_does_not_answer(
    browser: Browser, tmp_path: Path
) -> None:
    with (
        running_teacher("fake:layers=3", tmp_path / "log", engine="fake", name="ada") as teacher,
        shown(browser, teacher.url("/")) as page,
    ):
        teacher.process.kill()
        page.page.wait_for_selector("#stale:not([hidden])")
        assert page.page.inner_text("#stale").startswith("No answer since ")
        assert page.page.locator("body.old .state").count() == 1, "the last state is not shown as the present one"


def has_values_under_the_pointer(page: Shown) -> None:
    """Check that all charts show the step under the pointer, and that the charts can be logarithmic and smoothed."""
    page.set_appearance(DESKTOP, "light")
    page.page.locator(".u-over").first.scroll_into_view_if_needed()
    page.page.locator(".u-over").first.hover()
    page.page.wait_for_function("document.querySelector('.at').textContent.startsWith('step ')")
    assert page.page.locator(".chart .key b").first.inner_text()
    page.page.locator(".controls input").check()
    page.page.locator(".controls select").select_option("0.9")
    assert page.page.evaluate(TOO_WIDE) == 0
    page.page.locator(".controls select").select_option("0")
    page.page.locator(".controls input").uncheck()
