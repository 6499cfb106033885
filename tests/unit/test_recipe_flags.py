"""Tests of the recipe's flags: the guide's names and values, and errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.recipe.config import FLAGS, MIX, TRAIN_SAMPLES, VAL_SAMPLES, RecipeSettings
from experiments.train_multi_teacher_kv import main
from kvcore.errors import ConfigError
from tests.support.servers import REPOSITORY

NEEDED = ("--student_model", "s", "--teacher_models", "a/x", "b/y", "--output_dir", "out")
# The guide's names.
GUIDE = [
    "student_model_name_or_path",
    "student_model",
    "teacher_models",
    "dataset_name",
    "train_samples",
    "val_samples",
    "use_extended_datasets",
    "fusion_strategy",
    "fixed_weights",
    "similarity_metric",
    "temperature",
    "router_type",
    "router_hidden_dim",
    "entropy_reg_weight",
    "kv_compression",
    "kv_loss_type",
    "kv_loss_weight",
    "layer_map_strategy",
    "head_adapt_strategy",
    "rope_scaling",
    "train_phase",
    "num_teachers",
    "learning_rate",
    "warmup_ratio",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_grad_norm",
    "eval_steps",
    "save_steps",
    "logging_steps",
    "metric_for_best_model",
    "gradient_checkpointing",
    "bf16",
    "load_in_8bit",
    "load_in_4bit",
    "bnb_4bit_compute_dtype",
    "output_dir",
    "kv_mode",
    "teacher_endpoints",
]


def read(*flags: str) -> RecipeSettings:
    return FLAGS.read([*NEEDED, *flags], "recipe")


def test_every_flag_of_the_guide_exists_and_every_field_is_described() -> None:
    known = {flag.removeprefix("--").replace("-", "_") for flag, _, _ in FLAGS.completions()}
    assert set(GUIDE) <= known
    assert [name for name, field in RecipeSettings.model_fields.items() if not field.description] == []


def test_descriptions_state_the_defaults_that_depend_on_other_settings() -> None:
    fields = RecipeSettings.model_fields
    for name, default in {"train_samples": TRAIN_SAMPLES, "val_samples": VAL_SAMPLES, "dataset_name": MIX}.items():
        assert str(default) in (fields[name].description or "")


@pytest.mark.parametrize("flag", ["--student-model", "--student_model", "--student-model_name_or-path"])
@pytest.mark.parametrize("value", ["r-kv", "r_kv"])
def test_dashes_and_underscores_are_interchangeable(flag: str, value: str) -> None:
    settings = FLAGS.read([flag, "s", *NEEDED[2:], "--kv-compression", value], "recipe")
    assert (settings.student_model_name_or_path, settings.kv_compression) == ("s", "r_kv")


def test_values_in_the_guides_form_are_parsed() -> None:
    settings = read(
        *("--load_in_8bit", "true", "--bf16", "false", "--bnb_4bit_compute_dtype", "bfloat16"),
        *("--fixed_weights", "0.25,0.75", "--learning_rate", "2e-5", "--kv_compression", "r-kv"),
        *("--kv_loss_weight", "auto", "--train_phase", "1", "--num_train_epochs=2"),
    )
    assert settings.student_model_name_or_path == "s"
    assert settings.teachers == ("a/x", "b/y")
    assert (settings.load_in_8bit, settings.bf16) == (True, False)
    assert settings.fixed_weights == (0.25, 0.75)
    assert settings.learning_rate == 2e-5
    assert (settings.kv_loss_weight, settings.num_train_epochs) == ("auto", 2)
    assert read("--kv_loss_weight", "0.1").kv_loss_weight == 0.1
    assert read("--fixed_weights", "0.25", "0.75").fixed_weights == (0.25, 0.75)


def test_defaults_match_the_guide() -> None:
    settings = read()
    assert (settings.per_device_train_batch_size, settings.gradient_accumulation_steps) == (2, 16)
    assert (settings.learning_rate, settings.warmup_ratio) == (2e-5, 0.1)
    assert (settings.router_hidden_dim, settings.entropy_reg_weight) == (256, 0.01)
    assert (TRAIN_SAMPLES, VAL_SAMPLES, settings.math23k_ratio) == (15000, 2000, 0.2)


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("teacher_models: [a, b, c]\nseed: 3\nlearning_rate: 1e-3\nfixed_weights: [1, 2, 3]\n")
    flags = ("--config", str(path), "--student_model", "s", "--output_dir", "out", "--seed", "4")
    settings = FLAGS.read(flags, "recipe")
    assert (settings.seed, settings.learning_rate, settings.teachers) == (4, 1e-3, ("a", "b", "c"))


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--learning_rat 1e-3", "--learning_rat: unknown flag; did you mean --learning_rate?"),
        ("--save_total_limits=3", "--save_total_limits: unknown flag; did you mean --"),
        ("--bf16 yes", "--bf16: expected true or false, got 'yes'"),
        ("--zero_stage 7", "--zero_stage: expected one of 0, 1, 2, 3; got 7"),
        (
            "--kv_compression rkv",
            "--kv_compression: expected one of full, right, r_kv; got 'rkv'; did you mean 'r_kv'?",
        ),
        ("--kv_loss_weight often", "--kv_loss_weight: expected a number or auto; got 'often'"),
        (
            "--fixed_weights 0.5",
            "--fixed_weights: expected 2 weights, one per teacher, got 1 (separate them by spaces",
        ),
        ("--fixed_weights a,b", "--fixed_weights: Input should be a valid number (got 'a')"),
        ("--fixed_weights 1 0", "--fixed_weights: Input should be greater than 0"),
        ("--num_teachers 3", "--num_teachers: 3 is more than the 2 of teacher_models"),
        ("--train_phase 2 --fusion_strategy learnable", "--fusion_strategy: train_phase 2 is 'similarity'"),
        ("--train_phase all --fusion_strategy fixed", "--fusion_strategy: conflicts with train_phase 'all'"),
        ("--rope_scaling false", "--rope_scaling: cannot be false: teachers send keys without their rotation"),
        ("--load_in_8bit true --load_in_4bit true", "--load_in_4bit: conflicts with load_in_8bit"),
        (
            "--load_in_8bit true --teacher_endpoints x=h:1",
            "--teacher_endpoints: running servers have loaded their weights",
        ),
        ("--kv_mode offline --teacher_endpoints x=h:1", "--teacher_endpoints: kv_mode 'offline' uses no teacher"),
        ("--config no.yaml", "no.yaml: no such configuration file"),
        ("stray --seed 1", "'stray': no flag before it"),
    ],
)
def test_wrong_value_raises_with_the_flags_name(flags: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FLAGS.read([*flags.split()[:1], *NEEDED] if flags.startswith("stray") else [*NEEDED, *flags.split()], "recipe")
    assert str(caught.value).startswith(problem)


def test_missing_flag_raises_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--student_model", "s", "--output_dir", "out"]) == 2
    assert capsys.readouterr().err == "train_multi_teacher_kv.py: --teacher-models: is required\n"


def test_help_has_examples_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom experiments.train_multi_teacher_kv import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print({'torch', 'transformers', 'datasets', 'grpc'} & {name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "Examples:" in done.stdout
    assert done.stdout.endswith("set()\n")


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs" / "experiments").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_scenarios_are_valid(path: Path) -> None:
    settings = FLAGS.read(["--config", str(path)], "recipe")
    assert settings.train_phase == "all"
    # The command in the file's header comment.
    assert str(path.relative_to(REPOSITORY)) in path.read_text(encoding="utf-8")
