"""A teacher of an extraction: its K/V source, its store, and which samples are already stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.head_dim_adapter import KVGeometry
from align.teacher_plan import plan_for
from extraction.config import ExtractConfig
from extraction.dataset import Items
from extraction.survey import Survey, stored_bytes
from kvcore.errors import FieldError, TeacherRefusedError
from kvcore.models.backbone import read_config
from kvcore.plan import CodecConfig, KVPlan
from kvcore.store.kv_store import KVStoreReader, KVStoreWriter
from kvcore.store.manifest import MANIFEST_NAME
from kvcore.tensors.plan_size import kept_slots
from kvcore.types import EncodedSampleKV, MissingKV, Sample, TeacherInfo
from student_trainer.config import KVConfig, TeacherConfig
from student_trainer.kv_sources import KVSource, build_source

PlanFactory = Callable[[TeacherInfo], KVPlan]

# Requests that run ahead for each teacher.
PREFETCH = 2
# Samples used to measure teacher tokens per student token.
_PROBE_SAMPLES = 8
# Maximum bytes of K/V in one response.
_REQUEST_BYTES = 64 << 20


def plan_factory(config: ExtractConfig, student: KVGeometry) -> PlanFactory:
    """Returns a function that makes a teacher's plan, equal to the plan of training with the same settings."""

    def plan(info: TeacherInfo) -> KVPlan:
        if config.all_layers:
            return KVPlan(layers=tuple(range(info.layers)), selection=config.selection, codec=config.codec_spec)
        teacher = KVGeometry(info.layers, info.kv_heads, info.head_dim)
        layer_map = config.layer_map_strategy
        return plan_for(student, teacher, selection=config.selection, codec=config.codec_spec, layer_map=layer_map)

    return plan


def model_geometry(path: str, field: str) -> KVGeometry:
    """Reads a model's geometry from its configuration.

    Args:
        path: a directory or hub id.
        field: the field that errors name.

    Raises:
        FieldError: the configuration cannot be read.
    """
    try:
        found: Any = read_config(path).get_text_config()
    except (OSError, ValueError) as error:
        raise FieldError(field, f"cannot read the configuration of '{path}': {error}") from error
    heads = getattr(found, "num_key_value_heads", None) or found.num_attention_heads
    head_dim = getattr(found, "head_dim", None) or found.hidden_size // found.num_attention_heads
    return KVGeometry(found.num_hidden_layers, heads, head_dim)


def stored_rows(directory: Path, info: TeacherInfo, plan: KVPlan, items: Items, survey: Survey) -> NDArray[np.bool_]:
    """Which rows are in a store, [R]; none if the store does not exist."""
    found_R = np.zeros(survey.rows, np.bool_)
    if not (directory / MANIFEST_NAME).exists():
        return found_R
    with KVStoreReader(directory) as reader:
        for row in survey.kept():
            found_R[row] = items[row].record.sample().key(info.weights_digest, plan) in reader
    return found_R


class Teacher:
    """A connected teacher.

    Args:
        name: name of the teacher and of its store's directory.
        endpoints: endpoints of its replicas.
        config: settings of the extraction.
        plan: makes the teacher's plan.
        items: the dataset.
        survey: the dataset's survey.

    Raises:
        TeacherUnavailableError: no replica answers.
        TeacherRefusedError: the teacher does not offer the selector.
        StoreError: the store has another teacher or plan, or another process writes the same shard.
    """

    def __init__(
        self,
        name: str,
        endpoints: Sequence[str],
        config: ExtractConfig,
        plan: PlanFactory,
        items: Items,
        survey: Survey,
    ) -> None:
        self.name = name
        self._items, self._survey = items, survey
        self._batch_tokens = config.batch_tokens
        kv = KVConfig(
            selection=config.selection,
            codec=CodecConfig(name=config.codec_spec.name),
            prefetch=PREFETCH,
            request_timeout_s=config.request_timeout_s,
            patience_s=config.patience_s,
        )
        teacher = TeacherConfig(name=name, endpoints=tuple(endpoints))
        self.source: KVSource = build_source(teacher, kv, plan, config.worker, config.workers)
        try:
            self._check_selector()
            self.writer = KVStoreWriter(config.store / name, self.source.info, self.source.plan, config.writer)
        except BaseException:
            self.source.close()
            raise
        self.stored_R = stored_rows(config.store / name, self.source.info, self.source.plan, items, survey)
        self.tokens_per_student_token = 1.0

    def probe(self, student_fingerprint: str) -> None:
        """Measures teacher tokens per student token, if the tokenizers differ."""
        missing = [row for row in self._survey.kept() if not self.stored_R[row]]
        if self.source.info.tokenizer_fingerprint == student_fingerprint or not missing:
            return
        chosen = missing[:: math.ceil(len(missing) / _PROBE_SAMPLES)]
        answers = self.source.fetch([self.sample(row) for row in chosen])
        lengths = self._survey.lengths()
        pairs = [
            (answer.token_ids_T.numel(), int(lengths[row]))
            for row, answer in zip(chosen, answers, strict=True)
            if isinstance(answer, EncodedSampleKV)
        ]
        if pairs:
            self.tokens_per_student_token = sum(own for own, _ in pairs) / sum(student for _, student in pairs)

    def sample(self, row: int) -> Sample:
        """The sample of a row, as sent to the teacher."""
        return self._items[row].record.sample()

    def slots(self, row: int) -> int:
        """Estimated number of tokens kept of a row."""
        candidates = math.ceil(self._survey.candidates(self.source.plan, row) * self.tokens_per_student_token)
        return kept_slots(self.source.plan, candidates)

    def bytes_of(self, row: int) -> int:
        """Estimated bytes of a row in the store."""
        tokens = math.ceil(int(self._survey.tokens_R3[row].sum()) * self.tokens_per_student_token)
        return stored_bytes(self.slots(row), tokens, self.source.plan, self.source.info)

    def missing_bytes(self) -> int:
        """Estimated bytes of all rows that are not stored yet."""
        return sum(self.bytes_of(row) for row in self._survey.kept() if not self.stored_R[row])

    def batches(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """Yields rows that are not stored yet, longest first, in requests of at most `batch_tokens` padded tokens.

        The K/V of a request are also limited in bytes, for large teachers whose tokens are all kept.
        """
        lengths = np.ceil(self._survey.lengths() * self.tokens_per_student_token)
        batch: list[int] = []
        room = _REQUEST_BYTES
        for row in sorted((row for row in rows if not self.stored_R[row]), key=lambda row: -lengths[row]):
            size = self.bytes_of(row)
            longest = lengths[batch[0]] if batch else 0
            full = len(batch) == self.source.info.max_samples_per_request or size > room
            if batch and (full or longest * (len(batch) + 1) > self._batch_tokens):
                yield batch
                batch, room = [], _REQUEST_BYTES
            batch.append(row)
            room -= size
        if batch:
            yield batch

    def keep(self, row: int, answer: EncodedSampleKV | MissingKV) -> str | None:
        """Stores a response; returns the reason if the K/V are missing."""
        if isinstance(answer, MissingKV):
            return answer.reason
        self.writer.add(answer)
        self.stored_R[row] = True
        return None

    def close(self) -> None:
        """Closes the connections and flushes fetched samples to disk."""
        try:
            self.source.close()
        finally:
            self.writer.close()

    def _check_selector(self) -> None:
        offered, wanted = self.source.info.selectors, self.source.plan.selection.selector
        if wanted not in offered:
            raise TeacherRefusedError(self.name, f"offers the selectors {', '.join(offered)}, not '{wanted}'")
