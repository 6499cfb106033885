"""Runs one extraction: survey, teachers, disk space check, fetching K/V, and writing the result."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from extraction.config import ExtractConfig
from extraction.dataset import Items
from extraction.finish import clean_up, finish, forget_skipped, is_finished, read_skipped, write_skipped
from extraction.pull import pull
from extraction.survey import Survey, pt_bytes, survey
from extraction.teachers import Teacher, model_geometry, plan_factory, stored_rows
from kvcore.errors import ConfigError, TeacherError
from kvcore.models.backbone import read_tokenizer
from kvcore.monitoring.units import in_bytes
from kvcore.store.kv_store import KVStoreReader
from kvcore.store.manifest import MANIFEST_NAME
from kvcore.tensors.offsets import fingerprint
from student_trainer.launching.endpoints import read_endpoints, teacher_names
from student_trainer.launching.local_teachers import LocalTeachers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Margin of the size estimate: teacher tokens are estimated if the tokenizers differ.
_MARGIN = 1.02


def extract(config: ExtractConfig) -> bool:
    """Extracts this shard; the process that finishes last writes the result.

    Returns:
        whether the result is complete.

    Raises:
        ConfigError: a flag or the dataset is not valid, or the disk has too little space.
        TeacherError: a teacher cannot be reached, refuses, or cannot serve a sample.
        StoreError: an earlier run's store has another teacher or plan, or is damaged.
    """
    run = _Run(config)
    if is_finished(config, run.survey):
        clean_up(config)
        logger.info("%s is already complete: nothing to do", config.report_path)
        return True
    config.store.mkdir(parents=True, exist_ok=True)
    if run.has_all():
        logger.info("all samples are already in %s", config.store)
    else:
        forget_skipped(config)
        write_skipped(config, run.survey, run.items, run.pull())
    return finish(config, run.survey, run.items, list(run.models))


class _Run:
    """The state that all steps of an extraction share."""

    def __init__(self, config: ExtractConfig) -> None:
        self.config = config
        self.models = teacher_names(config.teacher_models)
        self.endpoints = (
            read_endpoints(config.teacher_endpoints, config.teacher_models) if config.teacher_endpoints else {}
        )
        self.plan = plan_factory(config, model_geometry(config.student_model, "--student_model"))
        self.items = Items(config.dataset_path, config.limit)
        tokenizer = _tokenizer(config.student_model)
        self.student_fingerprint = fingerprint(tokenizer)
        logger.info("reading %d samples of %s", len(self.items), config.dataset_path)
        self.survey: Survey = survey(self.items, tokenizer, config)
        self.rows = [row for row in self.survey.kept() if row % config.workers == config.worker]

    def has_all(self) -> bool:
        """Whether this shard's rows are stored for every teacher, so that no teacher has to be started.

        With `on_missing: skip`, rows that a teacher could not serve are not requested again.
        """
        known = read_skipped(self.config, self.survey) if self.config.on_missing == "skip" else []
        impossible = {entry.row for entry in known}
        rows = [row for row in self.rows if row not in impossible]
        for name in self.models:
            directory = self.config.store / name
            if not (directory / MANIFEST_NAME).exists():
                return False
            with KVStoreReader(directory) as reader:
                info, plan = reader.info, reader.plan
            if plan.digest() != self.plan(info).digest():
                return False
            if not stored_rows(directory, info, plan, self.items, self.survey)[rows].all():
                return False
        return True

    def pull(self) -> dict[str, dict[int, str]]:
        """Fetches this shard's rows into the stores; returns the rows that teachers could not serve."""
        with ExitStack() as stack:
            endpoints: Mapping[str, Sequence[str]] = self.endpoints
            servers: LocalTeachers | None = None
            if not endpoints:
                servers = self._servers()
                endpoints = {name: [endpoint] for name, endpoint in stack.enter_context(servers).items()}
            try:
                return self._pull(endpoints, stack)
            except TeacherError:
                if servers is not None:
                    # The exit of a local server explains more than a lost connection.
                    servers.check_alive()
                raise

    def _pull(self, endpoints: Mapping[str, Sequence[str]], stack: ExitStack) -> dict[str, dict[int, str]]:
        teachers = [stack.enter_context(closing(self._teacher(name, endpoints[name]))) for name in self.models]
        for teacher in teachers:
            teacher.probe(self.student_fingerprint)
        self._check_disk(teachers)
        return pull(teachers, self.rows, self.survey)

    def _servers(self) -> LocalTeachers:
        config = self.config
        logs = config.output_dir / "logs"
        if config.workers > 1:
            logs /= config.writer
        logger.info("starting a server for each of %s; logs in %s", ", ".join(self.models), logs)
        return LocalTeachers(
            self.models,
            logs,
            device=config.device,
            dtype=config.dtype,
            load_in_8bit=config.load_in_8bit,
            options={"max_batch_tokens": config.batch_tokens},
        )

    def _teacher(self, name: str, endpoints: Sequence[str]) -> Teacher:
        return Teacher(name, endpoints, self.config, self.plan, self.items, self.survey)

    def _check_disk(self, teachers: Sequence[Teacher]) -> None:
        """Logs how much all shards together will write.

        Raises:
            ConfigError: the disk has less space.
        """
        config, survey = self.config, self.survey
        needed = sum(teacher.missing_bytes() for teacher in teachers)
        summary = f"about {in_bytes(needed)} of K/V into {config.store}"
        if config.format == "pt":
            size = survey.text_bytes + sum(
                pt_bytes(teacher.slots(row), teacher.source.plan, teacher.source.info)
                for teacher in teachers
                for row in survey.kept()
            )
            summary = f"{summary}, which is removed at the end, and {in_bytes(size)} into {config.pt_path}"
            needed += size
        free = shutil.disk_usage(config.output_dir).free
        logger.info("will write %s (%.3f GB in total); the disk has %s free", summary, needed / 1e9, in_bytes(free))
        if needed * _MARGIN > free:
            raise ConfigError(
                f"--output_dir: needs about {needed / 1e9:.3f} GB, and the disk of {config.output_dir} has "
                f"{free / 1e9:.3f} GB free. Choose another disk, fewer samples (--limit), fewer tokens (--kv_budget), "
                "fewer layers (--layers student), or --format store"
            )


def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        return read_tokenizer(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--student_model: cannot load the tokenizer of '{path}': {error}") from error
