"""Tests of the stage runner: order, stop at the first failure, totals, and the proto check."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import run_checks
from scripts.run_checks import ROOT, Run, Totals, main, proto_is_fresh_and_clean


class ThreeStages(Run):
    """Three stages that only record that they ran. The second one can be set to fail."""

    def __init__(self, second_passes: bool) -> None:
        super().__init__()
        self.ran: list[str] = []
        self.second_passes = second_passes

    def stages(self) -> dict[str, Callable[[], bool]]:
        return {
            "a": self.recorded("a", True),
            "b": self.recorded("b", self.second_passes),
            "c": self.recorded("c", True),
        }

    def recorded(self, name: str, passes: bool) -> Callable[[], bool]:
        def stage() -> bool:
            self.ran.append(name)
            return passes

        return stage


def test_passing_stages_all_run_and_show_their_times(capsys: pytest.CaptureFixture[str]) -> None:
    run = ThreeStages(second_passes=True)
    assert run.execute(["a", "b", "c"])
    assert run.ran == ["a", "b", "c"]
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if line.endswith(" s  passed")] == ["a", "b", "c"]


def test_failing_stage_ends_the_run_and_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    run = ThreeStages(second_passes=False)
    assert not run.execute(["a", "b", "c"])
    assert run.ran == ["a", "b"]
    assert "stage 'b' failed" in capsys.readouterr().out


def test_totals_add_up_over_real_pytest_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tests(tmp_path / "tests" / "unit", "def test_a(): pass\ndef test_b(): pass\n")
    write_tests(
        tmp_path / "tests" / "e2e",
        "import pytest\ndef test_c(): assert False\n@pytest.mark.skip\ndef test_d(): pass\n"
        "@pytest.fixture\ndef broken(): raise ValueError\ndef test_e(broken): pass\n",
    )
    monkeypatch.setattr(run_checks, "ROOT", tmp_path)
    run = Run()
    assert run.pytest("unit")
    assert not run.pytest("e2e")
    assert run.totals == Totals(passed=2, failed=1, errors=1, skipped=1)
    assert str(run.totals) == "1 failed, 2 passed, 1 skipped, 1 errors"


def test_folder_without_tests_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tests(tmp_path / "tests" / "unit", "")
    monkeypatch.setattr(run_checks, "ROOT", tmp_path)
    assert not Run().pytest("unit")


def write_tests(folder: Path, source: str) -> None:
    folder.mkdir(parents=True)
    (folder / "test_example.py").write_text(source, encoding="utf-8")


def test_every_folder_of_tests_is_a_stage() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders <= set(Run().stages())


def test_unknown_stage_is_refused_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run_checks.py", "lnit"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "unknown stage lnit; stages: lint types imports proto docs unit" in capsys.readouterr().err


@pytest.fixture
def proto_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "protos", tmp_path / "protos", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    monkeypatch.setattr(run_checks, "ROOT", tmp_path)
    return tmp_path / "protos"


def test_committed_proto_code_is_up_to_date_and_clean(proto_copy: Path) -> None:
    assert proto_copy.is_dir()
    assert proto_is_fresh_and_clean()


@pytest.mark.parametrize("name", ["kv_cache_pb2.py", "kv_cache_pb2.pyi", "kv_cache_pb2_grpc.py"])
def test_edited_generated_code_is_detected(name: str, proto_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (proto_copy / name).open("a", encoding="utf-8") as file:
        file.write("# edited\n")
    assert not proto_is_fresh_and_clean()
    assert f"protos/{name}: does not match" in capsys.readouterr().out


def test_field_missing_from_generated_code_is_detected(proto_copy: Path) -> None:
    proto = proto_copy / "kv_cache.proto"
    proto.write_text(proto.read_text(encoding="utf-8") + "\nmessage Added { int32 x = 1; }\n", encoding="utf-8")
    assert not proto_is_fresh_and_clean()


def test_proto_that_violates_the_lint_rules_is_refused(proto_copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    proto = proto_copy / "kv_cache.proto"
    proto.write_text(proto.read_text(encoding="utf-8") + "\nmessage added { int32 X = 1; }\n", encoding="utf-8")
    assert run_checks.generate_proto(proto_copy.parent)
    assert not proto_is_fresh_and_clean()
    assert 'Field name "X" should be lower_snake_case' in "".join(capfd.readouterr())
