"""Entropy coding of whole numbers whose spread is known: the codes of the codec `pca` on the wire and in stores.

Every component of a layer has a spread class, which stands for a standard deviation of 2^((class - 16) / 4) steps. The
codes of a class are coded with one static table, that of a logistic distribution, by the range coder of the package
constriction (words of 32 bits, probabilities of 24 bits). docs/protocol.md describes the bytes.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import constriction
import numpy as np
from numpy.typing import NDArray

from kvcore.errors import ProtocolError

Codes = NDArray[np.int16]
Classes = NDArray[np.uint8]

# A class for each quarter of an octave, from a spread of 1/16 to one of 2^15.
CLASSES = 77
_CLASSES_PER_OCTAVE = 4
_FIRST_OCTAVE = -4
# Codes of a wider spread are halved until their spread is at most this; the bits that this cuts off are not compressed.
_WIDEST = 4.0
# Symbols 0 to 62 stand for the halved codes -31 to 31; symbol 63 announces any other code, in 16 bits.
_LARGEST, _ESCAPE = 31, 63
_OFFSET = 1 << 15
# Probabilities are multiples of this, so that all machines compute the same table.
_PROBABILITY_UNIT = 2.0**-22


@dataclass(frozen=True, slots=True)
class _ClassCoder:
    """How the codes of one class are coded: `shift` low bits as they are, the rest with a table."""

    shift: int
    table: constriction.stream.model.Categorical
    low_bits: constriction.stream.model.Uniform | None


def spread_class(spread: float) -> int:
    """The class of codes with this standard deviation, in steps."""
    octaves = math.log2(max(spread, 2.0**_FIRST_OCTAVE)) - _FIRST_OCTAVE
    return min(CLASSES - 1, round(_CLASSES_PER_OCTAVE * octaves))


def class_spread(number: int) -> float:
    """The standard deviation that a class stands for, in steps."""
    return 2.0 ** (number / _CLASSES_PER_OCTAVE + _FIRST_OCTAVE)


def encode_codes(codes_MR: Codes, classes_R: Classes) -> bytes:
    """Codes the numbers of one tensor of one layer. They take at most two bytes each."""
    assert codes_MR.shape[1] == len(classes_R), "one class for each component"
    encoder = constriction.stream.queue.RangeEncoder()
    for coder, places in _by_class(classes_R):
        codes_N = codes_MR[:, places].astype(np.int32).reshape(-1)
        symbols_N = (codes_N >> coder.shift) + _LARGEST
        escaped_N = (symbols_N < 0) | (symbols_N >= _ESCAPE)
        symbols_N[escaped_N] = _ESCAPE
        encoder.encode(symbols_N, coder.table)
        if coder.low_bits is not None:
            encoder.encode(codes_N & ((1 << coder.shift) - 1), coder.low_bits)
        if escaped_N.any():
            encoder.encode(codes_N[escaped_N] + _OFFSET, _any_code())
    coded = encoder.get_compressed().astype("<u4").tobytes()
    plain = codes_MR.astype("<i2").tobytes()
    return coded if len(coded) < len(plain) else plain


def decode_codes(coded: bytes | memoryview, slots: int, classes_R: Classes) -> Codes:
    """Undoes `encode_codes`.

    Raises:
        ProtocolError: the bytes cannot be decoded.
    """
    plain_bytes = 2 * slots * len(classes_R)
    if len(coded) == plain_bytes:
        return np.frombuffer(coded, "<i2").reshape(slots, -1).astype(np.int16)
    if len(coded) > plain_bytes or len(coded) % 4:
        raise ProtocolError(f"{len(coded)} bytes cannot hold the codes of {slots} tokens")
    codes_MR = np.empty((slots, len(classes_R)), np.int16)
    try:
        decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(coded, "<u4").astype(np.uint32))
        for coder, places in _by_class(classes_R):
            codes_MR[:, places] = _decoded(decoder, coder, slots * len(places)).reshape(slots, -1)
    except (ValueError, AssertionError) as error:
        raise ProtocolError(f"entropy-coded bytes cannot be decoded: {error}") from error
    return codes_MR


def _decoded(decoder: constriction.stream.queue.RangeDecoder, coder: _ClassCoder, count: int) -> NDArray[np.int32]:
    symbols_N = decoder.decode(coder.table, count)
    codes_N = (symbols_N - _LARGEST) << coder.shift
    if coder.low_bits is not None:
        codes_N |= decoder.decode(coder.low_bits, count)
    escaped_N = symbols_N == _ESCAPE
    if escaped := int(escaped_N.sum()):
        codes_N[escaped_N] = decoder.decode(_any_code(), escaped) - _OFFSET
    return codes_N


def _by_class(classes_R: Classes) -> list[tuple[_ClassCoder, NDArray[np.int64]]]:
    """Each class that occurs, with the components that have it."""
    return _grouped(classes_R.tobytes())


# A layer's classes are the same for all samples.
@functools.lru_cache(maxsize=1024)
def _grouped(classes: bytes) -> list[tuple[_ClassCoder, NDArray[np.int64]]]:
    classes_R = np.frombuffer(classes, np.uint8)
    order_R = np.argsort(classes_R, kind="stable")
    numbers, starts = np.unique(classes_R[order_R], return_index=True)
    return [
        (_coder(number), places) for number, places in zip(numbers.tolist(), np.split(order_R, starts[1:]), strict=True)
    ]


def _shift(number: int) -> int:
    """How many low bits of a class's codes are not compressed."""
    return max(0, math.ceil(math.log2(class_spread(number) / _WIDEST)))


@functools.cache
def _coder(number: int) -> _ClassCoder:
    shift = _shift(number)
    table = constriction.stream.model.Categorical(np.array(class_table(number)), perfect=False)
    return _ClassCoder(shift, table, constriction.stream.model.Uniform(1 << shift) if shift else None)


def class_table(number: int) -> list[float]:
    """The probabilities of the symbols 0 to 63 of a class: a logistic distribution with the class's spread."""
    shift = _shift(number)
    scale = class_spread(number) * math.sqrt(3) / math.pi
    edges = [(symbol << shift) - 0.5 for symbol in range(-_LARGEST, _LARGEST + 2)]
    below = [_logistic(edge / scale) for edge in edges]
    inside = [high - low for low, high in itertools.pairwise(below)]
    counts = [max(1, round(share / _PROBABILITY_UNIT)) for share in [*inside, 1 - sum(inside)]]
    counts[_LARGEST] += round(1 / _PROBABILITY_UNIT) - sum(counts)
    return [count * _PROBABILITY_UNIT for count in counts]


@functools.cache
def class_bits(number: int) -> float:
    """The mean number of bits of a code of a class, if its spread is that of the class."""
    return _shift(number) - sum(share * math.log2(share) for share in class_table(number))


def _logistic(x: float) -> float:
    """The share of a standard logistic distribution below x."""
    return 1 / (1 + math.exp(-max(-700.0, x)))


@functools.cache
def _any_code() -> constriction.stream.model.Uniform:
    return constriction.stream.model.Uniform(1 << 16)
