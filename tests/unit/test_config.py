"""Tests of configuration files and --set: errors name the field, and values are never converted silently."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import pytest
from pydantic import Field, model_validator

from kvcore.config import Endpoint, FileName, StrictModel, apply_override, load_config, parse, read_yaml
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
        (
            "note: x",
            ["note.deep=1"],
            "note",
            "is a plain value without keys of its own, so --set note.deep=1 cannot set one",
        ),
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


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"train: {steps: 5}\nnote: x\ntrain: {steps: 6}\n", "line 3: the key 'train' is given twice, first in line 1"),
        (b"train:\n  steps: 5\n  steps: 6\n", "line 3: the key 'steps' is given twice, first in line 2"),
        (b"train: {steps: 5, steps: 5}\n", "line 1: the key 'steps' is given twice, first in line 1"),
        ("ok: 1\nnote: caf\u00e9\n".encode("latin-1"), "line 2 is not valid UTF-8; save the file in UTF-8"),
        ("note: x\n".encode("utf-16"), "line 1 is not valid UTF-8"),
        (b"note: \x07\n", "not valid YAML"),
        (b"note: 2020-13-45\n", "not valid YAML: month must be in 1..12"),
        (b"a: " + b"[" * 5000, "nested too deeply"),
        (b"a: 1\n\tb: 2", "line 2: while scanning for the next token, found character"),
        (b"2020-01-01: x\n", "a key of the configuration is not text"),
    ],
)
def test_files_with_double_keys_or_damaged_text_are_refused_in_one_line(tmp_path, content, problem):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path, [], Root)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_double_keys_in_an_override_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--set train=.*the key 'steps' is given twice"):
        load(tmp_path, "{}", "train={steps: 5, steps: 6}")


def test_merged_keys_may_be_overridden(tmp_path):
    text = "train: &base {steps: 5, resume: true}\nteachers: []\n"
    tree = load(tmp_path, text)
    assert tree.train.steps == 5
    path = tmp_path / "merged.yaml"
    path.write_text("a: &base {x: 1, y: 2}\nb: {<<: *base, x: 3}\n", encoding="utf-8")
    assert read_yaml(path)["b"] == {"x": 3, "y": 2}


def test_a_byte_order_mark_is_accepted(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbftrain: {steps: 5}\n")
    assert load_config(path, [], Root).train.steps == 5


def test_home_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(tmp_path, "output: ~/runs/one").output == tmp_path / "runs/one"
    assert load_config(Path("~/run.yaml"), [], Root).output == tmp_path / "runs/one"


class Agreeing(StrictModel):
    low: int = 0
    high: int = 1

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low: {self.low} is above high ({self.high})")
        return self


class Around(StrictModel):
    pair: Agreeing = Agreeing()
    server: Endpoint = "h:1"
    name: FileName = "x"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"pair": {"low": 2}}, "pair.low: 2 is above high (1)"),
        ({"server": "host:70000"}, "server: a port is 1 to 65535 (got 'host:70000')"),
        ({"server": "host:0"}, "server: a port is 1 to 65535 (got 'host:0')"),
        ({"server": "host:" + "9" * 5000}, "server: a port is 1 to 65535 (got 'host:999"),
        ({"server": "host"}, "server: expected HOST:PORT (got 'host')"),
        ({"server": "http://host:1"}, "server: expected HOST:PORT (got 'http://host:1')"),
        ({"server": "host :1"}, "server: expected HOST:PORT (got 'host :1')"),
        ({"name": "../x"}, "name: expected a name of 1 to 64 letters, digits, '_', '-' and '.', and no '.' at the"),
    ],
)
def test_messages_hold_fields_and_words_but_no_class_names_and_no_patterns(tree, message):
    with pytest.raises(FieldError) as caught:
        parse(tree, Around)
    assert str(caught.value).startswith(message)
    with pytest.raises(FieldError, match=r"^low: 3 is above high \(1\)$"):
        parse({"low": 3}, Agreeing)


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
