"""The recipe's flags: names and values of the guide, and errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.recipe.config import TRAIN_SAMPLES, VAL_SAMPLES, RecipeSettings
from experiments.recipe.flags import GROUPS, parser, read_flags
from experiments.train_multi_teacher_kv import main
from kvcore.errors import ConfigError
from tests.support.servers import REPOSITORY

NEEDED = ("--student_model", "s", "--teacher_models", "a/x", "b/y", "--output_dir", "out")
# As the guide names them.
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
    return read_flags([*NEEDED, *flags], "recipe")


def test_every_flag_of_the_guide_exists_and_has_help() -> None:
    known = {option.removeprefix("--") for action in parser("recipe")._actions for option in action.option_strings}
    assert set(GUIDE) <= known
    explained = [name for fields in GROUPS.values() for name in fields]
    assert sorted(explained) == sorted(RecipeSettings.model_fields)


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
    settings = read_flags(flags, "recipe")
    assert (settings.seed, settings.learning_rate, settings.teachers) == (4, 1e-3, ("a", "b", "c"))


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--learning_rat 1e-3", "--learning_rat: unknown flag; did you mean --learning_rate?"),
        ("--save_total_limits=3", "--save_total_limits: unknown flag; did you mean --"),
        ("--bf16 yes", "--bf16: expected true or false, got 'yes'"),
        ("--zero_stage 7", "--zero_stage: Input should be 0, 1, 2 or 3 (got 7)"),
        ("--kv_compression rkv", "--kv_compression: Input should be 'full', 'right' or 'r-kv' (got 'rkv')"),
        ("--kv_loss_weight often", "--kv_loss_weight: "),
        ("--fixed_weights 0.5", "--fixed_weights: 2 teachers need as many weights, got 1 (a comma inside sbatch"),
        ("--fixed_weights a,b", "--fixed_weights: Input should be a valid number (got 'a')"),
        ("--fixed_weights 1 0", "--fixed_weights: Input should be greater than 0"),
        ("--num_teachers 3", "--num_teachers: 3 asked for, and teacher_models names 2"),
        ("--train_phase 2 --fusion_strategy learnable", "--fusion_strategy: train_phase 2 is 'similarity'"),
        ("--train_phase all --fusion_strategy fixed", "--fusion_strategy: train_phase 'all' runs all three"),
        ("--rope_scaling false", "--rope_scaling: keys travel without their rotation"),
        ("--load_in_8bit true --load_in_4bit true", "--load_in_4bit: weights are read in 8 or in 4 bits"),
        ("--load_in_8bit true --teacher_endpoints x=h:1", "--teacher_endpoints: servers that run already"),
        ("--kv_mode offline --teacher_endpoints x=h:1", "--teacher_endpoints: kv_mode 'offline' asks no teacher"),
        ("--config no.yaml", "no.yaml: no such configuration file"),
        ("stray --seed 1", "'stray': no flag stands before it"),
    ],
)
def test_wrong_value_raises_with_the_flags_name(flags: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_flags([*flags.split()[:1], *NEEDED] if flags.startswith("stray") else [*NEEDED, *flags.split()], "recipe")
    assert str(caught.value).startswith(problem)


def test_missing_flag_raises_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--student_model", "s", "--output_dir", "out"]) == 2
    assert capsys.readouterr().err == "train_multi_teacher_kv.py: --teacher_models: is required\n"


def test_help_has_examples_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom experiments.train_multi_teacher_kv import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print({'torch', 'transformers', 'datasets', 'grpc'} & {name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "examples:" in done.stdout
    assert done.stdout.endswith("set()\n")


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs" / "experiments").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_scenarios_are_valid(path: Path) -> None:
    settings = read_flags(["--config", str(path)], "recipe")
    assert settings.train_phase == "all"
    # What its heading says to type.
    assert str(path.relative_to(REPOSITORY)) in path.read_text(encoding="utf-8")
