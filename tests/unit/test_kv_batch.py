"""Tests of decoding a teacher's results for a micro-batch into padded tensors."""

from __future__ import annotations

import pytest
import torch

from kvcore.errors import TeacherRefusedError
from kvcore.tensors.codec import decode
from kvcore.types import EncodedSampleKV, MissingKV, Timings
from student_trainer.kv_sources.base import KVResult
from student_trainer.kv_sources.kv_batch import decode_and_pad
from tests.support.kv_fakes import INFO, PLAN, kv_of, samples

BUDGET = PLAN.selection.budget


def results_for(count: int, missing: tuple[int, ...] = ()) -> list[KVResult]:
    """Results for samples of 5 to 9 tokens with 3 slots each; every token has 2 bytes."""
    results: list[KVResult] = []
    for index, sample in enumerate(samples(count)):
        kv = kv_of(sample)
        kv.byte_ends_T = 2 * torch.arange(1, len(kv.token_ids_T) + 1, dtype=torch.int32)
        results.append(MissingKV(sample.id, "not finite: a key of layer 1") if index in missing else kv)
    return results


def shortened(result: KVResult, slots: int) -> EncodedSampleKV:
    """The same sample with only its last slots."""
    assert isinstance(result, EncodedSampleKV)
    last = slice(-slots, None)
    result.positions = result.positions[:, :, last]
    result.parts = {
        # Keys: one scale per channel for all three tokens. Values: one scale per token.
        name: part if name == "k.scale" else part[:, :, last]
        for name, part in result.parts.items()
    }
    return result


def assert_holds(row: int, result: KVResult, kv_x: torch.Tensor | None, kind: str) -> None:
    assert isinstance(result, EncodedSampleKV)
    assert kv_x is not None
    parts = {name[2:]: part for name, part in result.parts.items() if name.startswith(kind)}
    expected_LHMD = decode(parts, "k" if kind == "k" else "v", result.codec)
    torch.testing.assert_close(kv_x[row, :, :, : result.slots], expected_LHMD, rtol=0, atol=0)
    assert (kv_x[row, :, :, result.slots :] == 0).all()


def test_slots_are_padded_to_the_given_number() -> None:
    results = [shortened(result, slots) for result, slots in zip(results_for(3), (3, 1, 2), strict=True)]
    kv, _ = decode_and_pad("ada", results, INFO, PLAN, 5, "fail")
    assert kv.mask_BM.tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    for row, result in enumerate(results):
        assert_holds(row, result, kv.k_BLHMD, "k")
        assert_holds(row, result, kv.v_BLHMD, "v")
    # Tokens 2 to 4 of 5, the last of 6, the last two of 7.
    assert kv.byte_ends_BLHM[:, 0, 0].tolist() == [[6, 8, 10, -1, -1], [12, -1, -1, -1, -1], [12, 14, -1, -1, -1]]


def test_slots_are_padded_to_the_longest_sample_by_default() -> None:
    results = [shortened(result, slots) for result, slots in zip(results_for(2), (1, 2), strict=True)]
    kv, _ = decode_and_pad("ada", results, INFO, PLAN, None, "fail")
    assert kv.mask_BM.shape == (2, 2)


@pytest.mark.parametrize("missing", [(0,), (1, 3), (4,), (0, 1, 2, 3)])
def test_missing_samples_are_masked_and_others_keep_their_rows(missing: tuple[int, ...]) -> None:
    results = results_for(5, missing)
    kv, sums = decode_and_pad("ada", results, INFO, PLAN, 4, "mask")
    assert (sums.samples, sums.missing) == (5 - len(missing), len(missing))
    for row, result in enumerate(results):
        if row in missing:
            assert not kv.mask_BM[row].any()
            assert (kv.byte_ends_BLHM[row] == -1).all(), "no student token pairs with it"
        else:
            assert kv.mask_BM[row].tolist() == [True] * BUDGET + [False]
            assert_holds(row, result, kv.k_BLHMD, "k")
            assert_holds(row, result, kv.v_BLHMD, "v")


@pytest.mark.parametrize("slots", [4, None])
def test_a_batch_without_any_kv_has_the_usual_shape_and_is_fully_masked(slots: int | None) -> None:
    kv, sums = decode_and_pad("ada", results_for(2, (0, 1)), INFO, PLAN, slots, "mask")
    width = slots or 1
    for x in (kv.k_BLHMD, kv.v_BLHMD):
        assert x.shape == (2, len(PLAN.layers), INFO.kv_heads, width, INFO.head_dim)
    assert kv.mask_BM.tolist() == [[False] * width] * 2
    assert kv.byte_ends_BLHM.tolist() == [[[[-1] * width]]] * 2
    assert (sums.samples, sums.missing, sums.encoded_bytes, sums.tokens) == (0, 2, 0, 0)


def test_on_missing_fail_raises_with_teacher_sample_and_reason() -> None:
    with pytest.raises(TeacherRefusedError) as caught:
        decode_and_pad("ada", results_for(4, (1, 2)), INFO, PLAN, 4, "fail")
    assert caught.value.teacher == "ada"
    for part in ("teacher 'ada'", "2 of 4 samples", "'s1'", "not finite: a key of layer 1", "kv.on_missing=mask"):
        assert part in str(caught.value)


def test_each_batch_of_the_teacher_counts_once_with_its_slowest_sample() -> None:
    results = results_for(5, (4,))
    # Samples 0 and 2 were in one batch, 1 and 3 in the next, which waited for the first.
    timings = ((0.5, 2.0, 0.25), (3.0, 1.0, 0.5), (1.0, 2.0, 0.125), (2.5, 1.0, 1.0))
    for result, (queue, prefill, network) in zip(results, timings, strict=False):
        assert isinstance(result, EncodedSampleKV)
        result.timings = Timings(queue=queue, prefill=prefill, encode=0.5, network=network)
    _, sums = decode_and_pad("ada", results, INFO, PLAN, None, "mask")
    at_teacher = {"queue": 1.0 + 3.0, "prefill": 2.0 + 1.0, "encode": 0.5 + 0.5, "network": 0.25 + 1.0}
    assert sums.seconds == at_teacher | {"decode": 0.0, "stall": 0.0}


def test_bytes_tokens_and_seconds_are_summed_over_received_samples() -> None:
    results = results_for(3, (1,))
    for seconds, result in enumerate(results, start=1):
        if isinstance(result, EncodedSampleKV):
            result.timings = Timings(queue=seconds, prefill=10.0 * seconds, encode=0.5, network=0.25)
    _, sums = decode_and_pad("ada", results, INFO, PLAN, None, "mask")
    tokens = 5 + 7
    assert sums.tokens == tokens
    # 3 layers, 2 heads of 16, keys and values, 2 bytes in bf16.
    assert sums.raw_bytes == tokens * 3 * 2 * 16 * 2 * 2
    codes, scales = 3 * 2 * BUDGET * 16, 3 * 2 * (16 + BUDGET) * 2
    assert sums.encoded_bytes == 2 * (2 * codes + scales)
    assert sums.seconds == {"queue": 4.0, "prefill": 40.0, "encode": 1.0, "network": 0.5, "decode": 0.0, "stall": 0.0}
