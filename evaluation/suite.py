"""The benchmarks by name, as lm-eval's tasks, with everything they need loaded before a model runs."""

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
from lm_eval.tasks import TaskManager

from evaluation.config import BENCHMARKS
from evaluation.latent_lm import LatentLM
from evaluation.scores import Entry, question_lines
from evaluation.watched_lm import WatchedLM
from kvcore.errors import ConfigError, FieldError

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

# A student that thinks in latents writes the answer alone.
LATENT_ANSWER_TOKENS = 64
# lm-eval's own, for a task that does not say.
_ANSWER_TOKENS = 256
_TASKS_DIR = Path(__file__).parent / "tasks"
# Anything that a task of lm-eval may do while it loads: its own errors, pyarrow's, the hub's, a missing package.
_LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    DatasetsError,
)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One dataset of an evaluation.

    `tasks`: lm-eval's tasks by name, several for a benchmark of several subjects; `loaded`: as lm-eval hands them over.
    `metric` and `filter`: which of lm-eval's figures is its score.
    """

    name: str
    tasks: dict[str, ConfigurableTask]
    loaded: dict[str, Any]
    metric: str
    filter: str

    def count(self, limit: int | None) -> int:
        """How many questions are asked; `limit` is of each subject."""
        sizes = [len(task.eval_docs) for task in self.tasks.values()]
        return sum(size if limit is None else min(size, limit) for size in sizes)

    def limit_answers(self, tokens: int | None, model: Any) -> None:
        """Sets the longest answer: `tokens`, or the task's own, which latents make short.

        Raises:
            FieldError: the model has no room for such an answer after a prompt.
        """
        for task in self.tasks.values():
            if task.OUTPUT_TYPE != "generate_until":
                continue
            own = int((task.config.generation_kwargs or {}).get("max_gen_toks", _ANSWER_TOKENS))
            longest = tokens or (min(own, LATENT_ANSWER_TOKENS) if isinstance(model, LatentLM) else own)
            if longest >= model.max_length:
                raise FieldError(
                    "--max_new_tokens",
                    f"{self.name} takes answers of up to {longest} tokens, and this model reads {model.max_length} in "
                    "all; choose fewer",
                )
            task.set_config(key="generation_kwargs", value={"max_gen_toks": longest}, update=True)

    def run(self, model: Any, limit: int | None) -> tuple[list[Entry], int]:
        """Asks the questions, of each subject the first `limit`.

        Returns:
            one entry for each question, and how many prompts lost their beginning, as the model reads no more.
        """
        watched = WatchedLM(model, self.name)
        with _quiet():
            found = evaluate(lm=watched, task_dict=self.loaded, limit=limit, bootstrap_iters=0, log_samples=True)
        assert found is not None, "one process evaluates"
        samples = cast("dict[str, Any]", found)["samples"]
        return question_lines(samples, self.metric, self.filter), watched.truncated


def load_benchmarks(
    names: Sequence[str], data_dir: Path | None = None, tasks_dir: Path | None = None
) -> list[Benchmark]:
    """Loads every benchmark's questions.

    Args:
        names: of `BENCHMARKS`, of tasks in `tasks_dir`, or of lm-eval's own.
        data_dir: local copies of the benchmarks' data.
        tasks_dir: a directory of more tasks in lm-eval's YAML form.

    Raises:
        FieldError: a name is unknown (names the nearest) or stands twice.
        ConfigError: benchmarks cannot be loaded; names each, its reason, and how to provide it.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise FieldError("--eval_datasets", f"{', '.join(twice)} stands twice" if twice else "name at least one")
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
    """Finds a task where it is: ours first, then the user's, then lm-eval's thousands, which take a while to read."""

    def __init__(self, data_dir: Path | None, tasks_dir: Path | None) -> None:
        if tasks_dir is not None and not tasks_dir.is_dir():
            raise FieldError("--tasks_dir", f"there is no directory {tasks_dir}")
        if data_dir is not None and not data_dir.is_dir():
            raise FieldError("--data_dir", f"there is no directory {data_dir}")
        metadata: Any = {"data_dir": str(data_dir)} if data_dir else {}
        self._ours = TaskManager(include_path=_TASKS_DIR, include_defaults=False, metadata=metadata)
        assert set(BENCHMARKS) <= set(self._ours.all_tasks), "lm-eval skips files that it cannot read"
        self._users = TaskManager(include_path=tasks_dir, include_defaults=False) if tasks_dir else None
        self._theirs: TaskManager | None = None

    def check(self, name: str) -> None:
        """Raises FieldError for a name that nobody knows."""
        self._holder(name)

    def load(self, name: str) -> dict[str, Any]:
        """lm-eval's tasks and groups of that name."""
        random.seed(0)  # Some of lm-eval's tasks shuffle their options as they load.
        return cast("dict[str, Any]", self._holder(name).load([name]))

    def _holder(self, name: str) -> TaskManager:
        for manager in (self._ours, self._users):
            if manager is not None and name in manager.all_tasks:
                return manager
        if self._theirs is None:
            self._theirs = TaskManager()
        if name in self._theirs.all_tasks:
            return self._theirs
        known = [*BENCHMARKS, *(self._users.all_tasks if self._users else ())]
        near = difflib.get_close_matches(name, [*known, *self._theirs.all_tasks], n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise FieldError(
            "--eval_datasets", f"no dataset is called '{name}'; {hint}there are {', '.join(known)}, and lm-eval's tasks"
        )


def _benchmark(name: str, loaded: dict[str, Any]) -> Benchmark:
    tasks: dict[str, ConfigurableTask] = loaded["tasks"]
    if not tasks:
        raise ConfigError(f"{name}: holds no task")
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed=1234)
    metric, chosen = _score_of(name, next(iter(tasks.values())))
    for task in tasks.values():
        if task.aggregation().get(metric) is not mean:
            raise ConfigError(f"{name}: its metric '{metric}' is no mean over items, so it has no score in percent")
    return Benchmark(name, tasks, loaded, metric, chosen)


def _score_of(name: str, task: ConfigurableTask) -> tuple[str, str]:
    """A task's first metric, under its most forgiving filter."""
    metrics = list(task.aggregation())
    if not metrics:
        raise ConfigError(f"{name}: the task has no metric")
    filters = [each.name for each in task._filters]  # noqa: SLF001 - lm-eval has no other way to ask
    return metrics[0], "flexible-extract" if "flexible-extract" in filters else filters[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's remarks on its own tasks and the progress bars of `datasets` say nothing to who only names one."""
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
