"""Loads benchmarks by name as lm-eval tasks, with all their data, before a model runs."""

from __future__ import annotations

import difflib
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import datasets
from datasets.exceptions import DatasetsError
from lm_eval.api.metrics import mean
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from evaluation.config import BENCHMARKS, WORD_PROBLEMS
from evaluation.latent_lm import LatentLM
from evaluation.metered_lm import MeteredLM
from evaluation.scores import Entry, question_lines
from kvcore.errors import ConfigError, FieldError

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

# A latent student generates only the answer.
LATENT_ANSWER_TOKENS = 64
# lm-eval's default.
_ANSWER_TOKENS = 256
# The settings of a task's generation that are supported: `TextLM`'s and lm-eval's other names of the length.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_GENERATION = {"until", "do_sample", "temperature", "top_p", *_LENGTHS}
_ONE_BEAM = ("num_beams", 1)
_TASKS_DIR = Path(__file__).parent / "tasks"
# Errors that loading an lm-eval task may raise: its own, pyarrow's, the hub's, a missing package.
_LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, DatasetsError)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One dataset of an evaluation.

    `tasks`: lm-eval tasks by name, one per subject. `loaded`: lm-eval's tasks and groups. `metric` and `filter`: the
    lm-eval metric that is the score.
    """

    name: str
    tasks: dict[str, ConfigurableTask]
    loaded: dict[str, Any]
    metric: str
    filter: str

    def count(self, limit: int | None) -> int:
        """Number of questions, at most `limit` per subject."""
        sizes = [len(task.eval_docs) for task in self.tasks.values()]
        return sum(size if limit is None else min(size, limit) for size in sizes)

    def limit_answers(self, tokens: int | None, model: Any) -> None:
        """Sets the maximum answer length: `tokens`, or the task's default, which is shorter for latent students.

        Raises:
            FieldError: the answer would fill the model's context.
        """
        for task in self.tasks.values():
            if task.OUTPUT_TYPE != "generate_until":
                continue
            settings: Any = normalize_gen_kwargs(task.config.generation_kwargs or {}, _ANSWER_TOKENS)
            own = settings["max_gen_toks"]
            longest = tokens or (min(own, LATENT_ANSWER_TOKENS) if isinstance(model, LatentLM) else own)
            if longest >= model.max_length:
                raise FieldError(
                    "--max_new_tokens",
                    f"{self.name} needs answers of up to {longest} tokens, but the model's context has "
                    f"{model.max_length}; set a smaller value",
                )
            task.set_config(key="generation_kwargs", value={"max_gen_toks": longest}, update=True)

    def run(self, model: Any, limit: int | None) -> tuple[list[Entry], int]:
        """Runs the questions, at most `limit` per subject.

        Returns:
            one entry per question, and the number of prompts that were truncated to the model's context. An entry with
            a generated answer has `finished`: whether the answer ended by itself.
        """
        metered = MeteredLM(model, self.name)
        with _quiet():
            found = evaluate(lm=metered, task_dict=self.loaded, limit=limit, bootstrap_iters=0, log_samples=True)
        assert found is not None, "one process evaluates"
        samples = cast("dict[str, Any]", found)["samples"]
        lines = question_lines(samples, self.metric, self.filter)
        for line in lines:
            if "output" in line:
                line["finished"] = line["prompt"] not in metered.unfinished
        return lines, metered.truncated


def load_benchmarks(
    names: Sequence[str], data_dir: Path | None = None, tasks_dir: Path | None = None
) -> list[Benchmark]:
    """Loads the questions of benchmarks.

    Args:
        names: names from `BENCHMARKS`, `WORD_PROBLEMS`, `tasks_dir` or lm-eval.
        data_dir: directory of local copies of the data.
        tasks_dir: directory of further tasks as lm-eval YAML files.

    Raises:
        FieldError: a name is unknown (suggests the nearest) or given twice.
        ConfigError: benchmarks cannot be loaded; lists each with the reason and how to provide it.
    """
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or not names:
        problem = f"{', '.join(repeated)} is given twice" if repeated else "name at least one dataset"
        raise FieldError("--eval_datasets", problem)
    benchmarks: list[Benchmark] = []
    problems: list[str] = []
    with _quiet():
        manager = _Manager(data_dir, tasks_dir)
        for name in names:
            manager.check(name)
        for name in names:
            try:
                benchmarks.append(_benchmark(name, manager.load(name)))
            except _LOADING_ERRORS as error:
                reason = str(error) if isinstance(error, ConfigError) else f"{name}: {type(error).__name__}: {error}"
                problems.append(reason)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} of {len(names)} datasets cannot be evaluated, so none was:\n{listed}")
    return benchmarks


class _Manager:
    """Finds tasks in evaluation/tasks, then in the user's directory, then in lm-eval, whose tasks are slow to index."""

    def __init__(self, data_dir: Path | None, tasks_dir: Path | None) -> None:
        if tasks_dir is not None and not tasks_dir.is_dir():
            raise FieldError("--tasks_dir", f"there is no directory {tasks_dir}")
        if data_dir is not None and not data_dir.is_dir():
            raise FieldError("--data_dir", f"there is no directory {data_dir}")
        metadata: Any = {"data_dir": str(data_dir)} if data_dir else {}
        self._ours = TaskManager(include_path=_TASKS_DIR, include_defaults=False, metadata=metadata)
        assert {*BENCHMARKS, *WORD_PROBLEMS} <= set(self._ours.all_tasks), "lm-eval skips unreadable files"
        self._users = TaskManager(include_path=tasks_dir, include_defaults=False) if tasks_dir else None
        self._theirs: TaskManager | None = None

    def check(self, name: str) -> None:
        """Raises FieldError if the name is unknown."""
        self._holder(name)

    def load(self, name: str) -> dict[str, Any]:
        """lm-eval's tasks and groups with that name."""
        random.seed(0)  # Some lm-eval tasks shuffle their options on loading.
        return cast("dict[str, Any]", self._holder(name).load([name]))

    def _holder(self, name: str) -> TaskManager:
        for manager in (self._ours, self._users):
            if manager is not None and name in manager.all_tasks:
                return manager
        if self._theirs is None:
            self._theirs = TaskManager()
        if name in self._theirs.all_tasks:
            return self._theirs
        known = [*BENCHMARKS, *WORD_PROBLEMS, *(self._users.all_tasks if self._users else ())]
        close = difflib.get_close_matches(name, [*known, *self._theirs.all_tasks], n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise FieldError(
            "--eval_datasets", f"unknown dataset '{name}'; {hint}known: {', '.join(known)}, and lm-eval's tasks"
        )


def _benchmark(name: str, loaded: dict[str, Any]) -> Benchmark:
    tasks: dict[str, ConfigurableTask] = loaded["tasks"]
    if not tasks:
        raise ConfigError(f"{name}: has no task")
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed=1234)
        _check_generation(name, task)
    metric, chosen = _score_of(name, next(iter(tasks.values())))
    for task in tasks.values():
        if task.aggregation().get(metric) is not mean:
            raise ConfigError(
                f"{name}: its metric '{metric}' is not a mean over questions, so it has no score in percent"
            )
    return Benchmark(name, tasks, loaded, metric, chosen)


def _check_generation(name: str, task: ConfigurableTask) -> None:
    """Refuses a task whose texts are to be generated in another way than greedily or by sampling."""
    wanted: dict[str, Any] = task.config.generation_kwargs or {}
    unknown = [
        f"{key}={value}" for key, value in wanted.items() if key not in _GENERATION and (key, value) != _ONE_BEAM
    ]
    if unknown:
        raise ConfigError(
            f"{name}: its task sets {', '.join(unknown)} for generation, which kvdistill does not support"
        )


def _score_of(name: str, task: ConfigurableTask) -> tuple[str, str]:
    """A task's first metric and its most lenient filter."""
    metrics = list(task.aggregation())
    if not metrics:
        raise ConfigError(f"{name}: the task has no metric")
    filters = [each.name for each in task._filters]  # noqa: SLF001 - lm-eval has no other way to ask
    return metrics[0], "flexible-extract" if "flexible-extract" in filters else filters[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences lm-eval's warnings about its own tasks and the progress bars of `datasets`."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
