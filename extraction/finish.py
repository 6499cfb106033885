"""Completes an extraction after all shards: the index of each store, the .pt file, and the report."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from extraction.config import ExtractConfig
from extraction.dataset import Items
from extraction.pt_file import PTWriter
from extraction.survey import Survey
from kvcore.errors import ConfigError, TeacherRefusedError
from kvcore.files import json_text, replace_file
from kvcore.monitoring.units import in_bytes
from kvcore.store.kv_store import KVStoreReader, merge_index
from kvcore.tensors.codec import decode_batch
from kvcore.types import EncodedSampleKV

logger = logging.getLogger(__name__)

# Settings that define the result; the others only affect how it is produced.
_IDENTITY = {
    "teacher_models",
    "student_model",
    "output_name",
    "format",
    "kv_compression",
    "max_length",
    "limit",
    "layer_map_strategy",
}


@dataclass(frozen=True, slots=True)
class Skipped:
    """A sample that a teacher could not serve."""

    row: int
    id: str
    teacher: str
    reason: str


def settings_of(config: ExtractConfig, survey: Survey) -> dict[str, Any]:
    """The settings in the report; two extractions are the same if these are equal."""
    chosen = config.model_dump(mode="json", include=_IDENTITY)
    plan = {"selection": config.selection.model_dump(), "codec": config.codec_spec.model_dump()}
    return {**chosen, **plan, "layers": "all" if config.all_layers else "student", "dataset": survey.digest}


def is_finished(config: ExtractConfig, survey: Survey) -> bool:
    """Whether this extraction is already finished.

    Raises:
        ConfigError: the output name is used by something else.
    """
    result = config.pt_path if config.format == "pt" else config.store
    if not config.report_path.is_file():
        # A result without a report next to its store is ours: writing the report was interrupted.
        if config.format == "pt" and result.exists() and not config.store.exists():
            raise ConfigError(f"--output_name: {result} already exists; choose another name, or remove it")
        return False
    before = json.loads(config.report_path.read_text(encoding="utf-8"))["settings"]
    wanted = settings_of(config, survey)
    for name, value in wanted.items():
        if before.get(name) != value:
            raise ConfigError(
                f"--output_name: {config.report_path} belongs to an extraction with another {name} "
                f"({before.get(name)!r}, not {value!r}); choose another name, or remove its files"
            )
    return result.exists()


def write_skipped(config: ExtractConfig, survey: Survey, items: Items, failures: Mapping[str, dict[int, str]]) -> None:
    """Writes the list of samples that teachers could not serve to this shard, replacing the list of an earlier run."""
    skipped = [
        asdict(Skipped(row, items[row].record.id, teacher, reason))
        for teacher, found in failures.items()
        for row, reason in sorted(found.items())
    ]
    content = json_text({"dataset": survey.digest, "skipped": skipped}, ensure_ascii=False, indent=1)
    replace_file(_skipped_path(config), content)


def finish(config: ExtractConfig, survey: Survey, items: Items, names: list[str]) -> bool:
    """Completes the extraction if all shards are stored; returns False if some are still missing.

    Raises:
        TeacherRefusedError: a teacher could not serve a sample, and `on_missing` is `fail`.
        StoreError: a store is damaged, or the result cannot be written.
    """
    with _one_at_a_time(config.output_dir), ExitStack() as stack:
        if is_finished(config, survey):
            return True
        readers = {name: stack.enter_context(KVStoreReader(config.store / name)) for name in names}
        rows, lacking = _stored_rows(survey, items, readers)
        skipped = [entry for entry in read_skipped(config, survey) if entry.row in lacking]
        absent = len(lacking - {entry.row for entry in skipped})
        if absent:
            logger.info("%d samples of other shards are missing; the last shard to finish completes the result", absent)
            return False
        if skipped and config.on_missing == "fail":
            first = skipped[0]
            raise TeacherRefusedError(
                first.teacher,
                f"cannot serve '{first.id}': {first.reason}. {len(lacking)} samples lack K/V of a teacher; all others "
                "are stored. Run the same command with --on_missing skip to finish without them",
            )
        if not rows:
            raise ConfigError("there is no sample that every teacher can serve")
        size = _write(config, items, rows, readers)
        _write_report(config, survey, items, rows, readers, skipped, size)
    clean_up(config)
    return True


def clean_up(config: ExtractConfig) -> None:
    """Removes the stores from which a finished .pt file was written."""
    if config.format == "pt" and config.store.is_dir():
        shutil.rmtree(config.store)


def forget_skipped(config: ExtractConfig) -> None:
    """Deletes this shard's list of skipped samples, to request them again, and lists of another number of shards."""
    for path in config.store.glob("skipped-*.json"):
        if path == _skipped_path(config) or not path.stem.endswith(f"of{config.workers}"):
            path.unlink(missing_ok=True)


def _skipped_path(config: ExtractConfig) -> Path:
    return config.store / f"skipped-{config.writer}.json"


def _write(config: ExtractConfig, items: Items, rows: list[int], readers: Mapping[str, KVStoreReader]) -> int:
    """Writes the result and returns its size in bytes."""
    if config.format == "store":
        for name in readers:
            merge_index(config.store / name)
        return sum(file.stat().st_size for file in config.store.rglob("*") if file.is_file())
    logger.info("writing %s", config.pt_path)
    with PTWriter(config.pt_path) as file:
        for row in rows:
            item = items[row]
            record = item.record
            file.append(
                {
                    "example_id": record.id,
                    "prompt": record.prompt,
                    "answer": record.answer,
                    "style": item.style,
                    "task_type": item.task_type,
                    "dataset": record.dataset,
                    "teacher_kvs": [_decoded(name, _stored(reader, items, row)) for name, reader in readers.items()],
                }
            )
    return config.pt_path.stat().st_size


def _stored(reader: KVStoreReader, items: Items, row: int) -> EncodedSampleKV:
    kv = reader.get(items[row].record.sample().key(reader.info.weights_digest, reader.plan))
    assert kv is not None, "only rows in every store are written"
    return kv


def _decoded(teacher: str, encoded: EncodedSampleKV) -> dict[str, Any]:
    """One teacher's entry: keys and values [L,H,M,D]; positions [M], or [L,H|1,M] if the scope is layer or head."""
    kv = decode_batch([encoded])
    k_LHMD, v_LHMD = kv.k_BLHMD[0], kv.v_BLHMD[0]
    if encoded.codec.name != "raw":
        # bf16 is exact for the codec bf16 and finer than the other codecs.
        k_LHMD, v_LHMD = k_LHMD.bfloat16(), v_LHMD.bfloat16()
    shared = encoded.positions.shape[:2] == (1, 1)
    return {
        "teacher": teacher,
        "keys": k_LHMD,
        "values": v_LHMD,
        "positions": encoded.positions.flatten() if shared else encoded.positions,
        "seq_len": int(encoded.token_ids_T.numel()),
    }


def _stored_rows(survey: Survey, items: Items, readers: Mapping[str, KVStoreReader]) -> tuple[list[int], set[int]]:
    """The rows that are in every teacher's store, in order, and the other rows."""
    rows: list[int] = []
    lacking: set[int] = set()
    for row in survey.kept():
        sample = items[row].record.sample()
        if all(sample.key(reader.info.weights_digest, reader.plan) in reader for reader in readers.values()):
            rows.append(row)
        else:
            lacking.add(row)
    return rows, lacking


def read_skipped(config: ExtractConfig, survey: Survey) -> list[Skipped]:
    """The samples that teachers could not serve in the last run of each shard."""
    found: list[Skipped] = []
    for path in sorted(config.store.glob("skipped-*.json")):
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["dataset"] == survey.digest:
            found += [Skipped(**entry) for entry in tree["skipped"]]
    return found


def _write_report(
    config: ExtractConfig,
    survey: Survey,
    items: Items,
    rows: list[int],
    readers: Mapping[str, KVStoreReader],
    skipped: list[Skipped],
    size: int,
) -> None:
    left_out = [{"id": items[row].record.id, "reason": reason} for row, reason in sorted(survey.left_out.items())]
    left_out += [{"id": entry.id, "teacher": entry.teacher, "reason": entry.reason} for entry in skipped]
    report = {
        "settings": settings_of(config, survey),
        "samples": survey.rows,
        "written": len(rows),
        "bytes": size,
        "left_out": left_out,
        "teachers": {
            name: {
                "model": reader.info.model,
                "weights_digest": reader.info.weights_digest,
                "layers": reader.info.layers,
                "kv_heads": reader.info.kv_heads,
                "head_dim": reader.info.head_dim,
                "plan": reader.plan.model_dump(mode="json"),
            }
            for name, reader in readers.items()
        },
    }
    replace_file(config.report_path, json_text(report, ensure_ascii=False, indent=2))
    _log_result(config, len(rows), survey.rows, size, left_out)


def _log_result(config: ExtractConfig, written: int, samples: int, size: int, left_out: list[dict[str, str]]) -> None:
    result = config.pt_path if config.format == "pt" else config.store
    logger.info("%s: %d of %d samples, %s", result, written, samples, in_bytes(size))
    for reason, count in Counter(entry["reason"] for entry in left_out).most_common(5):
        logger.warning("samples left out: %d; reason: %s (all are listed in %s)", count, reason, config.report_path)
    if config.format == "store":
        selection = config.selection.model_dump(mode="json", include={"selector", "budget", "span", "scope"})
        flags = [f"kv.selection.{name}={value}" for name, value in selection.items()]
        settings = ["kv.mode=offline", f"kv.store={result}", f"kv.codec.name={config.codec_spec.name}", *flags]
        logger.info("train with: kvdistill train ... %s", " ".join(f"--set {setting}" for setting in settings))


@contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Locks the output directory, so that only one process completes the extraction."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s: this file system has no locks (%s)", directory, error)
        yield
    finally:
        os.close(handle)
