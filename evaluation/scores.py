"""Converts lm-eval's samples to results: one entry per dataset and one line per question."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from evaluation.scoring import NO_ANSWER
from kvcore.errors import ConfigError, KVDistillError
from kvcore.files import json_text
from kvcore.intervals import wilson_interval

Entry = dict[str, Any]
_CHUNK = 250


def bootstrap_interval(values: Sequence[float], resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap percentile interval of the mean."""
    generator = np.random.default_rng(seed)
    array_N = np.asarray(values, dtype=np.float64)
    means = [
        array_N[generator.integers(len(array_N), size=(min(_CHUNK, resamples - start), len(array_N)))].mean(axis=1)
        for start in range(0, resamples, _CHUNK)
    ]
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return float(low), float(high)


def question_lines(samples: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, filter_name: str) -> list[Entry]:
    """One entry per question, in order.

    Args:
        samples: lm-eval's samples by task.
        metric: the metric that is the question's score, from 0 to 1.
        filter_name: the filter whose samples count.

    Raises:
        KVDistillError: a likelihood is not finite, or a score is not from 0 to 1.
    """
    lines = [
        _line(task, sample, metric)
        for task, of_task in samples.items()
        for sample in of_task
        if sample["filter"] == filter_name
    ]
    for line in lines:
        if any(not math.isfinite(choice["loglikelihood"]) for choice in line.get("choices", ())):
            raise KVDistillError(
                f"{line['task']}: log-likelihoods of question {line['id']} are not finite; half precision may "
                "overflow: try --dtype fp32"
            )
        if not 0.0 <= line["score"] <= 1.0:
            raise ConfigError(f"{line['task']}: '{metric}' is {line['score']}, and a score in percent needs 0 to 1")
    return lines


def dataset_entry(name: str, metric: str, lines: Sequence[Entry]) -> Entry:
    """The entry of one dataset in `eval_results.json`; scores and interval in percent, `unfinished_answers` a share."""
    values = [line["score"] for line in lines]
    score = sum(values) / len(values)
    low, high = wilson_interval(score, len(values)) if {*values} <= {0.0, 1.0} else bootstrap_interval(values)
    entry: Entry = {
        "dataset": name,
        "metric": metric,
        "score": 100 * score,
        "num_examples": len(values),
        "ci95": [100 * low, 100 * high],
        "no_answer": sum(line["answer"] == NO_ANSWER for line in lines),
        "unfinished_answers": sum(not line.get("finished", True) for line in lines) / len(lines),
    }
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    if len(tasks) > 1:
        entry["subjects"] = {task.rpartition("::")[2]: _mean(lines, task) for task in tasks}
    return entry


def write_lines(path: Path, lines: Iterable[Entry]) -> None:
    """Writes one JSON object per line, replacing the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json_text(line, ensure_ascii=False) + "\n" for line in lines)


def _mean(lines: Sequence[Entry], task: str) -> Entry:
    values = [line["score"] for line in lines if line["task"] == task]
    return {"score": 100 * sum(values) / len(values), "num_examples": len(values)}


def _line(task: str, sample: Mapping[str, Any], metric: str) -> Entry:
    arguments = cast("Sequence[Sequence[Any]]", sample["arguments"])
    line: Entry = {"task": task, "id": sample["doc_id"], "prompt": arguments[0][0]}
    first = sample["resps"][0][0]
    if isinstance(first, str):
        line |= {"output": first, "answer": sample["filtered_resps"][0]}
    else:
        likelihoods = [float(responses[0][0]) for responses in sample["resps"]]
        choices = [argument[1] for argument in arguments]
        line["answer"] = choices[likelihoods.index(max(likelihoods))]
        line["choices"] = [
            {"text": text, "loglikelihood": value} for text, value in zip(choices, likelihoods, strict=True)
        ]
    return line | {"target": sample["target"], "score": float(sample[metric])}
