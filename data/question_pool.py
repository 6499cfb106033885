"""The usable questions of one dataset, without duplicates, in an order that depends only on their texts and a seed."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, field

import xxhash

from data.families.base import Family, Question, Row, RowDroppedError
from data.prompts import Style, record_of
from data.records import Record
from kvcore.errors import ConfigError

# Characters in which two copies of a question may differ. Signs, brackets and decimal points do distinguish questions.
_IGNORED = re.compile(r"[\s;?\"“”‘’。、]|[.:,](?!\d)")  # noqa: RUF001 as Chinese is written


def question_key(stem: str) -> str:
    """A hash (16 hexadecimal digits) of a question that ignores spaces, case and character width."""
    plain = unicodedata.normalize("NFKC", stem).casefold()
    return xxhash.xxh3_64_hexdigest(_IGNORED.sub("", plain).encode())


@dataclass(frozen=True, slots=True)
class Entry:
    """One question with one record per style; only `direct` without reasoning."""

    key: str
    records: tuple[tuple[Style, Record], ...]


@dataclass(slots=True)
class QuestionPool:
    """The questions of one dataset. `dropped`: rows by reason; `unreasoned`: questions without reasoning."""

    family: Family
    entries: list[Entry] = field(default_factory=list)
    rows: int = 0
    unreasoned: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def record_count(self) -> int:
        """Number of records of all questions."""
        return sum(len(entry.records) for entry in self.entries)

    def capacity(self, step: int) -> int:
        """How many groups of `step` records can be taken, for any division between two splits."""
        # If questions differ in their number of records, the end of a split may lose one.
        uneven = len({len(entry.records) for entry in self.entries}) > 1
        return max(0, self.record_count // step - uneven)

    def take(self, *counts: int) -> list[list[Entry]]:
        """Takes `counts` records for each split, question by question; the last question may lose a record."""
        rest = iter(self.entries)
        return [list(_records(rest, count)) for count in counts]


def _records(entries: Iterable[Entry], count: int) -> Iterable[Entry]:
    """Entries with `count` records in total, or all that are left."""
    while count > 0 and (entry := next(iter(entries), None)) is not None:
        kept = entry.records[:count]
        count -= len(kept)
        yield Entry(entry.key, kept)


class PoolReader:
    """Reads datasets one after the other and keeps each question once, in the first dataset that has it.

    Args:
        styles: styles of the records to make.
        seed: seed of the order of questions.
        fits: returns whether a record is short enough; None accepts all.
    """

    def __init__(self, styles: Sequence[Style], seed: int, fits: Callable[[Record], bool] | None = None) -> None:
        self._styles = styles
        self._seed = seed
        self._fits = fits
        self._dataset_of: dict[str, str] = {}
        self.overlaps: Counter[tuple[str, str]] = Counter()

    def read(self, family: Family, rows: Iterable[Row]) -> QuestionPool:
        """Reads one dataset and counts unusable rows by reason.

        Raises:
            ConfigError: a row does not match the dataset's schema.
        """
        pool = QuestionPool(family)
        for row in rows:
            pool.rows += 1
            try:
                pool.entries.append(self._entry(pool, family.parse(row)))
            except RowDroppedError as reason:
                pool.dropped[str(reason)] += 1
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"dataset '{family.name}': row {pool.rows} does not match the schema of {family.origin}: {error!r}"
                ) from error
        pool.entries.sort(key=lambda entry: xxhash.xxh3_64_intdigest(entry.key.encode(), seed=self._seed % 2**64))
        return pool

    def _entry(self, pool: QuestionPool, question: Question) -> Entry:
        family = pool.family
        _refuse_broken(question)
        key = question_key(question.stem)
        self._refuse_repeated(family.name, key)
        styles: list[Style] = [style for style in self._styles if style == "direct" or question.reasoning]
        if not styles:
            raise RowDroppedError("no reasoning, and only style cot is requested")
        records: tuple[tuple[Style, Record], ...] = tuple(
            (style, record_of(question, style, family.language, f"{family.name}-{key}-{style}")) for style in styles
        )
        if self._fits is not None and not all(self._fits(record) for _, record in records):
            raise RowDroppedError("longer than max_tokens")
        self._dataset_of[key] = family.name
        pool.unreasoned += not question.reasoning
        return Entry(key, records)

    def _refuse_repeated(self, name: str, key: str) -> None:
        first = self._dataset_of.get(key)
        if first == name:
            raise RowDroppedError("repeated in this dataset")
        if first is not None:
            self.overlaps[first, name] += 1
            raise RowDroppedError(f"also in {first}")


def _refuse_broken(question: Question) -> None:
    try:
        "".join(astuple(question)).encode()
    except UnicodeEncodeError as error:
        raise RowDroppedError("unpaired surrogate") from error
