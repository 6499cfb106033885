"""Compares the K/V of fixed tokens between the replicas of a teacher, and with those of a replica before.

Replicas with equal hashes of their weights can still differ: in their kernels, in the version of a library, or because
memory was damaged. The last layer's K/V depend on all layers before it, so one layer of a few tokens is enough.
"""

from __future__ import annotations

import logging
import time
from typing import Final

import torch

from kvcore.errors import TeacherBusyError, TeacherMismatchError
from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.tensors.codec import decode_batch
from kvcore.types import EncodedSampleKV, MissingKV, Sample, TeacherInfo, Tensor
from student_trainer.kv_sources.base import KVResult
from student_trainer.kv_sources.replica import Endpoint

logger = logging.getLogger(__name__)

# The self-test of a server accepts the same for bf16. Random models with other weights differ by about 100 %.
LARGEST_DIFFERENCE: Final = 0.1
# Seconds after which a connected replica is compared again.
INTERVAL_SECONDS: Final = 600.0
_TOKENS = 16


def parity_plan(info: TeacherInfo) -> KVPlan:
    """All tokens of the last layer, in fp32."""
    selection = Selection(selector="full", span="all")
    return KVPlan(layers=(info.layers - 1,), selection=selection, codec=CodecSpec(name="raw"))


def parity_sample(info: TeacherInfo) -> Sample:
    """The first tokens of the vocabulary, at most as many as the teacher reads."""
    return Sample("parity", token_ids=tuple(range(min(_TOKENS, info.max_sample_tokens))))


class ParityCheck:
    """Compares each replica with the first one that was checked.

    Args:
        teacher: the teacher's name in the configuration.
    """

    def __init__(self, teacher: str) -> None:
        self._teacher = teacher
        self._expected: tuple[str, EncodedSampleKV] | None = None
        self._warned = False

    def check(self, endpoint: Endpoint) -> None:
        """Compares a replica that has just connected, or that was compared long ago and is about to be used.

        Raises:
            TeacherMismatchError: its K/V differ from those of the first replica.
            TeacherUnavailableError: it does not answer, or it is full and has just connected.
        """
        now = time.monotonic()
        if endpoint.verified and now < endpoint.compared_at + INTERVAL_SECONDS:
            return
        try:
            result = endpoint.replica.parity_kv()
        except TeacherBusyError:
            if endpoint.verified:
                return  # It is compared before a later request.
            raise
        self._compare(endpoint.name, result)
        endpoint.compared_at = now

    def _compare(self, name: str, result: KVResult) -> None:
        if self._expected is not None:
            first, expected = self._expected
            if isinstance(result, MissingKV):
                raise self._mismatch(f"{name} has no K/V where {first} had some: {result.reason}")
            difference = largest_difference(result, expected)
            if not difference <= LARGEST_DIFFERENCE:
                limit = f"at most {LARGEST_DIFFERENCE:.0%}"
                raise self._mismatch(
                    f"{name} computes other K/V than {first} did: they differ by {difference:.0%} ({limit})"
                )
        elif isinstance(result, EncodedSampleKV):
            self._expected = name, result
        elif not self._warned:
            self._warned = True
            logger.warning("teacher '%s': its replicas cannot be compared: %s", self._teacher, result.reason)

    def _mismatch(self, problem: str) -> TeacherMismatchError:
        return TeacherMismatchError(
            self._teacher, f"{problem}, for the same tokens. Compare their GPUs, dtypes and versions, and restart them"
        )


def largest_difference(result: EncodedSampleKV, expected: EncodedSampleKV) -> float:
    """The larger difference of keys and values. Infinite if tokens or shapes differ.

    It is the median over tokens, because rounding may route a single token to another expert: the norm of a token's
    difference over the root mean square of all tokens' norms.
    """
    if not torch.equal(result.token_ids_T, expected.token_ids_T):
        return float("inf")
    ours, theirs = (decode_batch([each]) for each in (result, expected))
    return max(_difference(ours.k_BLHMD, theirs.k_BLHMD), _difference(ours.v_BLHMD, theirs.v_BLHMD))


def _difference(ours_BLHMD: Tensor, theirs_BLHMD: Tensor) -> float:
    if ours_BLHMD.shape != theirs_BLHMD.shape:
        return float("inf")
    ours, theirs = (x_BLHMD.double().movedim(3, 0).flatten(1) for x_BLHMD in (ours_BLHMD, theirs_BLHMD))
    error = float((ours - theirs).norm(dim=1).median())
    size = float(theirs.norm(dim=1).square().mean().sqrt())
    return error / size if size else float("inf") if error else 0.0
