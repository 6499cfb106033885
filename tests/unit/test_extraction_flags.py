"""Tests of the extraction's flags: documented names and defaults, and errors before packages are loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from extraction.command import main
from extraction.config import DEFAULT_BUDGET, FLAGS, ExtractConfig
from kvcore.errors import EXIT_USAGE, ConfigError
from kvcore.plan import Selection
from tests.support.servers import REPOSITORY

NEEDED = ["--teacher_models", "a/t1", "a/t2", "--student_model", "a/s", "--dataset_path", "d", "--output_dir", "o"]


def read(*more: str) -> ExtractConfig:
    return FLAGS.read([*NEEDED, *more], "x")


def test_guide_command_parses() -> None:
    config = read("--output_name", "train_kv", "--kv_compression", "right", "--max_length", "2048", "--device", "cuda")
    assert config.teacher_models == ("a/t1", "a/t2")
    assert (config.device, config.max_length, config.format) == ("cuda", 2048, "pt")
    assert config.pt_path == Path("o/train_kv.pt")


def test_only_models_dataset_and_directory_are_required() -> None:
    config = read()
    assert (config.output_name, config.kv_compression, config.max_length) == ("train_kv", "right", 2048)
    assert config.selection == Selection(selector="right", budget=24, span="all")
    assert (config.codec_spec.name, config.all_layers, config.store) == ("bf16", True, Path("o/train_kv.parts"))


@pytest.mark.parametrize(
    ("flags", "selection"),
    [
        (["--kv_compression", "right"], Selection(selector="right", budget=24, span="reasoning")),
        (["--kv_compression", "r-kv", "--kv_budget", "8"], Selection(selector="r_kv", budget=8, span="reasoning")),
        (["--kv_compression", "full"], Selection(selector="full", span="all")),
        (["--kv_compression", "full", "--span", "reasoning"], Selection(selector="full", span="reasoning")),
    ],
)
def test_default_store_settings_match_training_defaults(flags: list[str], selection: Selection) -> None:
    config = read("--format", "store", *flags)
    assert config.selection == selection
    assert (config.codec_spec.name, config.all_layers, config.store) == ("int8", False, Path("o/train_kv"))


def test_shards_are_numbered_from_one() -> None:
    assert [(read("--shard", f"{i}/3").worker, read("--shard", f"{i}/3").workers) for i in (1, 2, 3)] == [
        (0, 3),
        (1, 3),
        (2, 3),
    ]


@pytest.mark.parametrize(("given", "value"), [(["true"], True), (["False"], False), ([], True)])
def test_booleans_are_true_or_false(given: list[str], value: bool) -> None:
    assert read("--load_in_8bit", *given).load_in_8bit is value


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--kv_compresion", "right"], "--kv_compresion: unknown flag; did you mean --kv_compression?"),
        (["--output-nam=x"], "--output-nam: unknown flag; did you mean --output-name?"),
        (["--kv_compression", "left"], "--kv_compression: expected one of right, r_kv, full; got 'left'"),
        (["--load_in_8bit", "maybe"], "expected true or false, got 'maybe'"),
        (["--max_length", "0"], "--max_length: "),
        (["--shard", "0/3"], "I from 1 to N"),
        (["--shard", "4/3"], "I from 1 to N"),
        (["--shard", "one"], "--shard: "),
        (["--kv_compression", "full", "--kv_budget", "3"], "takes no budget; got 3"),
        (["--codec", "pca"], "'pca' needs a KV map"),
        (["--scope", "head"], "selects the same tokens everywhere"),
        (["--output_name", "../x"], "--output_name: "),
        (["--load_in_8bit", "true", "--teacher_endpoints", "t1=h:1"], "load_in_8bit: running servers have loaded"),
    ],
)
def test_invalid_flags_raise_with_the_problem(flags: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*flags)
    assert problem in str(caught.value)


def test_missing_required_flag_is_named() -> None:
    with pytest.raises(ConfigError, match="--student-model"):
        FLAGS.read(["--teacher_models", "a", "--dataset_path", "d", "--output_dir", "o"], "x")


def test_every_field_has_a_flag_and_help_says_how_to_use_them() -> None:
    fields = ExtractConfig.model_fields
    shown = FLAGS.help("x")
    assert all(f"--{name.replace('_', '-')}" in shown and field.description for name, field in fields.items())
    assert str(DEFAULT_BUDGET) in (fields["kv_budget"].description or "")
    assert "Examples:" in shown
    assert "--shard 2/4" in shown


@pytest.mark.parametrize("command", [["scripts/extract_dual_style_kv.py"], ["-m", "kvdistill", "extract"]])
def test_user_error_prints_one_line_and_exits_with_2(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *command, *NEEDED, "--nonsense", "1"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--nonsense: unknown flag" in done.stderr


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    flags = ["--teacher_models", "/none", "--student_model", "/none", "--dataset_path", "/none"]
    assert main([*flags, "--output_dir", str(tmp_path / "file/kv")], "kvdistill extract") == EXIT_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert "--output_dir: " in line
    assert "/file is a file; choose another directory" in line


def test_flags_are_checked_before_torch_is_imported() -> None:
    code = "import sys, extraction.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
