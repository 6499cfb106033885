"""Tests of `doctor`, `inspect` and `plan` against a real server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from align.head_dim_adapter import KVGeometry
from align.teacher_plan import plan_for
from data.records import load_records
from extraction.teachers import model_geometry
from kvcore.config import parse
from kvcore.types import EncodedSampleKV
from kvdistill.inspection import inspect
from kvdistill.plan_summary import plan_text
from student_trainer.config import TrainConfig
from student_trainer.kv_sources.remote import RemoteSource
from tests.support.servers import REPOSITORY, TeacherProcess, running_teacher
from tests.support.training import LATENTS, World, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[TeacherProcess]:
    with running_teacher(world.teachers["ada"], world.directory / "ada.log", name="ada") as teacher:
        yield teacher


def test_doctor_finds_the_real_packages_and_the_server(server: TeacherProcess, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvdistill", "doctor", "--teacher", server.endpoint, "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {line[1] for line in lines if line[0] == "ok"} >= {"python", "torch", "transformers", "deepspeed", "grpc"}
    assert f"teacher {server.endpoint}  ada: 3 layers, 2 KV heads of 16" in done.stdout


def test_inspect_shows_server_description(server: TeacherProcess) -> None:
    shown, described = inspect(server.endpoint), server.info()
    assert described["teacher"]["weights_digest"] in shown
    assert "3 layers, 2 KV heads of 16" in shown
    assert "384 bytes per token (bf16)" in shown


def test_planned_bytes_equal_sent_bytes(world: World, server: TeacherProcess) -> None:
    changes: dict[str, Any] = {"kv": {"selection": {"selector": "full"}}, "align": {"time": "linear"}}
    config = parse(world.config("run", {"ada": [server.endpoint]}, **changes), TrainConfig)
    student = model_geometry(str(world.student), "student.path")

    def plan(info: Any) -> Any:
        teacher = KVGeometry(info.layers, info.kv_heads, info.head_dim)
        return plan_for(student, teacher, selection=config.kv.selection, codec=config.kv.codec)

    samples = [record.sample() for record in load_records(world.train)]
    with closing(RemoteSource("ada", server.endpoint, plan)) as source:
        source.connect()
        sent = source.fetch(samples)
    assert all(isinstance(kv, EncodedSampleKV) for kv in sent)
    sizes = [kv.nbytes + kv.positions.nbytes for kv in sent if isinstance(kv, EncodedSampleKV)]
    slots = [kv.slots for kv in sent if isinstance(kv, EncodedSampleKV)]
    assert max(slots) > LATENTS
    *_, row = (line for line in plan_text(config, []).splitlines() if line.startswith("ada "))
    assert row.split()[1:4] == [f"{sum(slots) / len(slots):.1f}", f"{sum(sizes) / len(sizes) / 1000:.1f}", "kB"]
