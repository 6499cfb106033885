"""Dataset families by name, one module each, imported when asked for."""

from __future__ import annotations

from data.families.base import Family
from kvcore.errors import ConfigError, FieldError
from kvcore.plugins import NameTable

FAMILIES = NameTable(
    "dataset",
    "kvdistill.dataset_families",
    {
        name: f"data.families.{name}:FAMILY"
        for name in ("gsm8k", "svamp", "strategyqa", "math23k", "math", "arc_challenge", "hotpotqa")
    },
)
# What the usual mixture is of.
BASE = ("gsm8k", "svamp", "strategyqa")
EXTENDED = ("math", "arc_challenge", "hotpotqa")
CHINESE = "math23k"


def find_family(name: str, field: str = "dataset") -> Family:
    """The family of that name; `field` is what an error calls it.

    Raises:
        FieldError: there is none, the message says the nearest; or a package's entry point is wrong.
    """
    try:
        family = FAMILIES.load(name, Family)
    except ConfigError as error:
        raise FieldError(field, f"{error} (got '{name}')") from error
    if family.name != name:
        raise FieldError(field, f"the entry point '{name}' holds a dataset that calls itself '{family.name}'")
    return family
