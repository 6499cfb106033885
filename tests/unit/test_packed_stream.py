"""Streams of entropy-coded samples: they arrive exactly, are smaller than their codes, and damage is noticed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import pytest
import torch
import xxhash

from kvcore.errors import NonFiniteError, ProtocolError
from kvcore.plan import CodecSpec, KVPlan, Scope, Selection
from kvcore.tensors.codec import decode_batch, encode
from kvcore.tensors.packed_sample import CODES_XXH3, PACKED, SIZES, unpacked
from kvcore.types import TENSORS, EncodedSampleKV, Tensor
from kvcore.wire.frames import FrameWriter, pack_frame, unpack_frame
from kvcore.wire.stream_reader import RefusedSample, StreamReader
from tests.support.kv_maps import coded_map
from tests.support.streams import INFO, REQUEST, keys_of, sample_kv, text_sample, write_layer, write_sample

LAYERS = (0, 2, 4)
KV_MAP = coded_map(LAYERS, INFO.kv_heads, INFO.head_dim)


def plan_of(scope: Scope) -> KVPlan:
    selection = Selection(selector="right", budget=3, scope=scope)
    return KVPlan(layers=LAYERS, selection=selection, codec=CodecSpec(name="pca"), map=KV_MAP.named)


def sent_samples(plan: KVPlan) -> tuple[list[EncodedSampleKV], list[dict[str, Tensor]]]:
    """Samples with the codes that a server sends, and the K/V before they were encoded, [L,H,M,D]."""
    sent, original = [], []
    for index, slots in enumerate((3, 3, 2, 3)):
        sample = sample_kv(index, plan.with_map(KV_MAP.named, CodecSpec(name="raw")), slots)
        whole = {kind: sample.parts[f"{kind}.data"] for kind in TENSORS}
        parts: dict[str, Tensor] = {}
        errors: dict[str, list[float]] = {}
        for kind in TENSORS:
            layers = zip(LAYERS, whole[kind], strict=True)
            coded = [encode(KV_MAP.apply(x_HMD[None], layer, kind), kind, plan.codec) for layer, x_HMD in layers]
            parts[f"{kind}.codes"] = torch.cat([each.parts["codes"] for each in coded])
            errors[kind] = [float(each.relative_error_B) for each in coded]
        key = text_sample(index).key(INFO.weights_digest, plan)
        sent.append(dataclasses.replace(sample, key=key, codec=plan.codec, parts=parts, relative_error=errors))
        original.append(whole)
    return sent, original


def written(plan: KVPlan, sent: Sequence[EncodedSampleKV], max_body: int = 1 << 20) -> list[bytes]:
    writer = FrameWriter(REQUEST, plan, keys_of(sent), max_body, KV_MAP)
    frames = [frame for index, kv in enumerate(sent) for frame in write_sample(writer, index, kv)]
    for at in range(len(LAYERS)):
        frames += write_layer(writer, [0, 1, 3], at, sent) + write_layer(writer, [2], at, sent)
    frames += [frame for index, kv in enumerate(sent) for frame in writer.sample_end(index, kv.timings)]
    return frames + writer.end()


def read(plan: KVPlan, frames: Sequence[bytes], count: int = 4) -> list[EncodedSampleKV | RefusedSample]:
    reader = StreamReader(REQUEST, plan, [text_sample(index) for index in range(count)], INFO, kv_map=KV_MAP)
    results = dict(result for frame in frames for result in reader.feed(frame))
    reader.finish()
    return [results[index] for index in range(count)]


@pytest.mark.parametrize("scope", ["layer", "sample"])
@pytest.mark.parametrize("max_body", [11, 64, 150, 1 << 20])
def test_codes_arrive_exactly_however_they_are_split_into_frames(scope: Scope, max_body: int) -> None:
    plan = plan_of(scope)
    sent, _ = sent_samples(plan)
    frames = written(plan, sent, max_body)
    assert all(len(unpack_frame(frame)[1]) <= max_body for frame in frames)
    for got, expected in zip(read(plan, frames), sent, strict=True):
        assert isinstance(got, EncodedSampleKV)
        found = unpacked(got)
        assert found.parts.keys() == expected.parts.keys()
        assert all(found.parts[name].equal(part) for name, part in expected.parts.items())
        assert found.positions.equal(expected.positions)
        assert (found.relative_error, found.timings) == (expected.relative_error, expected.timings)


def test_clients_restore_whole_heads_within_the_stated_error() -> None:
    plan = plan_of("sample")
    sent, original = sent_samples(plan)
    got = [one for one in read(plan, written(plan, sent)) if isinstance(one, EncodedSampleKV)]
    kv = decode_batch(got)
    assert kv.k_BLHMD.shape == (4, len(LAYERS), INFO.kv_heads, 3, INFO.head_dim)
    for row, (sample, whole) in enumerate(zip(got, original, strict=True)):
        for kind, x_BLHMD in zip(TENSORS, (kv.k_BLHMD, kv.v_BLHMD), strict=True):
            for at in range(len(LAYERS)):
                x_HMD = whole[kind][at].double()
                error = float((x_BLHMD[row, at, :, : sample.slots].double() - x_HMD).norm())
                centre_HD = KV_MAP.tensors[f"{kind}.centre"][at].double().view(INFO.kv_heads, INFO.head_dim)
                varying = float((x_HMD - centre_HD[:, None]).norm())
                assert error / varying == pytest.approx(sample.relative_error[kind][at], rel=1e-3)


def test_positions_are_sent_once_if_all_layers_share_them() -> None:
    sizes = {}
    for scope in ("layer", "sample"):
        plan = plan_of(scope)
        frames = written(plan, sent_samples(plan)[0])
        sizes[scope] = sum(len(unpack_frame(frame)[1]) for frame in frames)
    assert sizes["layer"] - sizes["sample"] == 4 * (3 + 3 + 2 + 3) * (len(LAYERS) - 1)


def test_a_packed_sample_says_how_many_bytes_were_sent() -> None:
    plan = plan_of("sample")
    (got, *_) = read(plan, written(plan, sent_samples(plan)[0]))
    assert isinstance(got, EncodedSampleKV)
    assert got.nbytes == int(got.parts[SIZES].sum()) + 4 * 2 * len(LAYERS) + 8


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_of_a_packed_sample_never_give_other_codes(seed: int) -> None:
    rng = random.Random(seed)
    plan = plan_of("sample")
    (got, *_) = read(plan, written(plan, sent_samples(plan)[0]))
    assert isinstance(got, EncodedSampleKV)
    name = rng.choice([PACKED, SIZES, CODES_XXH3])
    part = got.parts[name].clone()
    flat = part.view(-1).view(torch.uint8)
    flat[rng.randrange(len(flat))] ^= 1 << rng.randrange(8)
    try:
        found = unpacked(dataclasses.replace(got, parts=got.parts | {name: part}))
    except ProtocolError:
        return
    # The last bits of the coded bytes need not matter.
    assert name == PACKED
    assert all(found.parts[name].equal(part) for name, part in unpacked(got).parts.items())


def test_numbers_beyond_16_bits_fail_their_row() -> None:
    y_BHMD = torch.tensor([1.0, 32767.4, 32768.0, -40000.0])[:, None, None, None]
    with pytest.raises(NonFiniteError) as caught:
        encode(y_BHMD, "k", CodecSpec(name="pca"))
    assert caught.value.rows == [1, 2, 3]
    assert encode(torch.tensor([[[[32767.0, -32767.0]]]]), "v", CodecSpec(name="pca")).parts["codes"].tolist() == [
        [[[32767, -32767]]]
    ]


@pytest.mark.parametrize(
    "packed", [None, [], [[8, 8]] * 2, [[8]] * 3, [[8, 0]] * 3, [[8, 1 << 40]] * 3, [[True, 8]] * 3, [["8", 8]] * 3]
)
def test_a_record_with_wrong_sizes_is_refused(packed: object) -> None:
    plan = plan_of("sample")
    frames = written(plan, sent_samples(plan)[0])
    forged = []
    for frame in frames:
        header, body = unpack_frame(frame)
        for record in header["records"]:
            if len(record.get("packed", [])) == 3:
                record["packed"] = packed
        header["xxh3"] = xxhash.xxh3_64_intdigest(body)
        forged.append(pack_frame(header, bytes(body)))
    with pytest.raises(ProtocolError, match="'packed'"):
        read(plan, forged)


def test_a_sample_that_does_not_match_the_hash_of_its_codes_is_refused_when_it_is_decoded() -> None:
    plan = plan_of("sample")
    (got, *_) = read(plan, written(plan, sent_samples(plan)[0]))
    assert isinstance(got, EncodedSampleKV)
    other = coded_map(LAYERS, INFO.kv_heads, INFO.head_dim, step=0.4)
    with pytest.raises(ProtocolError, match="constriction"):
        decode_batch([dataclasses.replace(got, kv_map=other)])
