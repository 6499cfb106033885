"""Dataset families by name, one module each, imported on demand."""

from __future__ import annotations

import difflib
from importlib import import_module

from data.families.base import Family
from kvcore.errors import FieldError

_MODULES = {
    "gsm8k": "data.families.gsm8k",
    "svamp": "data.families.svamp",
    "strategyqa": "data.families.strategyqa",
    "math23k": "data.families.math23k",
    "math": "data.families.math",
    "arc_challenge": "data.families.arc_challenge",
    "hotpotqa": "data.families.hotpotqa",
}
NAMES = tuple(_MODULES)
# The default mixture.
BASE = ("gsm8k", "svamp", "strategyqa")
EXTENDED = ("math", "arc_challenge", "hotpotqa")
CHINESE = "math23k"


def find_family(name: str, field: str = "dataset") -> Family:
    """Returns a family by name. `field`: the field that errors name.

    Raises:
        FieldError: the name is unknown; suggests the nearest one.
    """
    if name not in _MODULES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise FieldError(field, f"unknown dataset '{name}'; {hint}known: {', '.join(NAMES)}")
    family: Family = import_module(_MODULES[name]).FAMILY
    return family
