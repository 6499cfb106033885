"""One extraction from start to end: survey, teachers, what it will take, the K/V, and the result."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, cast

from extraction.config import ExtractConfig
from extraction.dataset import Items
from extraction.finish import clean_up, finish, forget_skipped, is_finished, read_skipped, write_skipped
from extraction.pull import pull
from extraction.survey import Survey, pt_bytes, survey
from extraction.teachers import Teacher, model_geometry, plan_factory, stored_rows
from kvcore.errors import ConfigError, TeacherError
from kvcore.monitoring.units import in_bytes
from kvcore.store.kv_store import KVStoreReader
from kvcore.store.manifest import MANIFEST_NAME
from kvcore.tensors.offsets import fingerprint
from student_trainer.launching.endpoints import read_endpoints, teacher_names
from student_trainer.launching.local_teachers import LocalTeachers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Of the estimate: teachers' tokens are only guessed where the tokenizers differ.
_MARGIN = 1.02


def extract(config: ExtractConfig) -> bool:
    """Extracts this worker's part; the last worker completes the result.

    Returns:
        Whether the result is complete.

    Raises:
        ConfigError: a flag, the dataset or the disk's free space does not allow it.
        TeacherError: a teacher cannot be reached, refuses, or cannot serve a sample.
        StoreError: what an earlier run stored is of another teacher or plan, or damaged.
    """
    run = _Run(config)
    if is_finished(config, run.survey):
        clean_up(config)
        logger.info("%s is complete already: nothing to do", config.report_path)
        return True
    config.store.mkdir(parents=True, exist_ok=True)
    if run.has_all():
        logger.info("everything is stored already in %s", config.store)
    else:
        forget_skipped(config)
        write_skipped(config, run.survey, run.items, run.pull())
    return finish(config, run.survey, run.items, list(run.models))


class _Run:
    """What every step of an extraction needs."""

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
        """Whether this worker's rows are stored for every teacher, so that none needs to be started.

        With `on_missing` `skip`, rows that a teacher could not serve are not asked for again.
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
        """Brings this worker's rows to the stores; returns what teachers could not serve."""
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
                    # A server that died says more than a connection that was lost.
                    servers.check_alive()
                raise

    def _pull(self, endpoints: Mapping[str, Sequence[str]], stack: ExitStack) -> dict[str, dict[int, str]]:
        teachers = [stack.enter_context(closing(self._teacher(name, endpoints[name]))) for name in self.models]
        for teacher in teachers:
            teacher.probe(self.student_fingerprint)
        self._check_disk(teachers)
        return pull(teachers, self.rows, self.survey, self.config.prefetch)

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
        """Says how much will be written, by all workers together.

        Raises:
            ConfigError: the disk has less.
        """
        config, survey = self.config, self.survey
        needed = sum(teacher.missing_bytes() for teacher in teachers)
        said = f"about {in_bytes(needed)} of K/V into {config.store}"
        if config.format == "pt":
            size = survey.text_bytes + sum(
                pt_bytes(teacher.slots(row), teacher.source.plan, teacher.source.info)
                for teacher in teachers
                for row in survey.kept()
            )
            said = f"{said}, which is removed at the end, and {in_bytes(size)} into {config.pt_path}"
            needed += size
        free = shutil.disk_usage(config.output_dir).free
        logger.info("will write %s (%.3f GB in all); the disk has %s free", said, needed / 1e9, in_bytes(free))
        if needed * _MARGIN > free:
            raise ConfigError(
                f"--output_dir: needs about {needed / 1e9:.3f} GB, and the disk of {config.output_dir} has "
                f"{free / 1e9:.3f} GB free. Choose another disk, fewer samples (--limit), fewer tokens (--kv_budget), "
                "fewer layers (--layers student), or --format store"
            )


def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import

    try:
        return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--student_model: cannot load the tokenizer of '{path}': {error}") from error
