"""Tests of the command line: fast help, flags of the configuration, one-line errors and exit statuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvcore import early_checks
from kvcore.errors import TeacherUnavailableError
from kvdistill.cli import main
from teacher_server.config import ServeConfig

HEAVY = {"torch", "transformers", "deepspeed", "grpc", "fastapi", "numpy", "matplotlib"}
MINIMAL_RUN = """
student: {path: student}
data: {train: train.jsonl}
run: {output_dir: out, steps: 10}
"""


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs the command line in this process and returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["kvdistill", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def write_run(directory: Path) -> Path:
    """A configuration whose student and data pass the checks before torch is imported."""
    (directory / "train.jsonl").touch()
    config = directory / "run.yaml"
    config.write_text(MINIMAL_RUN.replace("train.jsonl", str(directory / "train.jsonl")), encoding="utf-8")
    return config


def replace_import(monkeypatch: pytest.MonkeyPatch, module: str, function: str, stand_in: Any) -> None:
    """Replaces a function in the module that a command imports, so that no heavy package is loaded."""
    made = ModuleType(module)
    setattr(made, function, stand_in)
    monkeypatch.setitem(sys.modules, module, made)


def test_cli_does_not_import_heavy_packages() -> None:
    code = "import sys, kvdistill.cli; print(' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "student_trainer" in loaded
    assert not HEAVY & set(loaded)


@pytest.mark.parametrize(
    "command", ["serve", "train", "plan", "doctor", "inspect", "generate", "think", "demo", "report", "sweep"]
)
def test_help_of_each_command_shows_examples(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, command, "--help") == 0
    shown = capsys.readouterr().out
    assert "Examples" in shown
    assert f"kvdistill {command}" in shown.split("Examples")[1]


def test_every_serve_flag_has_a_description() -> None:
    assert [name for name, field in ServeConfig.model_fields.items() if not field.description] == []


def test_serve_without_flags_uses_config_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[ServeConfig] = []
    replace_import(monkeypatch, "teacher_server.app", "run", served.append)
    assert call(monkeypatch, "serve", "--model", "some/model") == 0
    assert served == [ServeConfig(model="some/model")]


def test_serve_flags_reach_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[ServeConfig] = []
    replace_import(monkeypatch, "teacher_server.app", "run", served.append)
    monkeypatch.setattr(early_checks, "why_no_gpu", lambda: None)
    monkeypatch.setattr(early_checks, "missing", lambda _extra: [])
    flags = "--model m --engine hf --dtype bf16 --device cuda:1 --load-in-8bit --grpc-port 50051 --http-port 8001"
    assert call(monkeypatch, "serve", *flags.split(), "--drain-seconds", "2.5", "--max-sample-tokens", "100") == 0
    assert served == [
        ServeConfig(
            model="m",
            dtype="bf16",
            device="cuda:1",
            load_in_8bit=True,
            grpc_port=50051,
            http_port=8001,
            drain_seconds=2.5,
            max_sample_tokens=100,
        )
    ]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--grpc-port 70000", "--grpc-port: Input should be less than or equal to 65535 (got 70000)"),
        ("--device gpu", "--device: "),
        ("--engine fake", "--model: the engine 'fake' expects"),
    ],
)
def test_wrong_serve_flag_is_named_in_one_line(
    flags: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "serve", "--model", "m", *flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"kvdistill: {named}")
    assert error.count("\n") == 1


def test_unknown_engine_is_refused_with_the_choices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "serve", "--model", "m", "--engine", "tpu") == 2
    error = capsys.readouterr().err
    assert "hf" in error
    assert "fake" in error


def test_train_passes_file_and_overrides_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[Path, list[str]]] = []
    replace_import(monkeypatch, "student_trainer.loop.trainer", "main", lambda *arguments: started.append(arguments))
    config = write_run(tmp_path)
    assert call(monkeypatch, "train", "--config", str(config), "--set", "run.steps=5", "--set", "run.seed=1") == 0
    assert started == [(config, ["run.steps=5", "run.seed=1"])]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("run.stepz=5", "run.stepz: unknown key; did you mean 'steps'?"),
        ("run.steps=0", "run.steps: Input should be greater than or equal to 1 (got 0)"),
        ("run.steps", "--set run.steps: expected key=value"),
    ],
)
def test_config_error_is_reported_before_torch_is_imported(tmp_path: Path, override: str, named: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(MINIMAL_RUN, encoding="utf-8")
    code = (
        "import atexit, sys; from kvdistill.cli import main;"
        " atexit.register(lambda: print('torch loaded' if 'torch' in sys.modules else 'no torch')); main()"
    )
    command = [sys.executable, "-c", code, "train", "--config", str(config), "--set", override]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"kvdistill: {named}")
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == "no torch\n"


def test_missing_configuration_file_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "train", "--config", "nowhere.yaml") == 2
    error = capsys.readouterr().err
    hint = "the folder configs/ of kvdistill's repository has examples"
    assert error == f"kvdistill: nowhere.yaml: no such configuration file; {hint}\n"


def test_lost_teacher_exits_with_1_and_names_the_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose_teacher(_path: Path, _overrides: list[str]) -> None:
        raise TeacherUnavailableError("qwen", "no endpoint answers")

    replace_import(monkeypatch, "student_trainer.loop.trainer", "main", lose_teacher)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert call(monkeypatch, "train", "--config", str(write_run(tmp_path))) == 1
    assert capsys.readouterr().err == (
        "kvdistill: rank 1: teacher 'qwen': no endpoint answers; "
        "next: kvdistill doctor --teacher HOST:PORT checks an endpoint\n"
    )


def test_unexpected_exception_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_bug(_path: Path, _overrides: list[str]) -> None:
        raise ZeroDivisionError

    replace_import(monkeypatch, "student_trainer.loop.trainer", "main", raise_bug)
    monkeypatch.setattr(sys, "argv", ["kvdistill", "train", "--config", str(write_run(tmp_path))])
    with pytest.raises(ZeroDivisionError):
        main()


def test_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(**_options: object) -> None:
        raise KeyboardInterrupt

    replace_import(monkeypatch, "experiments.demo.run_demo", "main", interrupt)
    assert call(monkeypatch, "demo") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_demo_options_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, object]] = []
    replace_import(monkeypatch, "experiments.demo.run_demo", "main", lambda **options: started.append(options))
    assert call(monkeypatch, "demo", "--quick", "--seeds", "3", "--output", str(tmp_path)) == 0
    assert call(monkeypatch, "demo") == 0
    assert started == [
        {"output": tmp_path, "quick": True, "seeds": 3},
        {"output": Path("outputs/demo"), "quick": False, "seeds": 1},
    ]


def test_report_and_sweep_options_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[object, ...]] = []
    replace_import(monkeypatch, "kvdistill.report.write_report", "write_report", lambda *given: started.append(given))
    replace_import(
        monkeypatch, "kvdistill.sweep.run_sweep", "main", lambda *given, **how: started.append((*given, how))
    )
    assert call(monkeypatch, "report", "a", "b", "--output", str(tmp_path)) == 0
    assert call(monkeypatch, "report", "a", "--prompts", "val.jsonl") == 0
    assert call(monkeypatch, "sweep", "s.yaml", "--set", "seeds=[0]", "--task", "3") == 0
    assert call(monkeypatch, "sweep", "s.yaml", "--slurm") == 0
    how = {"slurm": False, "list_only": False, "table_only": False, "task": None}
    assert started == [
        ([Path("a"), Path("b")], tmp_path, None),
        ([Path("a")], Path("outputs/report"), Path("val.jsonl")),
        (Path("s.yaml"), ["seeds=[0]"], how | {"task": 3}),
        (Path("s.yaml"), [], how | {"slurm": True}),
    ]


def test_argument_of_the_deepspeed_launcher_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "--local_rank=1", "train", "--help") == 0


def test_module_runs_like_the_command() -> None:
    ended = subprocess.run([sys.executable, "-m", "kvdistill", "--help"], capture_output=True, text=True, check=True)
    assert all(command in ended.stdout for command in ("serve", "train", "demo"))
