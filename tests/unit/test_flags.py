"""Flags made from a configuration model: how values are written, and how mistakes are told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import pytest
from pydantic import Field, model_validator

from kvcore.config import Alias, StrictModel
from kvcore.errors import ConfigError, FieldError
from kvcore.flags import FlagSet


class Settings(StrictModel):
    headings: ClassVar = {"First": "model", "Second": "weights"}

    model: Annotated[str, Field(min_length=1), Alias("student")]
    """100 % text"""
    names: tuple[str, ...] = ("a", "b")
    """some"""
    weights: tuple[Annotated[float, Field(gt=0.0)], ...] = ()
    rate: float = 1e-3
    steps: Annotated[int, Field(ge=1)] | None = None
    strength: Annotated[float, Field(ge=0.0)] | Literal["auto"] = "auto"
    phase: Literal["1", "2", "all"] | None = None
    level: Literal[0, 1] = 1
    fast: bool = False
    out: Path | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.fast and self.steps:
            raise ValueError("steps: fast needs none")
        return self


def flag_set(*, config_file: bool = False) -> FlagSet[Settings]:
    return FlagSet(Settings, "What it does.", "COMMAND --model m", config_file, "x.py")


def read(*arguments: str) -> Settings:
    return flag_set().read(["--model", "m", *arguments], "x")


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        ("--student s", "model", "s"),
        ("--names c,d e", "names", ("c,d", "e")),
        ("--weights 0.5,1", "weights", (0.5, 1.0)),
        ("--weights 0.5 1", "weights", (0.5, 1.0)),
        ("--rate 2e-5", "rate", 2e-5),
        ("--rate -1", "rate", -1.0),
        ("--steps 3", "steps", 3),
        ("--strength auto", "strength", "auto"),
        ("--strength=0.1", "strength", 0.1),
        ("--phase 1", "phase", "1"),
        ("--level 0", "level", 0),
        ("--fast True", "fast", True),
        ("--fast false", "fast", False),
        ("--out a/b", "out", Path("a/b")),
    ],
)
def test_values_have_the_type_of_their_field(arguments: str, name: str, value: object) -> None:
    assert getattr(read(*arguments.split()), name) == value


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--step 3", "--step: unknown flag; did you mean --steps?"),
        ("--studnt=3", "--studnt: unknown flag; did you mean --student?"),
        ("--config x", "--config: unknown flag"),
        ("--steps", "--steps: expected one value, got none"),
        ("--steps 0", "--steps: Input should be greater than or equal to 1 (got 0)"),
        ("--steps 1.5", "--steps: Input should be a valid integer"),
        ("--steps null", "--steps: Input should be a valid integer (got 'null')"),
        ("--rate inf", "--rate: Input should be a valid number (got 'inf')"),
        ("--weights 1 0", "--weights: Input should be greater than 0 (got 0)"),
        ("--phase 3", "--phase: expected one of 1, 2, all; got '3'"),
        ("--fast yes", "--fast: expected true or false, got 'yes'"),
        ("--steps 3 4", "--steps: expected one value, got 3 4"),
        ("--names", "--names: expected at least one value"),
        ("--fast true --steps 3", "--steps: fast needs none"),
    ],
)
def test_a_mistake_names_flag_value_and_limit(arguments: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*arguments.split())
    assert str(caught.value).startswith(problem)


def test_a_word_that_belongs_to_no_flag_is_no_flag() -> None:
    with pytest.raises(ConfigError, match="'stray': no flag before it"):
        flag_set().read(["stray"], "x")


def test_a_flag_that_is_needed_is_named() -> None:
    with pytest.raises(FieldError, match=r"^--model: is required$"):
        flag_set().read([], "x")


def test_boolean_flag_without_value_means_true() -> None:
    assert read("--fast").fast
    assert not read("--fast", "false").fast


def test_flags_win_over_the_file_and_its_mistakes_are_told(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("model: m\nsteps: 3\nnames: [c]\n")
    settings = flag_set(config_file=True).read(["--config", str(path), "--steps", "4"], "x")
    assert (settings.model, settings.steps, settings.names) == ("m", 4, ("c",))
    path.write_text("model: m\nstep: 3\n")
    with pytest.raises(ConfigError, match=r"^step: unknown key; did you mean 'steps'"):
        flag_set(config_file=True).read(["--config", str(path)], "x")


def test_help_says_what_may_be_given_and_what_holds_without_it() -> None:
    shown = " ".join(flag_set(config_file=True).help("x").split())
    for part in (
        "What it does.",
        "--config PATH",
        "First: --model, --student TEXT 100 % text [required]",
        "--names TEXT... some [default: a b]",
        "Second: --weights NUMBER...",
        "--strength NUMBER|auto [default: auto]",
        "--phase 1|2|all",
        "--level 0|1",
        "--fast [true|false] [default: false]",
        "--out PATH",
        "Examples: python x.py --model m",
    ):
        assert part in shown
