"""Dataset families by name, one module each, imported when asked for."""

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
# What the usual mixture is of.
BASE = ("gsm8k", "svamp", "strategyqa")
EXTENDED = ("math", "arc_challenge", "hotpotqa")
CHINESE = "math23k"


def find_family(name: str, field: str = "dataset") -> Family:
    """The family of that name; `field` is what an error calls it.

    Raises:
        FieldError: there is none; names the nearest.
    """
    if name not in _MODULES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise FieldError(field, f"no dataset is called '{name}'; {hint}there are {', '.join(NAMES)}")
    family: Family = import_module(_MODULES[name]).FAMILY
    return family
