"""Prepares the records of the run on a real model: short questions of GSM8K, and held-out ones from its test split."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from data.dataset_sources import find_source, read_rows
from data.families.base import Family
from data.families.gsm8k import FAMILY
from data.local_copies import find_copies
from data.question_pool import Entry, PoolReader
from data.records import Record, write_records
from kvcore.errors import ConfigError
from kvcore.tensors.offsets import read_text

# Evaluation reads the test split under this name, too.
HELD_OUT = replace(FAMILY, name="gsm8k_test", split="test")


@dataclass(frozen=True, slots=True)
class Prepared:
    """Where the records came from: the sources by split, and the share of usable questions that are short enough."""

    sources: dict[str, str]
    short_share: float


def prepare(
    train: Path,
    val: Path,
    counts: tuple[int, int],
    *,
    data_dir: Path | None,
    tokenizer: Path,
    max_tokens: int,
    seed: int,
) -> Prepared:
    """Writes the training and the held-out records, all of style `cot`.

    The held-out questions come from GSM8K's test split, or from its training split if `data_dir` has only that. No
    question is in both files.

    Args:
        train: the file of training records.
        val: the file of held-out records.
        counts: number of training and of held-out records.
        data_dir: directory of local copies; the hub if None.
        tokenizer: directory of the student, whose tokens are counted.
        max_tokens: maximum length of a record.
        seed: which questions are taken.

    Raises:
        ConfigError: GSM8K is not available, or has too few short questions.
    """
    fits = _Fits(tokenizer, max_tokens)
    reader = PoolReader(["cot"], seed, fits)
    sources: dict[str, str] = {}

    def entries(family: Family) -> list[Entry]:
        source = find_source(family, {}, data_dir)
        sources[family.name] = str(source)
        # GSM8K is small, so all rows are read and the last argument is not used.
        return reader.read(family, read_rows(source, seed, 0)).entries

    pool = entries(FAMILY)
    only_train = bool(find_copies(data_dir, FAMILY.name)) and not find_copies(data_dir, HELD_OUT.name)
    if only_train:
        held_out, pool = pool[: counts[1]], pool[counts[1] :]
    else:
        held_out = entries(HELD_OUT)
    for path, found, count in ((train, pool, counts[0]), (val, held_out, counts[1])):
        if len(found) < count:
            raise ConfigError(f"GSM8K has {len(found)} questions of at most {max_tokens} tokens, {count} are needed")
        write_records(path, [record for entry in found[:count] for _, record in entry.records])
    return Prepared(sources, fits.kept / fits.seen)


class _Fits:
    """Whether a record is short enough; counts the checked records."""

    def __init__(self, tokenizer: Path, max_tokens: int) -> None:
        from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import

        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self._max_tokens = max_tokens
        self.seen = self.kept = 0

    def __call__(self, record: Record) -> bool:
        parts = (record.prompt, record.reasoning, record.answer)
        # The collator tokenises each part on its own, and appends the end of the text.
        tokens = 1 + sum(
            len(read_text(self._tokenizer, part, add_special_tokens=not at)[0]) for at, part in enumerate(parts)
        )
        self.seen += 1
        self.kept += tokens <= self._max_tokens
        return tokens <= self._max_tokens
