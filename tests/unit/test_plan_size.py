"""Tests of the predicted size of a sample, compared with its encoded tensors."""

from __future__ import annotations

import pytest

from kvcore.plan import CodecName, CodecSpec, KVPlan, Scope, Selection
from kvcore.tensors.plan_size import kept_slots, sample_bytes
from tests.support.streams import INFO, sample_kv


def test_kept_slots_are_the_budget_or_all_tokens() -> None:
    right = KVPlan(layers=(0,), selection=Selection(selector="right", budget=4))
    assert [kept_slots(right, count) for count in (2, 4, 9)] == [2, 4, 4]
    assert kept_slots(KVPlan(layers=(0,)), 9) == 9


@pytest.mark.parametrize("scope", ["head", "layer", "sample"])
@pytest.mark.parametrize("codec", ["raw", "bf16", "int8"])
def test_sample_bytes_equal_the_size_of_its_tensors(scope: Scope, codec: CodecName) -> None:
    plan = KVPlan(
        layers=(0, 2), selection=Selection(selector="right", budget=5, scope=scope), codec=CodecSpec(name=codec)
    )
    kv = sample_kv(0, plan, slots=3)
    stored = sample_bytes(plan, INFO.kv_heads, INFO.head_dim, 3)
    assert stored == kv.nbytes + kv.positions.nbytes
    repeated = kv.positions.nbytes * (len(plan.layers) - 1) if scope == "sample" else 0
    assert sample_bytes(plan, INFO.kv_heads, INFO.head_dim, 3, streamed=True) == stored + repeated
