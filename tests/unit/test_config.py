"""Tests of configuration files and --set: errors name the field, and values are never converted silently."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from kvcore.config import StrictModel, apply_override, load_config
from kvcore.errors import ConfigError, FieldError


class Teacher(StrictModel):
    name: str
    endpoints: tuple[str, ...] = ()
    weight: Annotated[float, Field(gt=0.0)] = 1.0


class Train(StrictModel):
    steps: Annotated[int, Field(ge=1, le=1000)] = 10
    learning_rate: float = 1e-3
    resume: bool = False


class Root(StrictModel):
    train: Train = Train()
    teachers: tuple[Teacher, ...] = ()
    output: Path | None = None
    note: str | None = None
    selector: Literal["full", "r_kv"] | None = None
    strength: float | Literal["auto"] = 1.0


def load(tmp_path, text, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides, Root)


def test_file_values_and_defaults_are_loaded(tmp_path):
    config = load(
        tmp_path,
        "train: {steps: 5}\nteachers:\n  - {name: 老师, endpoints: ['a:1', 'b:2'], weight: 2}\noutput: runs/one\n",
    )
    assert config.train.steps == 5
    assert config.train.learning_rate == 1e-3
    assert config.teachers == (Teacher(name="老师", endpoints=("a:1", "b:2"), weight=2.0),)
    assert config.output == Path("runs/one")


def test_overrides_are_yaml_and_the_last_one_wins(tmp_path):
    config = load(
        tmp_path,
        "teachers: [{name: a}, {name: b}]\n",
        "train.steps=7",
        "train.steps=8",
        "train.resume=true",
        "teachers.1.weight=0.5",
        "teachers.0={name: c, endpoints: [x=y]}",
        "note=a=b",
        "output=null",
    )
    assert (config.train.steps, config.train.resume) == (8, True)
    assert [teacher.name for teacher in config.teachers] == ["c", "b"]
    assert config.teachers[0].endpoints == ("x=y",)
    assert config.teachers[1].weight == 0.5
    assert config.note == "a=b"
    assert config.output is None


@pytest.mark.parametrize("number", ["1e-3", "1E-03", "+1.e-3", "0.1e-2", "0.001", "10e-4", "01e-3"])
def test_numbers_can_have_an_exponent(tmp_path, number):
    assert load(tmp_path, f"train: {{learning_rate: {number}}}").train.learning_rate == 1e-3
    assert load(tmp_path, "{}", f"train.learning_rate={number}").train.learning_rate == 1e-3


@pytest.mark.parametrize("spelling", ["r_kv", "r-kv"])
def test_choices_accept_dashes_and_underscores(tmp_path, spelling):
    assert load(tmp_path, f"selector: {spelling}").selector == "r_kv"
    assert load(tmp_path, "{}", f"selector={spelling}").selector == "r_kv"


def test_override_creates_missing_sections():
    tree = {}
    apply_override(tree, "a.b.c=[1, {d: 2}]")
    apply_override(tree, "a.b.c.1.d=3")
    apply_override(tree, "a.e=")
    assert tree == {"a": {"b": {"c": [1, {"d": 3}]}, "e": None}}


@pytest.mark.parametrize(
    ("text", "overrides", "field", "message"),
    [
        ("train: {step: 5}", [], "train.step", "unknown key; did you mean 'steps'?"),
        ("trian: {}", [], "trian", "unknown key; did you mean 'train'?"),
        ("teachers: [{name: a}, {name: b, endpoint: [x]}]", [], "teachers.1.endpoint", "did you mean 'endpoints'?"),
        ("{}", ["train.learning_rat=1"], "train.learning_rat", "did you mean 'learning_rate'?"),
        ("{}", ["zzz=1"], "zzz", "unknown key"),
        ("train: {steps: '5'}", [], "train.steps", "valid integer (got '5')"),
        ("train: {steps: 5.5}", [], "train.steps", "integer"),
        ("train: {steps: true}", [], "train.steps", "valid integer (got True)"),
        ("train: {steps: 0}", [], "train.steps", "greater than or equal to 1 (got 0)"),
        ("{}", ["train.steps=1001"], "train.steps", "less than or equal to 1000 (got 1001)"),
        ("train: {resume: 1}", [], "train.resume", "valid boolean (got 1)"),
        ("train: {learning_rate: '1e-3'}", [], "train.learning_rate", "valid number (got '1e-3')"),
        ("note: 5", [], "note", "valid string (got 5)"),
        ("train: 5", [], "train", "(got 5)"),
        ("teachers: {name: a}", [], "teachers", "valid"),
        ("teachers: [{weight: 1}]", [], "teachers.0.name", "required"),
        ("teachers: [{name: a, weight: 0}]", [], "teachers.0.weight", "greater than 0 (got 0"),
        ("teachers: [{name: a}]", ["teachers.1.name=b"], "teachers.1", "index below 1, got '1'"),
        ("teachers: [{name: a}]", ["teachers.first.name=b"], "teachers.first", "index below 1, got 'first'"),
        ("teachers: [{name: a}]", ["teachers.3={name: b}"], "teachers.3", "index below 1, got '3'"),
        ("selector: rkv", [], "selector", "expected one of full, r_kv; got 'rkv'; did you mean 'r_kv'?"),
        ("selector: 3", [], "selector", "expected one of full, r_kv; got 3"),
        ("strength: aut", [], "strength", "expected a number or auto; got 'aut'; did you mean 'auto'?"),
        ("note: x", ["note.deep=1"], "note", "is a plain value, so --set note.deep=1 cannot go below it"),
        ("note: x", ["note.deep.er=1"], "note", "is a plain value"),
    ],
)
def test_invalid_values_raise_with_field_and_problem(tmp_path, text, overrides, field, message):
    with pytest.raises(FieldError) as caught:
        load(tmp_path, text, *overrides)
    assert caught.value.field == field
    assert message in caught.value.problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [1,", "not valid YAML"),
        ("a: 1\n\tb: 2", "not valid YAML"),
        ("- 1\n- 2", "expected a mapping at the top level, found list"),
        ("", "expected a mapping at the top level, found NoneType"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_file_without_a_mapping_raises_with_its_path(tmp_path, text, message):
    with pytest.raises(ConfigError, match=r"run\.yaml: ") as caught:
        load(tmp_path, text)
    assert message in str(caught.value)


def test_missing_file_raises_with_its_path(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such configuration file"):
        load_config(tmp_path / "absent.yaml", [], Root)


@pytest.mark.parametrize("override", ["train.steps", "=5", ""])
def test_override_without_key_or_value_is_refused(override):
    with pytest.raises(ConfigError, match="expected key=value"):
        apply_override({}, override)


@pytest.mark.parametrize("override", ["note=[1,", "train..steps=1", ".a=1", "a.=1"])
def test_malformed_override_is_refused(tmp_path, override):
    with pytest.raises(ConfigError, match=r"--set|unknown key"):
        load(tmp_path, "{}", override)
