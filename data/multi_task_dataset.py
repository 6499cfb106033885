"""Mixes several reasoning datasets into a training and a validation set that share no question.

One row per question and style, with eight text columns: `prompt`, `reasoning`, `answer`, `style` (cot or direct),
`task_type`, `dataset`, `language`, `id`. The command line is `python -m data.multi_task_dataset`.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast

import typer
from datasets import Dataset, Features, Value

from data.dataset_sources import Source, find_source, read_rows
from data.families import BASE, CHINESE, EXTENDED, find_family
from data.families.base import Row as DatasetRow
from data.local_copies import default_data_dir
from data.mixing import apportion_splits
from data.mixture_report import Report, describe, log
from data.prompts import STYLES, Style
from data.question_pool import Entry, PoolReader, QuestionPool
from data.records import Record, epoch_order
from kvcore.command_line import run_command
from kvcore.errors import ConfigError, FieldError
from kvcore.files import json_text, replace_file
from kvcore.models.backbone import read_tokenizer
from kvcore.monitoring.progress import Meter
from kvcore.typer_help import Command

COLUMNS = ("prompt", "reasoning", "answer", "style", "task_type", "dataset", "language", "id")

Row = dict[str, str]
_SHOWN_EVERY = 200
_METER = "datasets"

_log = logging.getLogger(__name__)


class MultiTaskReasoningDataset:
    """Reads datasets, removes duplicate questions, mixes the datasets, and splits them by question.

    `train_samples` and `val_samples` count records. A question with reasoning gives one record of style `cot` and one
    of style `direct`, both in the same split. A question without reasoning (ARC) gives only `direct`.

    Args:
        base_datasets: datasets that are always read.
        extended_datasets: datasets that are read if `use_extended`.
        math23k_ratio: share of Math23K (Chinese) in both splits; 0 excludes it.
        seed: seed of the selection and order of records.
        styles: styles of the records to make.
        weights: relative weights of the datasets other than Math23K; 1.0 by default. If a dataset is too small for its
            share, the others fill the gap, and the report says so.
        local_paths: paths of local copies, by dataset.
        data_dir: directory of local copies; $KVDISTILL_DATA_DIR by default. Datasets without a local copy are read
            from the Hugging Face hub.
        tokenizer: path or hub id of the student. Questions with a record longer than `max_tokens` of its tokens are
            dropped, so that no record is too long for training.
        max_tokens: maximum length of a record, in tokens of `tokenizer`.
        allow_fewer: return fewer records if there are not enough, instead of raising an error.

    After `load_and_prepare`, `report` has counts, dropped rows by reason, overlaps and shares.

    Raises:
        FieldError: an argument is unknown or out of range.
    """

    def __init__(  # noqa: PLR0913 - the guide passes them all
        self,
        base_datasets: Sequence[str] = BASE,
        extended_datasets: Sequence[str] = EXTENDED,
        use_extended: bool = True,
        math23k_ratio: float = 0.2,
        train_samples: int = 15000,
        val_samples: int = 2000,
        seed: int = 42,
        styles: Sequence[Style] = STYLES,
        *,
        weights: Mapping[str, float] | None = None,
        local_paths: Mapping[str, str | Path] | None = None,
        data_dir: str | Path | None = None,
        tokenizer: str | Path | None = None,
        max_tokens: int = 2048,
        allow_fewer: bool = False,
    ) -> None:
        self.base_datasets = list(base_datasets)
        self.extended_datasets = list(extended_datasets)
        self.use_extended = use_extended
        self.math23k_ratio = math23k_ratio
        self.train_samples = train_samples
        self.val_samples = val_samples
        self.seed = seed
        self.styles = list(styles)
        self.weights = dict(weights or {})
        self.local_paths = dict(local_paths or {})
        self.data_dir = Path(data_dir) if data_dir else default_data_dir()
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.allow_fewer = allow_fewer
        self.report: Report = {}
        self._check()

    @property
    def datasets(self) -> list[str]:
        """The datasets to read, Math23K last."""
        extended = self.extended_datasets if self.use_extended else []
        return [*self.base_datasets, *extended, *([CHINESE] if self.math23k_ratio > 0 else [])]

    def load_and_prepare(self) -> tuple[Dataset, Dataset]:
        """Reads the datasets and returns the training and the validation set.

        Raises:
            ConfigError: datasets are not available or readable, or there are too few records; says what to do.
        """
        problems: list[ConfigError] = []
        sources: dict[str, Source] = {}
        for name in self.datasets:
            with _collected(problems):
                sources[name] = find_source(find_family(name), self.local_paths, self.data_dir)
        reader = PoolReader(self.styles, self.seed, self._fits())
        pools = self._read(sources, reader, problems)
        if len(problems) > 1:
            listed = "".join(f"\n  {problem}" for problem in problems)
            raise ConfigError(f"{len(problems)} of {len(self.datasets)} datasets cannot be read:{listed}")
        if problems:
            raise problems[0]
        quotas = self._quotas(pools)
        taken = {name: pool.take(quotas[name][1], quotas[name][0]) for name, pool in pools.items()}
        val = self._mixed(pools, {name: entries[0] for name, entries in taken.items()}, self.val_samples)
        train = self._mixed(pools, {name: entries[1] for name, entries in taken.items()}, self.train_samples)
        self.report = describe(pools, sources, reader.overlaps, self._shares(), {"train": train, "val": val})
        log(self.report)
        return _dataset(train), _dataset(val)

    def _read(
        self, sources: Mapping[str, Source], reader: PoolReader, problems: list[ConfigError]
    ) -> dict[str, QuestionPool]:
        """The datasets' questions. After a problem, only reads the first row of the others, to find all problems."""
        max_rows = self.train_samples + self.val_samples
        pools: dict[str, QuestionPool] = {}
        with Meter({_METER: len(sources)}) as meter:
            for name, source in sources.items():
                with _collected(problems):
                    rows = _with_progress(read_rows(source, self.seed, max_rows), name, meter)
                    if problems:
                        next(rows, None)
                        continue
                    pools[name] = reader.read(source.family, rows)
                    meter.advance(_METER)
                    _log.info("read %d questions of %s from %s", len(pools[name].entries), name, source)
        return pools

    def write_report(self, path: str | Path) -> None:
        """Writes the report as JSON, replacing the file.

        Raises:
            ConfigError: `load_and_prepare` was not called yet.
        """
        if not self.report:
            raise ConfigError("there is no report before load_and_prepare")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json_text(self.report, ensure_ascii=False, indent=2) + "\n")

    def _check(self) -> None:
        names = self.datasets
        for field, value in (("base_datasets", self.base_datasets), ("extended_datasets", self.extended_datasets)):
            for name in value:
                find_family(name, field)
                if name == CHINESE:
                    raise FieldError(field, f"{CHINESE} is added by math23k_ratio; remove it here")
        repeated = [name for name in names if names.count(name) > 1]
        if repeated:
            raise FieldError("extended_datasets", f"'{repeated[0]}' is named twice")
        if not 0.0 <= self.math23k_ratio <= 1.0:
            raise FieldError("math23k_ratio", f"{self.math23k_ratio} is not from 0 to 1")
        if self.math23k_ratio < 1.0 and not set(names) - {CHINESE}:
            raise FieldError("base_datasets", "is empty")
        for field, count in (("train_samples", self.train_samples), ("val_samples", self.val_samples)):
            if count < 1:
                raise FieldError(field, f"{count} is too small; the minimum is 1 record")
        self._check_options()

    def _check_options(self) -> None:
        if not self.styles or len(set(self.styles)) < len(self.styles) or not set(self.styles) <= set(STYLES):
            raise FieldError("styles", f"{self.styles} must name one or both of {', '.join(STYLES)}")
        for name, weight in self.weights.items():
            if name not in self.datasets or name == CHINESE:
                raise FieldError(
                    f"weights.{name}",
                    f"unknown; weights apply to {', '.join(each for each in self.datasets if each != CHINESE)}",
                )
            if not (math.isfinite(weight) and weight >= 0.0):
                raise FieldError(f"weights.{name}", f"{weight} is not a finite number of at least 0")
        for name in self.local_paths:
            find_family(name, "local_paths")
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise FieldError("data_dir", f"{self.data_dir} is not a directory")

    def _shares(self) -> dict[str, float]:
        """Each dataset's requested share; the shares sum to 1."""
        others = {name: self.weights.get(name, 1.0) for name in self.datasets if name != CHINESE}
        whole = sum(others.values()) or 1.0
        shares = {name: (1.0 - self.math23k_ratio) * weight / whole for name, weight in others.items()}
        return shares | ({CHINESE: self.math23k_ratio} if CHINESE in self.datasets else {})

    def _quotas(self, pools: Mapping[str, QuestionPool]) -> dict[str, tuple[int, int]]:
        """Each dataset's (train, val) number of records, a multiple of the records per question."""
        step = len(self.styles)
        train, val = math.ceil(self.train_samples / step), math.ceil(self.val_samples / step)
        chinese = round(train * self.math23k_ratio), round(val * self.math23k_ratio)
        shares = self._shares()
        quotas: dict[str, tuple[int, int]] = {}
        for counts, names in (
            ((train - chinese[0], val - chinese[1]), [name for name in pools if name != CHINESE]),
            (chinese, [name for name in pools if name == CHINESE]),
        ):
            capacities = {name: pools[name].capacity(step) for name in names}
            if sum(capacities[name] for name in names if shares[name] > 0) < sum(counts) and not self.allow_fewer:
                raise self._too_few(pools, names, step * sum(counts))
            units = apportion_splits(*counts, {name: shares[name] for name in names}, capacities)
            quotas |= {name: (step * train, step * val) for name, (train, val) in units.items()}
        totals = [sum(counts) for counts in zip(*quotas.values(), strict=True)]
        for split, asked, total in zip(("train", "val"), (self.train_samples, self.val_samples), totals, strict=True):
            if asked and not total:
                raise ConfigError(
                    f"{split}_samples: {asked} were asked for, but so few records are usable that none is left for "
                    f"this split; add datasets, or change the ratio of train_samples to val_samples"
                )
        return quotas

    def _too_few(self, pools: Mapping[str, QuestionPool], names: Sequence[str], needed: int) -> ConfigError:
        found = ", ".join(f"{name} {_usable(pools[name])}" for name in names)
        return ConfigError(
            f"{self.train_samples} training and {self.val_samples} validation records with a Chinese share of "
            f"{self.math23k_ratio} need {needed} usable records, but there are: {found}; request fewer, add "
            "datasets, or set allow_fewer"
        )

    def _mixed(
        self, pools: Mapping[str, QuestionPool], entries: Mapping[str, Sequence[Entry]], count: int
    ) -> list[Row]:
        """At most `count` rows, shuffled. Quotas are whole questions, so there may be a few more rows than `count`."""
        rows = [
            asdict(record)
            | {
                "style": style,
                "task_type": pools[name].family.task_type,
                "dataset": name,
                "language": pools[name].family.language,
            }
            for name, found in entries.items()
            for entry in found
            for style, record in entry.records
        ]
        return [rows[place] for place in epoch_order(len(rows), self.seed, 0)[:count]]

    def _fits(self) -> Callable[[Record], bool] | None:
        """A function that returns whether a record is short enough for training, or None without a tokenizer."""
        if self.tokenizer is None:
            return None
        # Imported here because they load torch.
        from data.collate import Collator  # noqa: PLC0415

        collator = Collator(read_tokenizer(str(self.tokenizer)), self.max_tokens)
        return lambda record: int(collator.count([record]).sum()) + 1 <= self.max_tokens


@contextmanager
def _collected(problems: list[ConfigError]) -> Iterator[None]:
    """Adds the error of the block to `problems`."""
    try:
        yield
    except ConfigError as error:
        problems.append(error)


def _with_progress(rows: Iterable[DatasetRow], name: str, meter: Meter) -> Iterator[DatasetRow]:
    for number, row in enumerate(rows):
        if number % _SHOWN_EVERY == 0:
            meter.advance(_METER, 0, f"{name}: {number:,} rows")
        yield row


def _usable(pool: QuestionPool) -> str:
    dropped = ", ".join(f"{count} {reason}" for reason, count in pool.dropped.items())
    return f"{pool.record_count} (dropped: {dropped})" if dropped else str(pool.record_count)


def _dataset(rows: Sequence[Row]) -> Dataset:
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    return Dataset.from_dict(columns, features=Features({name: Value("string") for name in COLUMNS}))


EXAMPLES = """
python -m data.multi_task_dataset --output data/prepared
python -m data.multi_task_dataset --output data/prepared --data-dir /data/copies --math23k-ratio 0.2
# Only English questions of one dataset
python -m data.multi_task_dataset --output small --base gsm8k --no-extended --math23k-ratio 0 \\
    --train-samples 2000
"""


def prepare(  # noqa: PLR0913, PLR0917 - arguments are command-line flags
    output: Annotated[Path, typer.Option(help="Output directory; gets train/, val/ and report.json.")],
    base: Annotated[
        list[str] | None, typer.Option(help="A base dataset; repeat for more. Default: gsm8k, svamp, strategyqa.")
    ] = None,
    extended: Annotated[bool, typer.Option(help="Also read MATH, ARC-Challenge and HotpotQA.")] = True,
    math23k_ratio: Annotated[float, typer.Option(help="Share of Math23K (Chinese); 0 excludes it.")] = 0.2,
    train_samples: Annotated[int, typer.Option(help="Number of training records.")] = 15000,
    val_samples: Annotated[int, typer.Option(help="Number of validation records.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the selection and order of records.")] = 42,
    style: Annotated[
        list[str] | None, typer.Option(help="Style of the records; repeat for more. Default: cot and direct.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Directory of local copies.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="The student's path or hub id; drops records that are too long for it.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum length of a record, in the student's tokens.")] = 2048,
    allow_fewer: Annotated[
        bool, typer.Option("--allow-fewer", help="Write fewer records if there are not enough.")
    ] = False,
) -> None:
    """Mix reasoning datasets into training and validation data that share no question."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    loader = MultiTaskReasoningDataset(
        base or BASE,
        use_extended=extended,
        math23k_ratio=math23k_ratio,
        train_samples=train_samples,
        val_samples=val_samples,
        seed=seed,
        styles=cast("list[Style] | None", style) or STYLES,
        data_dir=data_dir,
        tokenizer=tokenizer,
        max_tokens=max_tokens,
        allow_fewer=allow_fewer,
    )
    train, val = loader.load_and_prepare()
    train.save_to_disk(output / "train")
    val.save_to_disk(output / "val")
    loader.write_report(output / "report.json")


def main() -> None:
    """Runs `prepare` as a command."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(cls=Command, epilog=EXAMPLES)(prepare)
    sys.exit(run_command("multi_task_dataset", app))


if __name__ == "__main__":
    main()
