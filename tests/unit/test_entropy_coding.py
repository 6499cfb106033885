"""Entropy coding: exact for all codes, close to their entropy, equal on all machines, safe with damaged bytes."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvcore.errors import ProtocolError
from kvcore.tensors.entropy_coding import (
    CLASSES,
    class_spread,
    class_table,
    decode_codes,
    encode_codes,
    spread_class,
)


@given(st.data())
def test_all_codes_survive_whatever_their_classes(data: st.DataObject) -> None:
    slots, components = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    codes_MR = data.draw(arrays(np.int16, (slots, components)))
    classes_R = data.draw(arrays(np.uint8, components, elements=st.integers(0, CLASSES - 1)))
    coded = encode_codes(codes_MR, classes_R)
    assert len(coded) <= codes_MR.nbytes
    found_MR = decode_codes(coded, slots, classes_R)
    assert found_MR.dtype == np.int16
    assert (found_MR == codes_MR).all()


def logistic_codes(spread: float, count: int, seed: int = 0) -> np.ndarray[tuple[int, int], np.dtype[np.int16]]:
    x = np.random.default_rng(seed).logistic(scale=spread * math.sqrt(3) / math.pi, size=(count, 1))
    return x.round().astype(np.int16)


@pytest.mark.parametrize("spread", [0.1, 0.5, 1.0, 3.9, 4.1, 30.0, 1000.0])
def test_codes_take_few_more_bits_than_their_entropy(spread: float) -> None:
    codes_MR = logistic_codes(spread, 40_000)
    _, counts = np.unique(codes_MR, return_counts=True)
    entropy = float(-(counts / counts.sum() * np.log2(counts / counts.sum())).sum())
    bits = 8 * len(encode_codes(codes_MR, np.array([spread_class(spread)], np.uint8))) / len(codes_MR)
    # A wide spread has few draws of each code, which makes the entropy of the draws too small.
    assert bits <= 1.03 * entropy + 0.02


def test_codes_that_cannot_be_compressed_are_kept_as_they_are() -> None:
    codes_MR = np.array([[32767, -32768, 12345]], np.int16)
    classes_R = np.zeros(3, np.uint8)
    assert encode_codes(codes_MR, classes_R) == codes_MR.tobytes()


def test_classes_are_a_quarter_of_an_octave_apart_and_cover_all_spreads() -> None:
    assert [spread_class(class_spread(number)) for number in range(CLASSES)] == list(range(CLASSES))
    assert (spread_class(0.0), spread_class(1e-9), spread_class(1e9)) == (0, 0, CLASSES - 1)
    for spread in np.geomspace(0.07, 30_000, 50):
        assert abs(math.log2(class_spread(spread_class(spread)) / spread)) <= 0.126


def test_tables_are_the_same_on_all_machines() -> None:
    tables = [class_table(number) for number in range(CLASSES)]
    assert all(math.isclose(sum(table), 1.0, rel_tol=1e-12) and min(table) > 0 for table in tables)
    # Another value means that this version cannot read what others have stored or send.
    assert hashlib.blake2b(json.dumps(tables).encode(), digest_size=8).hexdigest() == "3369106b6feeaee3"


@given(st.binary(max_size=64), st.integers(1, 4), st.integers(0, CLASSES - 1))
def test_damaged_bytes_give_codes_or_an_error_of_the_protocol(coded: bytes, slots: int, number: int) -> None:
    try:
        found_MR = decode_codes(coded, slots, np.full(3, number, np.uint8))
    except ProtocolError:
        return
    assert found_MR.shape == (slots, 3)
