"""Compares the K/V of fixed tokens between the replicas of a teacher, and with those that it computed before.

Replicas with equal hashes of their weights can still differ: in their dtype, in their kernels, or because memory was
damaged. The last layer's K/V depend on the weights of all layers before it, so one layer of a few tokens is enough.
"""

from __future__ import annotations

import time
from typing import Final

import torch

from kvcore.errors import TeacherMismatchError, TeacherUnavailableError
from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.tensors.codec import decode_batch
from kvcore.types import MissingKV, Sample, TeacherInfo
from student_trainer.kv_sources.base import KVResult
from student_trainer.kv_sources.replica import Endpoint

# Other devices and batches differ by about 1 % in bf16, other weights by about 100 %.
LARGEST_DIFFERENCE: Final = 0.1
# Seconds after which a connected replica is compared again.
INTERVAL_SECONDS: Final = 600.0

# Every vocabulary has these tokens.
SAMPLE: Final = Sample("parity", token_ids=tuple(range(16)))


def parity_plan(info: TeacherInfo) -> KVPlan:
    """All tokens of the last layer, in fp32."""
    selection = Selection(selector="full", span="all")
    return KVPlan(layers=(info.layers - 1,), selection=selection, codec=CodecSpec(name="raw"))


class ParityCheck:
    """Compares each replica with the first one that was checked.

    Args:
        teacher: the teacher's name in the configuration.
    """

    def __init__(self, teacher: str) -> None:
        self._teacher = teacher
        self._expected: tuple[str, KVResult] | None = None
        self._checked_at: dict[str, float] = {}

    def check(self, endpoint: Endpoint) -> None:
        """Compares a replica that has just connected, or that was compared long ago.

        Raises:
            TeacherMismatchError: its K/V differ from those of the first replica.
            TeacherUnavailableError: it does not answer.
        """
        now = time.monotonic()
        if endpoint.verified and now < self._checked_at[endpoint.name] + INTERVAL_SECONDS:
            return
        result = endpoint.replica.parity_kv()
        if isinstance(result, MissingKV):
            problem = f"{endpoint.name} has no K/V of the tokens that replicas are compared by: {result.reason}"
            raise TeacherUnavailableError(self._teacher, problem)
        self._checked_at[endpoint.name] = now
        if self._expected is None:
            self._expected = endpoint.name, result
            return
        first, expected = self._expected
        difference = relative_difference(result, expected)
        if not difference <= LARGEST_DIFFERENCE:
            raise TeacherMismatchError(
                self._teacher,
                f"{endpoint.name} computes other K/V than {first} did: they differ by {difference:.0%} for the same "
                f"tokens (at most {LARGEST_DIFFERENCE:.0%}); next: restart both, and compare their GPUs, dtypes and "
                "versions",
            )


def relative_difference(result: KVResult, expected: KVResult) -> float:
    """Norm of the difference over the norm, of keys and values together. Infinite if the tokens differ."""
    assert not isinstance(result, MissingKV)
    assert not isinstance(expected, MissingKV)
    if not torch.equal(result.token_ids_T, expected.token_ids_T):
        return float("inf")
    ours, theirs = (decode_batch([each]) for each in (result, expected))
    x = torch.cat([ours.k_BLHMD.flatten(), ours.v_BLHMD.flatten()]).double()
    y = torch.cat([theirs.k_BLHMD.flatten(), theirs.v_BLHMD.flatten()]).double()
    return float((x - y).norm() / y.norm())
