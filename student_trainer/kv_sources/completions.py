"""Requests completions of prompts from a teacher, and the K/V of the completed texts, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from google.protobuf.message import Message

from kvcore.plan import SamplingParams
from kvcore.tensors.kv_map import KVMap
from kvcore.types import EncodedSampleKV, Sample
from kvcore.wire import messages
from kvcore.wire.completion import Completion
from kvcore.wire.stream_reader import CompletionReader, StreamReader
from protos import kv_cache_pb2 as pb
from student_trainer.kv_sources.base import KVResult
from student_trainer.kv_sources.channel import Transport
from student_trainer.kv_sources.remote import PlanFactory, RemoteSource


@dataclass(frozen=True, slots=True)
class CompletedSample:
    """The result of one prompt.

    `completion`: the text with its spans; None if no text arrived. `kv`: its K/V, or why there are none. A text has no
    K/V if the plan selects nothing in it, or if its K/V were unusable.
    """

    completion: Completion | None
    kv: KVResult


class CompletionSource(RemoteSource):
    """One server that completes prompts. Call `connect` first, as for `RemoteSource`.

    Args:
        teacher: as in `RemoteSource`.
        endpoint: as in `RemoteSource`.
        plan_for: makes the plan for completed texts; one that selects by the answer needs `sampling.answer_marker`.
        sampling: how to generate.
        timeout_s: deadline of one request. Generation takes longer than a prefill.
        patience_s: as in `RemoteSource`.
        transport: as in `RemoteSource`.
        kv_map: as in `RemoteSource`.
    """

    _METHOD: ClassVar[str] = "Generate"

    def __init__(
        self,
        teacher: str,
        endpoint: str,
        plan_for: PlanFactory,
        sampling: SamplingParams,
        timeout_s: float = 600.0,
        patience_s: float = 30.0,
        transport: Transport | None = None,
        kv_map: KVMap | None = None,
    ) -> None:
        super().__init__(teacher, endpoint, plan_for, timeout_s, patience_s, transport, kv_map)
        self._sampling = sampling
        self._readers: list[tuple[Sequence[Sample], CompletionReader]] = []

    def complete(self, prompts: Sequence[Sample]) -> list[CompletedSample]:
        """The teacher's completion of each prompt, with its K/V, in order.

        Args:
            prompts: texts, without a span or with one of the kind `prompt`; equal ids mean the same prompt.

        Raises:
            TeacherUnavailableError: the endpoint does not answer.
            TeacherRefusedError: the teacher will not serve this.
            ProtocolError: damaged bytes, again after a retry.
        """
        self._readers.clear()
        results = self.fetch(prompts)
        # The last completion counts if a sample was requested again.
        completions = {
            sample.id: reader.completions.get(index)
            for samples, reader in self._readers
            for index, sample in enumerate(samples)
        }
        self._readers.clear()
        return [_joined(completions.get(prompt.id), kv) for prompt, kv in zip(prompts, results, strict=True)]

    def _request(self, request_id: str, samples: Sequence[Sample]) -> tuple[Message, StreamReader]:
        request = pb.GenerateRequest(
            request_id=request_id,
            plan=messages.plan_to_proto(self.plan),
            samples=[messages.sample_to_proto(sample) for sample in samples],
            sampling=messages.sampling_to_proto(self._sampling),
        )
        reader = CompletionReader(request_id, self.plan, samples, self.info, self._sampling, self._map)
        self._readers.append((samples, reader))
        return request, reader


def _joined(completion: Completion | None, kv: KVResult) -> CompletedSample:
    """Takes the time of generation out of the time counted as network."""
    if completion is not None and isinstance(kv, EncodedSampleKV):
        network_s = max(0.0, kv.timings.network - completion.queue_s - completion.generate_s)
        kv = replace(kv, timings=replace(kv.timings, network=network_s))
    return CompletedSample(completion, kv)
