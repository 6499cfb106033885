"""Tests that every configuration field and flag refuses NaN and infinity."""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
from collections.abc import Iterator
from typing import Any, get_args, get_origin

import pytest
from pydantic import ValidationError

from kvcore.config import StrictModel
from kvcore.errors import FieldError
from kvcore.flags import FlagSet

PACKAGES = ("kvcore", "student_trainer", "teacher_server", "extraction", "evaluation", "experiments")
SETTINGS = ("config", "settings", "spec", "plan")


def models(base: type[StrictModel]) -> Iterator[type[StrictModel]]:
    for model in base.__subclasses__():
        yield model
        yield from models(model)


def number_fields() -> list[Any]:
    """Parameters (model, field name) for every float field of every configuration model."""
    for package in PACKAGES:
        for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            if found.name.rpartition(".")[2] in SETTINGS:
                importlib.import_module(found.name)
    return [
        pytest.param(model, name, id=f"{model.__name__}.{name}")
        for model in models(StrictModel)
        if not model.__module__.startswith("tests")
        for name, field in model.model_fields.items()
        if "float" in str(field.annotation)
    ]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("model", "name"), number_fields())
def test_fields_refuse_non_finite_numbers(model: type[StrictModel], name: str, number: float) -> None:
    annotation = model.model_fields[name].annotation
    value: Any = number
    if get_origin(annotation) is tuple:
        value = [number] * len([part for part in get_args(annotation) if part is not ...])
    with pytest.raises(ValidationError) as raised:
        model.model_validate_json(json.dumps({name: value}))
    assert any(error["loc"][0] == name for error in raised.value.errors())


class Flags(StrictModel):
    rate: float = 1.0
    rates: tuple[float, ...] = ()


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize("flag", ["rate", "rates"])
def test_flags_refuse_non_finite_numbers(flag: str, text: str) -> None:
    flags = FlagSet(Flags, "Does nothing.", "")
    with pytest.raises(FieldError, match=f"--{flag}"):
        flags.read([f"--{flag}={text}"], "kvdistill rates")
