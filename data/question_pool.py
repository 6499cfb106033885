"""The usable questions of one dataset, each once, in an order that depends on nothing but their texts and a seed."""

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

# What two writings of one question may differ in. Signs, brackets and decimal points make another question.
_NO_MATTER = re.compile(r"[\s;?\"“”‘’。、]|[.:,](?!\d)")  # noqa: RUF001 as Chinese is written


def question_key(stem: str) -> str:
    """16 hexadecimal digits that writings of the same question share, whatever their spaces, case and width."""
    plain = unicodedata.normalize("NFKC", stem).casefold()
    return xxhash.xxh3_64_hexdigest(_NO_MATTER.sub("", plain).encode())


@dataclass(frozen=True, slots=True)
class Entry:
    """One question with its records: one for each style, `direct` alone where there is no reasoning."""

    key: str
    records: tuple[tuple[Style, Record], ...]


@dataclass(slots=True)
class QuestionPool:
    """What was read of one dataset. `dropped` counts rows by reason; `unreasoned` questions have no style `cot`."""

    family: Family
    entries: list[Entry] = field(default_factory=list)
    rows: int = 0
    unreasoned: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def record_count(self) -> int:
        """Records of all its questions."""
        return sum(len(entry.records) for entry in self.entries)

    def capacity(self, step: int) -> int:
        """How many times `step` records can be taken, however they are divided among two splits."""
        # Where some questions have fewer records than others, one may be left off at a split's end.
        uneven = len({len(entry.records) for entry in self.entries}) > 1
        return max(0, self.record_count // step - uneven)

    def take(self, *counts: int) -> list[list[Entry]]:
        """So many records for each split, in entries that stay together; a record too many is left off the last."""
        rest = iter(self.entries)
        return [list(_records(rest, count)) for count in counts]


def _records(entries: Iterable[Entry], count: int) -> Iterable[Entry]:
    """Entries with `count` records in all, or fewer where there are no more."""
    while count > 0 and (entry := next(iter(entries), None)) is not None:
        kept = entry.records[:count]
        count -= len(kept)
        yield Entry(entry.key, kept)


class PoolReader:
    """Reads datasets one after the other and keeps each question once, in the first that has it.

    Args:
        styles: of the records to make.
        seed: of the order of the questions.
        fits: whether a record is short enough; None: all are.
    """

    def __init__(self, styles: Sequence[Style], seed: int, fits: Callable[[Record], bool] | None = None) -> None:
        self._styles = styles
        self._seed = seed
        self._fits = fits
        self._dataset_of: dict[str, str] = {}
        self.overlaps: Counter[tuple[str, str]] = Counter()

    def read(self, family: Family, rows: Iterable[Row]) -> QuestionPool:
        """Reads one dataset; rows that make no usable question are counted by reason.

        Raises:
            ConfigError: a row is not in the dataset's schema.
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
                    f"dataset '{family.name}': row {pool.rows} is not in the schema of {family.origin}: {error!r}"
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
            raise RowDroppedError("no reasoning, and only style cot is asked for")
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
            raise RowDroppedError(f"a question of {first} too")


def _refuse_broken(question: Question) -> None:
    try:
        "".join(astuple(question)).encode()
    except UnicodeEncodeError as error:
        raise RowDroppedError("half of a surrogate pair") from error
