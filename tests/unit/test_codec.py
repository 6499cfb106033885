"""Compares codecs with a quantiser in plain Python, and decoded batches with samples decoded one by one."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcore.errors import NonFiniteError
from kvcore.plan import CODECS, CodecSpec
from kvcore.tensors.codec import decode, decode_batch, encode, part_layout
from kvcore.types import TENSORS, EncodedSampleKV
from tests.support.streams import UNMAPPED_CODECS

NORMAL_SCALE = 2.0**-126

specs = st.builds(CodecSpec, name=st.sampled_from(UNMAPPED_CODECS), group_size=st.sampled_from([1, 2, 3, 4, 7, 64]))
shapes = st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(0, 9), st.integers(1, 9))


@st.composite
def tensors(draw):
    """Draws keys or values of many scales, with outliers, zeros and groups of zeros."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(shapes)
    x = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-30, 30))
    spread = draw(st.sampled_from([0.0, 1.0, 6.0]))
    # Values outside the range of fp32 are refused, which other tests cover.
    x = (x * torch.exp(spread * torch.randn(shape, generator=generator))).clamp(-1e38, 1e38)
    keep = draw(st.sampled_from([1.0, 0.8, 0.3, 0.0]))
    return x * (torch.rand(shape, generator=generator) < keep)


def bf16(value):
    """Rounds to bfloat16, ties to even, on the bits of a float32."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def fp32(value):
    return struct.unpack("<f", struct.pack("<f", value))[0]


def naive_scale(x, kind, group_size, b, h, m, d):
    """The scale of one element. Keys share it over tokens of a channel, values over channels of a token."""
    if kind == "k":
        first = m // group_size * group_size
        group = [x[b][h][token][d] for token in range(first, min(first + group_size, len(x[b][h])))]
    else:
        first = d // group_size * group_size
        group = x[b][h][m][first : first + group_size]
    return bf16(fp32(max(abs(value) for value in group) / 127))


def elements(x):
    return (
        (b, h, m, d)
        for b, _ in enumerate(x)
        for h, _ in enumerate(x[b])
        for m, row in enumerate(x[b][h])
        for d, _ in enumerate(row)
    )


@settings(deadline=None, max_examples=150)
@given(tensors(), st.sampled_from(TENSORS), st.sampled_from([1, 2, 3, 4, 7, 64]))
def test_int8_matches_naive_quantiser(x_BHMD, kind, group_size):
    spec = CodecSpec(name="int8", group_size=group_size)
    encoded = encode(x_BHMD, kind, spec)
    codes, decoded = encoded.parts["codes"].tolist(), decode(encoded.parts, kind, spec).double().tolist()
    x = x_BHMD.double().tolist()
    for b, h, m, d in elements(x):
        value, code = x[b][h][m][d], codes[b][h][m][d]
        scale = naive_scale(x, kind, group_size, b, h, m, d)
        assert decoded[b][h][m][d] == code * scale
        assert abs(code) <= 127
        if scale == 0:
            assert (code, decoded[b][h][m][d]) == (0, 0)
        elif scale >= NORMAL_SCALE:
            assert abs(code - value / scale) <= 0.5 + 1e-5
            assert abs(decoded[b][h][m][d] - value) <= scale / 2 * (1 + 1e-4)


@settings(deadline=None, max_examples=100)
@given(tensors(), st.sampled_from(TENSORS), specs)
def test_reported_error_is_the_round_trip_error(x_BHMD, kind, spec):
    encoded = encode(x_BHMD, kind, spec)
    decoded_BHMD = decode(encoded.parts, kind, spec)
    for item, reported in enumerate(encoded.relative_error_B.tolist()):
        x, decoded = x_BHMD[item].flatten().tolist(), decoded_BHMD[item].flatten().tolist()
        norm = math.hypot(*x)
        error = math.hypot(*(a - b for a, b in zip(decoded, x, strict=True)))
        # The codec computes the difference in fp32, which adds a rounding error.
        assert reported == pytest.approx(error / norm if norm else 0.0, rel=1e-4, abs=1e-7)


@settings(deadline=None, max_examples=60)
@given(tensors(), st.sampled_from(TENSORS), specs)
def test_parts_match_part_layout(x_BHMD, kind, spec):
    batch, heads, slots, head_dim = x_BHMD.shape
    parts = encode(x_BHMD, kind, spec).parts
    layout = part_layout(spec, kind, heads, slots, head_dim)
    assert [(name, part.dtype, tuple(part.shape)) for name, part in parts.items()] == [
        (name, dtype, (batch, *shape)) for name, dtype, shape in layout
    ]
    assert all(part.is_contiguous() for part in parts.values())


@settings(deadline=None, max_examples=60)
@given(tensors(), st.sampled_from(TENSORS), specs)
def test_encoding_does_not_depend_on_the_batch(x_BHMD, kind, spec):
    batched = encode(x_BHMD, kind, spec)
    for item in range(x_BHMD.shape[0]):
        alone = encode(x_BHMD[item : item + 1], kind, spec)
        assert all(torch.equal(alone.parts[name][0], part[item]) for name, part in batched.parts.items())
        assert alone.relative_error_B[0] == pytest.approx(batched.relative_error_B[item].item())


@settings(deadline=None, max_examples=60)
@given(tensors(), st.sampled_from(TENSORS), specs)
def test_decode_accepts_any_leading_dimensions(x_BHMD, kind, spec):
    parts = encode(x_BHMD, kind, spec).parts
    decoded_BHMD = decode(parts, kind, spec)
    for item in range(x_BHMD.shape[0]):
        assert torch.equal(decode({name: part[item] for name, part in parts.items()}, kind, spec), decoded_BHMD[item])
    nested = decode({name: part[None] for name, part in parts.items()}, kind, spec)
    assert torch.equal(nested[0], decoded_BHMD)


@settings(deadline=None, max_examples=60)
@given(tensors(), st.sampled_from(TENSORS))
def test_raw_is_lossless_and_bf16_rounds_to_nearest_even(x_BHMD, kind):
    raw, half = CodecSpec(name="raw"), CodecSpec(name="bf16")
    exact = encode(x_BHMD, kind, raw)
    assert torch.equal(decode(exact.parts, kind, raw), x_BHMD)
    assert not exact.relative_error_B.any()
    decoded = decode(encode(x_BHMD, kind, half).parts, kind, half)
    assert decoded.flatten().tolist() == [bf16(value) for value in x_BHMD.flatten().tolist()]


def test_outlier_key_channel_does_not_affect_other_channels():
    k = torch.randn(1, 1, 32, 16, generator=torch.Generator().manual_seed(0))
    spec = CodecSpec(name="int8")
    plain = decode(encode(k, "k", spec).parts, "k", spec)
    k[..., 5] *= 1e6
    assert torch.equal(decode(encode(k, "k", spec).parts, "k", spec)[..., :5], plain[..., :5])


def test_outlier_value_token_does_not_affect_other_tokens():
    v = torch.randn(1, 1, 32, 16, generator=torch.Generator().manual_seed(0))
    spec = CodecSpec(name="int8")
    plain = decode(encode(v, "v", spec).parts, "v", spec)
    v[..., 5, :] *= 1e6
    assert torch.equal(decode(encode(v, "v", spec).parts, "v", spec)[..., :5, :], plain[..., :5, :])


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize(("name", "limit"), [("raw", 0.0), ("bf16", 0.002), ("int8", 0.01)])
def test_error_of_gaussian_keys_and_values_is_small(kind, name, limit):
    x = torch.randn(4, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    error_B = encode(x, kind, CodecSpec(name=name)).relative_error_B
    assert error_B.shape == (4,)
    assert bool((error_B <= limit).all())


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CODECS)
def test_half_precision_input_is_encoded_like_its_fp32_value(kind, dtype, name):
    x = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    spec = CodecSpec(name=name)
    half, full = encode(x, kind, spec), encode(x.float(), kind, spec)
    assert all(torch.equal(half.parts[part], full.parts[part]) for part in full.parts)
    assert torch.equal(half.relative_error_B, full.relative_error_B)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("name", CODECS)
def test_non_finite_values_raise_with_their_rows(name, kind, bad):
    x = torch.randn(4, 2, 5, 8)
    x[1, 1, 4, 7] = bad
    x[3, 0, 0, 0] = bad
    with pytest.raises(NonFiniteError, match=r"batch items \[1, 3\]") as caught:
        encode(x, kind, CodecSpec(name=name))
    assert caught.value.rows == [1, 3]


@pytest.mark.parametrize("kind", TENSORS)
def test_overflow_in_the_codec_raises(kind):
    x = torch.full((1, 1, 2, 2), torch.finfo(torch.float32).max)
    with pytest.raises(NonFiniteError):
        encode(x, kind, CodecSpec(name="bf16"))


@pytest.mark.parametrize("kind", TENSORS)
def test_values_below_the_smallest_scale_have_relative_error_one(kind):
    x = torch.full((1, 1, 2, 2), 1e-42)
    spec = CodecSpec(name="int8")
    encoded = encode(x, kind, spec)
    assert not decode(encoded.parts, kind, spec).any()
    assert encoded.relative_error_B.item() == 1.0


POSITION_SHAPES = {"head": (3, 2), "layer": (3, 1), "sample": (1, 1)}


def encoded_sample(slots, spec, generator, scope="head"):
    layers, heads, head_dim = 3, 2, 5
    tokens = int(torch.randint(slots, 16, (), generator=generator)) + 1
    parts = {}
    for kind in TENSORS:
        packed = encode(torch.randn(layers, heads, slots, head_dim, generator=generator), kind, spec)
        parts |= {f"{kind}.{name}": part for name, part in packed.parts.items()}
    chosen = torch.stack([torch.randperm(tokens, generator=generator)[:slots].sort().values for _ in range(6)])
    positions = chosen.reshape(3, 2, slots)[: POSITION_SHAPES[scope][0], : POSITION_SHAPES[scope][1]]
    return EncodedSampleKV(
        sample_id="s",
        key="k",
        layers=(0, 2, 4),
        codec=spec,
        parts=parts,
        positions=positions.to(torch.int32),
        token_ids_T=torch.arange(tokens, dtype=torch.int32),
        byte_ends_T=torch.randint(0, 99, (tokens,), generator=generator, dtype=torch.int32).sort().values,
        relative_error={},
    )


@pytest.mark.parametrize("scope", POSITION_SHAPES)
@pytest.mark.parametrize("spec", [CodecSpec(name="raw"), CodecSpec(name="bf16"), CodecSpec(group_size=2)])
@pytest.mark.parametrize("slots", [(3, 3, 3), (2, 4, 2, 1), (0, 3), (1,), (0, 0)])
def test_decode_batch_equals_decoding_each_sample(scope, spec, slots):
    generator = torch.Generator().manual_seed(1)
    samples = [encoded_sample(count, spec, generator, scope) for count in slots]
    batch = decode_batch(samples)
    widest = max(slots)
    assert batch.mask_BM.tolist() == [[slot < count for slot in range(widest)] for count in slots]
    assert batch.byte_ends_BLHM.dtype == torch.int64
    assert batch.byte_ends_BLHM.shape == (len(slots), *POSITION_SHAPES[scope], widest)
    for kind, x_BLHMD in zip(TENSORS, (batch.k_BLHMD, batch.v_BLHMD), strict=True):
        assert x_BLHMD.shape == (len(slots), 3, 2, widest, 5)
        assert x_BLHMD.dtype == torch.float32
        for row, (sample, count) in enumerate(zip(samples, slots, strict=True)):
            parts = {name[2:]: part for name, part in sample.parts.items() if name[0] == kind}
            assert torch.equal(x_BLHMD[row, :, :, :count], decode(parts, kind, spec))
            assert not x_BLHMD[row, :, :, count:].any()
    for row, (sample, count) in enumerate(zip(samples, slots, strict=True)):
        ends = sample.byte_ends_T.tolist()
        expected = [
            [[ends[t] for t in head] + [-1] * (widest - count) for head in layer] for layer in sample.positions.tolist()
        ]
        assert batch.byte_ends_BLHM[row].tolist() == expected
