"""Tests of the monitoring server of rank 0 and its Prometheus metrics."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvcore.errors import FieldError
from student_trainer.config import TrainConfig
from student_trainer.kv_sources.kv_batch import STAGES, TeacherSums
from student_trainer.monitoring.monitor import monitored
from student_trainer.monitoring.run_state import RunState
from tests.support.begun_run import half_dead_teacher
from tests.support.kv_fakes import MemorySource
from tests.support.training_parts import one_rank, train_config

Series = dict[tuple[str, ...], float]


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    with one_rank():
        yield


def config(tmp_path: Path, port: int | None) -> TrainConfig:
    return train_config(run={"output_dir": str(tmp_path / "outputs" / "night")}, monitor={"port": port})


def read(text: str, name: str) -> Series:
    """Values of a metric by its label values, which are sorted by label name."""
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"kvdistill_train_{name}"
    }


def url_in(messages: list[str]) -> str:
    return next(message.removeprefix("monitor: ") for message in messages if message.startswith("monitor: "))


def fill_state(state: RunState) -> None:
    """Fills the state of a run after some steps: one teacher has a live and a dead replica, the other is a store."""
    state.connected({"ada": half_dead_teacher(), "ben": MemorySource()})
    state.begin(100, first_step=10)
    state.phase = "training"
    state.stepped(11, 64)
    state.log(11, {"train/loss": 2.0, "train/kv_loss": 0.5, "train/lr": 1e-3, "routing/weights_mean/ada": 0.75})
    sent = TeacherSums(64, 3, 4096.0, dict.fromkeys(STAGES, 0.25) | {"prefill": 2.0})
    state.account(1.0, {"stall": 0.75, "prefill": 2.0, "queue": 0.25}, {"ada": sent})


def test_metrics_report_the_run_and_each_teacher(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), monitored(config(tmp_path, 0), enabled=True) as state:
        fill_state(state)
        url = url_in(caplog.messages)
        assert httpx.get(f"{url}healthz").text == "ok\n"
        text = httpx.get(f"{url}metrics").text
    uvicorn_messages = [record.getMessage() for record in caplog.records if record.name.startswith("uvicorn")]
    assert uvicorn_messages == [], "the run's log is for people who follow the run"
    assert read(text, "step") == {(): 11}
    assert read(text, "planned_steps") == {(): 100}
    assert read(text, "samples_total") == {(): 64}
    assert read(text, "loss") == {("loss",): 2.0, ("kv_loss",): 0.5}
    assert read(text, "learning_rate") == {(): 1e-3}
    assert read(text, "teacher_weight_ratio") == {("ada",): 0.75}
    assert read(text, "teacher_samples_total") == {("ada",): 64, ("ben",): 0}
    assert read(text, "teacher_missing_samples_total")[("ada",)] == 3
    assert read(text, "teacher_received_bytes_total")[("ada",)] == 4096
    assert read(text, "teacher_stage_seconds_total")[("prefill", "ada")] == 2.0
    assert read(text, "teacher_endpoint_up") == {("alive:2", "ada"): 1, ("dead:1", "ada"): 0}
    assert read(text, "teacher_switches_total") == {("ada",): 1}
    assert 0 <= read(text, "teacher_staleness_seconds")[("ada",)] < 60
    assert [stage for stage, value in read(text, "bottleneck").items() if value] == [("prefill",)]
    assert [phase for phase, value in read(text, "phase").items() if value] == [("training",)]
    assert read(text, "disk_free_bytes")[()] > 0


def test_a_run_before_its_first_step_has_only_known_metrics(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), monitored(config(tmp_path, 0), enabled=True):
        text = httpx.get(f"{url_in(caplog.messages)}metrics").text
    assert read(text, "phase")[("starting",)] == 1
    for name in ("loss", "eta_seconds", "last_step_timestamp_seconds", "teacher_weight_ratio", "stall_ratio"):
        assert read(text, name) == {}, name


@pytest.mark.parametrize(("port", "enabled"), [(None, True), (0, False)])
def test_only_rank_0_listens_and_only_with_a_port(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, port: int | None, enabled: bool
) -> None:
    with caplog.at_level("INFO"), monitored(config(tmp_path, port), enabled=enabled) as state:
        assert state.phase == "starting"
    assert caplog.messages == []
    assert state.phase == "done"


def test_a_free_port_replaces_one_in_use(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with caplog.at_level("INFO"), monitored(config(tmp_path, port), enabled=True):
            assert httpx.get(f"{url_in(caplog.messages)}healthz").text == "ok\n"
    assert f"monitor.port: port {port} is in use; listening on a free port instead" in caplog.messages


def test_an_address_of_another_machine_ends_the_run_before_it_starts(tmp_path: Path) -> None:
    there = train_config(run={"output_dir": str(tmp_path)}, monitor={"host": "192.0.2.1", "port": 0})
    refused = pytest.raises(FieldError, match=r"monitor.port: cannot listen on 192.0.2.1:0")
    with refused, monitored(there, enabled=True):
        pytest.fail("it went on")


@pytest.mark.parametrize("path", ["", "metrics"])
def test_an_open_page_and_prometheus_see_that_the_run_has_finished(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    ended = {"": "Finished", "metrics": 'kvdistill_train_phase{phase="done"} 1.0'}[path]
    assert last_answer(tmp_path, caplog, path).count(ended) == 1


def test_an_open_page_sees_why_the_run_has_failed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "Failed at step 0: the disk is full" in last_answer(tmp_path, caplog, "", OSError("the disk is full"))


def test_page_of_a_run_is_saved_at_its_end(tmp_path: Path) -> None:
    saved = tmp_path / "outputs" / "night" / "run.html"
    saved.parent.mkdir(parents=True)
    full = OSError("the disk is full")
    with contextlib.suppress(OSError), monitored(config(tmp_path, None), enabled=True) as state:
        fill_state(state)
        raise full
    failed = saved.read_text(encoding="utf-8")
    assert "Failed at step 11: the disk is full" in failed
    with monitored(config(tmp_path, None), enabled=True) as state:
        fill_state(state)
    assert "Finished" in saved.read_text(encoding="utf-8")


def test_a_command_that_is_refused_leaves_the_page_of_an_earlier_run(tmp_path: Path) -> None:
    saved = tmp_path / "outputs" / "night" / "run.html"
    saved.parent.mkdir(parents=True)
    saved.write_text("earlier", encoding="utf-8")
    with pytest.raises(FieldError), monitored(config(tmp_path, None), enabled=True):
        raise FieldError("data.train", "is missing")
    assert saved.read_text(encoding="utf-8") == "earlier"


def last_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture, path: str, error: OSError | None = None) -> str:
    """What the last of several reads got: one during the run, and more until the server has stopped."""
    answers: list[str] = []
    raised = contextlib.nullcontext() if error is None else pytest.raises(OSError, match=str(error))
    with caplog.at_level("INFO"), raised, monitored(config(tmp_path, 0), enabled=True):
        url = url_in(caplog.messages) + path
        answers.append(httpx.get(url).text)

        def read_on() -> None:
            with contextlib.suppress(httpx.HTTPError):
                while True:
                    answers.append(httpx.get(url).text)

        reader = threading.Timer(0.5, read_on)
        reader.start()
        if error is not None:
            raise error
    reader.join()
    return answers[-1]


def test_the_port_is_released_after_the_run_and_after_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    states: list[RunState] = []
    failed = pytest.raises(RuntimeError)
    with caplog.at_level("INFO"), failed, monitored(config(tmp_path, 0), enabled=True) as state:
        states.append(state)
        raise RuntimeError
    assert states[0].phase == "failed"
    port = int(url_in(caplog.messages).rsplit(":", 1)[1].rstrip("/"))
    with socket.create_server(("127.0.0.1", port)):
        pass
