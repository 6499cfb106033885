"""The value of `--chaos`: which faults a server makes on purpose, and how often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

from kvcore.errors import did_you_mean

_UNITS = {"ms": 0.001, "s": 1.0}


@dataclass(frozen=True, slots=True)
class ChaosSpec:
    """What goes wrong, and how often.

    `delay`: seconds before the first frame of every answer. `abort`, `truncate`, `flip`: the part of the answers that
    end with UNAVAILABLE, end early without an error, or have a changed bit. `seed`: the same seed gives the same faults
    to the first answer, the second one, and so on.
    """

    delay: float = 0.0
    abort: float = 0.0
    truncate: float = 0.0
    flip: float = 0.0
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses `delay=200ms,abort=0.05,truncate=0.02,flip=0.01,seed=1`; what is left out stays 0.

        Raises:
            ValueError: a name is unknown or given twice, or a value is not in range.
        """
        known, found = [entry.name for entry in fields(cls)], dict[str, str]()
        for item in text.split(","):
            name, _, value = item.strip().partition("=")
            if name not in known:
                hint = did_you_mean(name, known) or f"; expected {', '.join(known)}"
                raise ValueError(f"'{name}' in '{text}' is unknown{hint}")
            if name in found:
                raise ValueError(f"'{name}' is given twice in '{text}'")
            found[name] = value
        spec = cls(
            delay=_seconds(found),
            seed=_seed(found),
            **{name: _part(found, name) for name in ("abort", "truncate", "flip")},
        )
        if spec.abort + spec.truncate + spec.flip > 1.0:
            raise ValueError(f"abort, truncate and flip in '{text}' add up to more than 1")
        return spec


def _seconds(found: Mapping[str, str]) -> float:
    text = found.get("delay", "0s")
    unit = next((unit for unit in _UNITS if text.endswith(unit)), "")
    number = text.removesuffix(unit)
    if not unit or not number.replace(".", "", 1).isdecimal():
        raise ValueError(f"'delay={text}' is not a time such as 200ms or 1.5s")
    return float(number) * _UNITS[unit]


def _part(found: Mapping[str, str], name: str) -> float:
    text = found.get(name, "0")
    if not text.replace(".", "", 1).isdecimal() or float(text) > 1.0:
        raise ValueError(f"'{name}={text}' is not a part of the answers between 0 and 1")
    return float(text)


def _seed(found: Mapping[str, str]) -> int:
    text = found.get("seed", "0")
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"'seed={text}' is not a whole number from 0 on")
    return int(text)


def check_chaos(text: str) -> str:
    """Returns `text` if `ChaosSpec.parse` reads it.

    Raises:
        ValueError: says what is wrong, without the field.
    """
    ChaosSpec.parse(text)
    return text
