"""Checks all samples before the first step, so that training and validation do not fail later.

It refuses all samples together that are too long, or that have no reasoning although the plan selects from it. Other
findings are warnings. The sample order also uses the lengths that are counted here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from data.collate import Collator
from data.reasoning_steps import steps_of
from data.records import Record
from kvcore.errors import FieldError
from student_trainer.config import TrainConfig
from student_trainer.config_checks import step_blocks
from student_trainer.loop import ds_engine
from student_trainer.loop.rank_failures import shared_failure
from student_trainer.loop.sample_order import SampleOrder, padding_share
from student_trainer.monitoring.phase_progress import show_progress

logger = logging.getLogger(__name__)

_COUNTED_AT_ONCE = 256
_SPLIT_INTO_STEPS = 512
# `data.answer_tokens` by default: this many times the longest reference, up to the limit.
_ANSWER_ROOM, _MAX_ANSWER_TOKENS = 1.25, 512
_PROMPT, _REASONING, _ANSWER = range(3)


@dataclass(frozen=True, slots=True)
class Split:
    """The records of one file, and the student tokens of their prompt, reasoning and answer: `tokens_N3`."""

    name: str
    records: Sequence[Record]
    tokens_N3: NDArray[np.int64]

    def lengths(self) -> NDArray[np.int64]:
        """[N]: student tokens of each text, with its end token."""
        return self.tokens_N3.sum(axis=1) + 1

    def some(self, chosen_N: NDArray[Any], what: str) -> str:
        """`3 of 100 training samples have no reasoning (the first: 'x')`; nothing if there are none."""
        places = np.flatnonzero(chosen_N)
        if not len(places):
            return ""
        first = self.records[int(places[0])].id
        return f"{len(places):,} of {len(self.records):,} {self.name} samples {what} (the first: '{first}')"


def survey(config: TrainConfig, collator: Collator, train: Sequence[Record], val: Sequence[Record]) -> list[Split]:
    """Counts every sample's tokens, checks them, and logs what it finds on rank 0. All ranks must call it.

    Returns:
        the training samples, then the validation samples if there are any.

    Raises:
        FieldError: samples are too long; or have no reasoning although the plan selects from it; or cannot be
            tokenised as training needs.
    """
    splits = [
        Split(name, records, _count(collator, records, name))
        for name, records in (("training", train), ("validation", val))
        if records
    ]
    _refuse_overlong(splits, config.data.max_tokens)
    _refuse_unreasoned(splits, config)
    _refuse_end_tokens(splits, collator.end_token)
    warnings = collator.check(next((record for record in train if record.reasoning), train[0]))
    if dist.get_rank() == 0:
        for split in splits:
            lengths_N = split.lengths()
            logger.info(
                "data: %s %s samples; student tokens: %.0f on average, at most %d",
                f"{len(lengths_N):,}",
                split.name,
                lengths_N.mean(),
                lengths_N.max(),
            )
        for warning in (*warnings, *_warnings(splits, config), *_step_warnings(splits[0], collator, config)):
            logger.warning("data: %s", warning)
    return splits


def with_answer_tokens(config: TrainConfig, splits: Sequence[Split]) -> TrainConfig:
    """The configuration with `data.answer_tokens`, which is set by default if there are validation samples."""
    if config.data.answer_tokens is not None or len(splits) == 1:
        return config
    data = config.data.model_copy(update={"answer_tokens": _answer_tokens(config, splits[1])})
    return config.model_copy(update={"data": data})


def log_padding(order: SampleOrder, train: Split) -> None:
    """Logs on rank 0 how much padding its micro-batches of the first epoch have."""
    if dist.get_rank() == 0:
        batches = islice(order.micro_batches(0), math.ceil(len(train.records) / order.batch_size))
        logger.info(
            "data: %.1f %% of the text positions in micro-batches are padding",
            100 * padding_share(train.lengths(), batches),
        )


def _answer_tokens(config: TrainConfig, val: Split) -> int:
    longest = int(_written(val, config).max())
    return config.data.answer_tokens or min(_MAX_ANSWER_TOKENS, math.ceil(_ANSWER_ROOM * longest))


def _count(collator: Collator, records: Sequence[Record], name: str) -> NDArray[np.int64]:
    """[N,3]: tokens of prompt, reasoning and answer. Each rank counts a share."""
    tokens_N3 = torch.zeros(len(records), 3, dtype=torch.int64)
    share = range(dist.get_rank(), len(records), dist.get_world_size())
    parts = [share[start : start + _COUNTED_AT_ONCE] for start in range(0, len(share), _COUNTED_AT_ONCE)]
    with shared_failure():
        for part in show_progress(f"reading {name} samples", parts):
            tokens_N3[list(part)] = torch.from_numpy(collator.count([records[place] for place in part]))
    tokens_N3 = tokens_N3.to(ds_engine.device())
    dist.all_reduce(tokens_N3)
    return tokens_N3.cpu().numpy()


def _refuse_overlong(splits: Sequence[Split], limit: int) -> None:
    what = f"have more than {limit} student tokens"
    found = "; ".join(filter(None, (split.some(split.lengths() > limit, what) for split in splits)))
    if found:
        longest = max(int(split.lengths().max()) for split in splits)
        raise FieldError("data.max_tokens", f"{found}; the longest has {longest}; raise the limit or remove them")


def _refuse_unreasoned(splits: Sequence[Split], config: TrainConfig) -> None:
    """Refuses samples without reasoning if the plan selects from the reasoning and no sample may be missing."""
    taught = bool(config.teachers) or config.self_teacher
    if not taught or config.kv.selection.span != "reasoning" or config.kv.on_missing == "mask":
        return
    found = "; ".join(filter(None, map(_unreasoned, splits)))
    if found:
        raise FieldError(
            "kv.selection.span",
            f"the plan selects tokens of the reasoning, but {found}; remove them, let a teacher generate the "
            "reasoning (docs/teachers.md), or set kv.on_missing to mask",
        )


def _refuse_end_tokens(splits: Sequence[Split], end: str) -> None:
    """Refuses samples whose text holds an end token where the student has not finished."""
    what = f"have the end token '{end}' in their reasoning or answer"
    found = [
        split.some(np.array([end in record.reasoning + record.answer for record in split.records]), what)
        for split in splits
    ]
    if any(found):
        raise FieldError("data.train" if found[0] else "data.val", f"{'; '.join(filter(None, found))}; remove it")


def _unreasoned(split: Split) -> str:
    return split.some(split.tokens_N3[:, _REASONING] == 0, "have no reasoning")


def _warnings(splits: Sequence[Split], config: TrainConfig) -> Iterator[str]:
    yield from filter(None, map(_unreasoned, splits))
    if len(splits) == 1:
        return
    train, val = splits
    known = {record.prompt for record in train.records}
    repeated_N = np.array([record.prompt in known for record in val.records])
    if found := val.some(repeated_N, "have the prompt of a training sample"):
        yield f"{found}; the student may answer them from memory"
    written_N, room = _written(val, config), _answer_tokens(config, val)
    what = "answers with their reasoning" if config.student.mode == "token" else "answers"
    if found := val.some(written_N > room, f"have {what} of more than {room} tokens"):
        share = 100 * (written_N > room).mean()
        yield (
            f"{found}: {share:.1f} % are cut off and count as wrong; data.answer_tokens {int(written_N.max())} is "
            "enough for all"
        )


def _step_warnings(train: Split, collator: Collator, config: TrainConfig) -> Iterator[str]:
    """What the blocks of latents leave out of the reasoning of some training samples."""
    blocks = step_blocks(config)
    if blocks is None:
        return
    chosen = train.records[:_SPLIT_INTO_STEPS]
    steps = [steps_of(record.reasoning, blocks.kind) for record in chosen]
    lengths = [len(collator.step_tokens(step)) for each in steps for step in each[: blocks.blocks]]
    if not lengths:
        raise FieldError(
            "data.steps", f"none of the first {len(chosen)} training samples has {blocks.kind} in its reasoning"
        )
    more = sum(len(each) > blocks.blocks for each in steps)
    if more:
        most = max(map(len, steps))
        yield (
            f"{more} of the first {len(chosen)} training samples have more steps than the {blocks.blocks} blocks of "
            f"latents (at most {most}); the blocks learn only the first steps"
        )
    cut = sum(length > blocks.per_step for length in lengths)
    if cut:
        yield (
            f"{100 * cut / len(lengths):.1f} % of their steps have more than student.latents_per_step "
            f"({blocks.per_step}) tokens (at most {max(lengths)}); the blocks learn only the first tokens"
        )


def _written(split: Split, config: TrainConfig) -> NDArray[np.int64]:
    """The tokens that the student must write to answer as each record does, with the end token."""
    reasoning_N = split.tokens_N3[:, _REASONING] if config.student.mode == "token" else 0
    return reasoning_N + split.tokens_N3[:, _ANSWER] + 1
