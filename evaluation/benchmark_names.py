"""Finds misspelt names of benchmarks without lm-eval, which takes many seconds to import and to list its tasks."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from evaluation.config import BENCHMARKS, WORD_PROBLEMS
from kvcore.errors import FieldError


def check_names(names: Sequence[str], tasks_dir: Path | None) -> None:
    """Refuses a name that is almost one of our own and that no task file contains. Others are checked by lm-eval.

    Raises:
        FieldError: names the benchmark and the nearest one.
    """
    ours = (*BENCHMARKS, *WORD_PROBLEMS)
    for name in names:
        near = difflib.get_close_matches(name, ours, n=1, cutoff=0.8)
        if name not in ours and near and not _is_in_a_task_file(name, tasks_dir):
            raise FieldError("--eval_datasets", f"unknown dataset '{name}'; did you mean '{near[0]}'?")


def _is_in_a_task_file(name: str, tasks_dir: Path | None) -> bool:
    word = re.compile(rb"(?<![\w-])" + re.escape(name.encode()) + rb"(?![\w-])")
    return any(word.search(path.read_bytes()) for path in _task_files(tasks_dir))


def _task_files(tasks_dir: Path | None) -> Iterator[Path]:
    lm_eval = importlib.util.find_spec("lm_eval")
    folders = [Path(path) / "tasks" for path in (lm_eval.submodule_search_locations or ())] if lm_eval else []
    for folder in [*([tasks_dir] if tasks_dir else []), *folders]:
        for directory, _, files in os.walk(folder):
            yield from (Path(directory, file) for file in files if file.endswith((".yaml", ".yml")))
