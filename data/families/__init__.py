"""Dataset families by name, one module each, imported on demand."""

from __future__ import annotations

from data.families.base import Family
from kvcore.errors import ConfigError, FieldError
from kvcore.plugins import NameTable

FAMILIES = NameTable(
    "dataset",
    "kvdistill.dataset_families",
    {
        name: f"data.families.{name}:FAMILY"
        for name in (
            *("gsm8k", "svamp", "strategyqa", "math23k", "math", "arc_challenge", "hotpotqa"),
            *("gsm8k_aug", "gsm8k_aug_nl"),
        )
    },
)
# The default mixture.
BASE = ("gsm8k", "svamp", "strategyqa")
EXTENDED = ("math", "arc_challenge", "hotpotqa")
CHINESE = "math23k"


def find_family(name: str, field: str = "dataset") -> Family:
    """Returns a family by name. `field`: the field that errors name.

    Raises:
        FieldError: the name is unknown (suggests the nearest one), or a package's entry point is wrong.
    """
    try:
        family = FAMILIES.load(name, Family)
    except ConfigError as error:
        raise FieldError(field, str(error)) from error
    if family.name != name:
        raise FieldError(field, f"the dataset of the entry point '{name}' has another name, '{family.name}'")
    return family
