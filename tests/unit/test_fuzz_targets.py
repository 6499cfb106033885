"""Tests of what `make fuzz` fuzzes: valid inputs are read, changed ones refused, and other errors come out."""

from __future__ import annotations

import random

import pytest

from kvcore.errors import KVDistillError
from tests.fuzz import targets
from tests.fuzz.__main__ import PARTS
from tests.fuzz.targets import SEPARATOR, TARGETS, Target

each_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


def test_every_target_has_a_part_of_the_inputs() -> None:
    assert PARTS.keys() == TARGETS.keys()
    assert sum(PARTS.values()) == pytest.approx(1.0)


@each_target
def test_the_seeds_are_valid(target: Target) -> None:
    for seed in target.seeds:
        target.read(seed)


@each_target
def test_changed_seeds_are_read_or_refused(target: Target) -> None:
    draws, refused = random.Random(1), 0
    for _ in range(300):
        data = bytearray(draws.choice(target.seeds))
        for _ in range(draws.randint(1, 3)):
            data[draws.randrange(len(data))] = draws.randrange(256)
        target(bytes(data))
        try:
            target.read(bytes(data))
        except KVDistillError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(("name", "inside"), [("frames", b'"seq": 1'), ("store", b'"sample_id"')])
def test_changes_behind_the_hashes_reach_the_checks(name: str, inside: bytes) -> None:
    (seed,) = TARGETS[name].seeds
    part = next(part for part in seed.split(SEPARATOR) if inside in part)
    with pytest.raises(KVDistillError) as caught:
        TARGETS[name].read(seed.replace(part, part.replace(b'"slots"', b'"sluts"').replace(b'"shape"', b'"shope"')))
    assert "xxh3" not in str(caught.value)


def test_a_foreign_error_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("slots")

    monkeypatch.setattr(targets, "unpack_frame", broken)
    monkeypatch.setattr(targets.StreamReader, "feed", broken)
    with pytest.raises(KeyError):
        TARGETS["frames"](TARGETS["frames"].seeds[0])
