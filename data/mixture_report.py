"""The report of a mixture: counts, dropped rows by reason, overlaps, requested and actual shares."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data.dataset_sources import Source
from data.question_pool import QuestionPool

Report = dict[str, Any]
# Warn if a share is this far below the requested one; smaller differences are rounding.
_WARN_BELOW = 0.01

_log = logging.getLogger(__name__)


def describe(
    pools: Mapping[str, QuestionPool],
    sources: Mapping[str, Source],
    overlaps: Mapping[tuple[str, str], int],
    requested_shares: Mapping[str, float],
    splits: Mapping[str, Sequence[Mapping[str, str]]],
) -> Report:
    """The report as JSON values. `splits`: the rows of each split."""
    return {
        "datasets": {
            name: {
                "source": str(sources[name]),
                "rows": pool.rows,
                "questions": len(pool.entries),
                "records": pool.record_count,
                "without_reasoning": pool.unreasoned,
                "dropped": dict(pool.dropped),
                "asked_share": requested_shares[name],
                **{split: _count(rows, "dataset")[name] for split, rows in splits.items()},
            }
            for name, pool in pools.items()
        },
        "overlaps": {" and ".join(pair): count for pair, count in overlaps.items()},
        "splits": {
            split: {
                "records": len(rows),
                "questions": len({_question(row) for row in rows}),
                "styles": dict(_count(rows, "style")),
                "chinese_share": _count(rows, "language")["zh"] / max(len(rows), 1),
            }
            for split, rows in splits.items()
        },
    }


def log(report: Report) -> None:
    """Logs one line per dataset and split, and a warning if a dataset was too small for its share."""
    total = sum(split["records"] for split in report["splits"].values())
    for name, found in report["datasets"].items():
        _log.info(
            "%s: %d rows of %s, %d questions, dropped %s; %d train and %d val records",
            name, found["rows"], found["source"], found["questions"], found["dropped"] or "none",
            found["train"], found["val"],
        )  # fmt: skip
        share = (found["train"] + found["val"]) / max(total, 1)
        if share < found["asked_share"] - _WARN_BELOW:
            _log.warning(
                "%s has only %d usable records: its share is %.1f %% instead of %.1f %%; other datasets fill the gap",
                name, found["records"], 100 * share, 100 * found["asked_share"],
            )  # fmt: skip
    for split, found in report["splits"].items():
        _log.info("%s: %s", split, found)
    for pair, count in report["overlaps"].items():
        _log.info("%d questions are in both %s and were kept once", count, pair)


def _count(rows: Sequence[Mapping[str, str]], column: str) -> Counter[str]:
    return Counter(row[column] for row in rows)


def _question(row: Mapping[str, str]) -> str:
    return row["id"].removesuffix(f"-{row['style']}")
