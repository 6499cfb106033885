"""Compares int6 and int4 with a quantiser in plain Python that reads the packed codes bit by bit."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcore.plan import CodecSpec
from kvcore.tensors.codec import decode, encode, layer_bytes, part_layout
from kvcore.types import TENSORS
from tests.unit.test_codec import NORMAL_SCALE, bf16, fp32, tensors

BITS = {"int6": 6, "int4": 4}


def stream_code(row: list[int], bits: int, index: int) -> int:
    """Code `index` of a row of bytes, one bit at a time."""
    code = 0
    for bit in range(bits):
        at = bits * index + bit
        code |= (row[at // 8] >> at % 8 & 1) << bit
    return code


def naive_code(packed, kind, bits, place) -> int:
    b, h, m, d = place
    if kind == "k":
        return stream_code(packed[b][h][m], bits, d)
    return stream_code([row[d] for row in packed[b][h]], bits, m)


@settings(deadline=None, max_examples=150)
@given(tensors(), st.sampled_from(TENSORS), st.sampled_from([1, 2, 3, 4, 7, 64]), st.sampled_from(tuple(BITS)))
def test_codes_match_naive_quantiser(x_BHMD, kind, group_size, name):
    bits, levels = BITS[name], 2 ** (BITS[name] - 1) - 1
    spec = CodecSpec(name=name, group_size=group_size)
    parts = encode(x_BHMD, kind, spec).parts
    decoded, packed = decode(parts, kind, spec).double().tolist(), parts["codes"].tolist()
    mean = parts["mean"].double().tolist() if kind == "k" else None
    x, scale = x_BHMD.double().tolist(), parts["scale"].double().tolist()
    batch, heads, tokens, channels = x_BHMD.shape

    def centred(b, h, m, d):
        return fp32(x[b][h][m][d] - (mean[b][h][0][d] if mean else 0.0))

    for place in itertools.product(range(batch), range(heads), range(tokens), range(channels)):
        b, h, m, d = place
        at = m if kind == "k" else d
        members = range(
            at // group_size * group_size, min((at // group_size + 1) * group_size, (tokens, channels)[kind == "v"])
        )
        largest = max(abs(centred(b, h, i, d) if kind == "k" else centred(b, h, m, i)) for i in members)
        expected_scale = bf16(fp32(largest / levels))
        found = scale[b][h][at // group_size][d] if kind == "k" else scale[b][h][m][at // group_size]
        assert found == expected_scale
        code = naive_code(packed, kind, bits, place) - levels
        assert abs(code) <= levels
        shift = mean[b][h][0][d] if mean else 0.0
        assert decoded[b][h][m][d] == fp32(fp32(code * found) + shift)
        if found == 0:
            assert code == 0
        elif found >= NORMAL_SCALE:
            assert abs(code - centred(b, h, m, d) / found) <= 0.5 + 1e-5


@settings(deadline=None, max_examples=60)
@given(tensors(), st.sampled_from(tuple(BITS)))
def test_keys_are_sent_with_the_mean_of_each_channel(x_BHMD, name):
    sent = encode(x_BHMD, "k", CodecSpec(name=name)).parts["mean"].double()
    for b, h, d in itertools.product(*(range(x_BHMD.shape[i]) for i in (0, 1, 3))):
        channel = x_BHMD[b, h, :, d].double().tolist()
        expected = statistics.fmean(channel) if channel else 0.0
        size = max(map(abs, channel), default=0.0)
        assert sent[b, h, 0, d].item() == pytest.approx(expected, rel=2.0**-8, abs=size * 1e-6 + 1e-37)


@pytest.mark.parametrize(("name", "bound"), [("int6", 0.03), ("int4", 0.13)])
def test_a_large_mean_of_a_key_channel_costs_no_precision(name, bound):
    k = torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(0))
    shifted = k.clone()
    shifted[..., 5] += 100.0
    spec = CodecSpec(name=name)
    error = (decode(encode(shifted, "k", spec).parts, "k", spec) - shifted).norm() / k.norm()
    assert error < bound


@pytest.mark.parametrize(
    ("name", "kind", "slots", "head_dim", "codes"),
    [
        ("int4", "k", 5, 7, (2, 5, 4)),
        ("int4", "v", 5, 7, (2, 3, 7)),
        ("int6", "k", 5, 7, (2, 5, 6)),
        ("int6", "v", 5, 7, (2, 6, 7)),
        ("int6", "v", 0, 7, (2, 0, 7)),
    ],
)
def test_codes_are_packed_along_channels_of_keys_and_tokens_of_values(name, kind, slots, head_dim, codes):
    layout = part_layout(CodecSpec(name=name), kind, 2, slots, head_dim)
    assert layout[0] == ("codes", torch.uint8, codes)
    assert [part for part, _, _ in layout] == (["codes", "scale", "mean"] if kind == "k" else ["codes", "scale"])


def test_bytes_per_layer():
    raw = layer_bytes(CodecSpec(name="bf16"), 8, 64, 128)
    # Codes, and 2 bytes per 64 elements of both tensors and per channel of the keys.
    assert layer_bytes(CodecSpec(name="int4"), 8, 64, 128) == raw / 4 + 8 * (2 * 128 + 2 * 128 + 2 * 2 * 64)
    assert layer_bytes(CodecSpec(name="int6"), 8, 64, 128) == raw * 6 / 16 + 8 * (2 * 128 + 2 * 128 + 2 * 2 * 64)
