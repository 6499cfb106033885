"""Has a teacher write the reasoning that prompts lack, and pulls the K/V of what it wrote, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from google.protobuf.message import Message

from kvcore.plan import SamplingParams
from kvcore.types import EncodedSampleKV, Sample
from kvcore.wire import messages as wire
from kvcore.wire.completion import Completion
from kvcore.wire.stream_reader import CompletionReader, StreamReader
from protos import kv_cache_pb2 as pb
from student_trainer.kv_sources.base import KVResult
from student_trainer.kv_sources.channel import Transport
from student_trainer.kv_sources.remote import PlanFactory, RemoteSource


@dataclass(frozen=True, slots=True)
class CompletedSample:
    """What came of one prompt.

    `written`: the text with its spans; None where the teacher wrote nothing that arrived. `kv`: its K/V, or why there
    are none; with a text, that is because the plan found nothing to select in it, or its K/V were unusable.
    """

    written: Completion | None
    kv: KVResult


class CompletionSource(RemoteSource):
    """One server that writes on from prompts. `connect` comes first, as for `RemoteSource`.

    Args:
        teacher: as of `RemoteSource`.
        endpoint: as of `RemoteSource`.
        plan_for: makes the plan for what was written; one that selects by the answer needs `sampling.answer_marker`.
        sampling: how to write.
        timeout_s: deadline of one request: a teacher writes for longer than it reads.
        patience_s: as of `RemoteSource`.
        transport: as of `RemoteSource`.
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
    ) -> None:
        super().__init__(teacher, endpoint, plan_for, timeout_s, patience_s, transport)
        self._sampling = sampling
        self._answers: list[tuple[Sequence[Sample], CompletionReader]] = []

    def write(self, prompts: Sequence[Sample]) -> list[CompletedSample]:
        """What the teacher wrote behind each prompt, with its K/V, in their order.

        Args:
            prompts: texts, with no span or one of the kind `prompt`; equal ids mean the same prompt.

        Raises:
            TeacherUnavailableError: it does not answer.
            TeacherRefusedError: it will not serve this.
            ProtocolError: damaged bytes, again after a retry.
        """
        self._answers.clear()
        results = self.fetch(prompts)
        # Of a sample that was asked for again, the last answer counts.
        written = {
            sample.id: reader.written.get(index)
            for samples, reader in self._answers
            for index, sample in enumerate(samples)
        }
        self._answers.clear()
        return [_joined(written.get(prompt.id), kv) for prompt, kv in zip(prompts, results, strict=True)]

    def _question(self, request_id: str, samples: Sequence[Sample]) -> tuple[Message, StreamReader]:
        request = pb.GenerateRequest(
            request_id=request_id,
            plan=wire.plan_to_proto(self.plan),
            samples=[wire.sample_to_proto(sample) for sample in samples],
            sampling=wire.sampling_to_proto(self._sampling),
        )
        reader = CompletionReader(request_id, self.plan, samples, self.info, self._sampling)
        self._answers.append((samples, reader))
        return request, reader


def _joined(written: Completion | None, kv: KVResult) -> CompletedSample:
    """Takes the time of writing out of what counts as network."""
    if written is not None and isinstance(kv, EncodedSampleKV):
        network_s = max(0.0, kv.timings.network - written.queue_s - written.write_s)
        kv = replace(kv, timings=replace(kv.timings, network=network_s))
    return CompletedSample(written, kv)
