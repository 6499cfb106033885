"""Evaluate a model on several benchmarks; see `--help`."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.benchmark_names import check_names
from evaluation.config import FLAGS, EvalSettings
from kvcore.command_line import run_command
from kvcore.early_checks import check_device, check_model, check_output
from kvcore.errors import FieldError
from kvcore.extras import require
from kvcore.files import write_json

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str], program: str) -> int:
    """Runs one evaluation and returns the exit status."""
    os.environ["TQDM_DISABLE"] = "1"  # The log shows progress once per dataset.

    def command() -> None:
        settings = FLAGS.read(arguments, program)
        require("train", program)
        _check(settings)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S", force=True)
        for name in ("lm_eval", "httpx", "datasets", "huggingface_hub", "transformers"):
            logging.getLogger(name).setLevel(logging.ERROR)
        evaluate(settings)

    return run_command(program, command)


def _check(settings: EvalSettings) -> None:
    """Refuses what cannot work before torch and lm-eval are imported."""
    check_model(settings.model_path, "--model_path")
    check_device(settings.device, "--device")
    check_names(settings.eval_datasets, settings.tasks_dir)
    check_output(settings.output.parent, "--output_file")


def evaluate(settings: EvalSettings) -> dict[str, Any]:
    """Evaluates every dataset, writes the results and one line per question, and returns the results.

    Raises:
        ConfigError: a dataset or the model is not available; nothing was evaluated.
        KVDistillError: the model's outputs cannot be scored.
    """
    from data.local_copies import default_data_dir  # noqa: PLC0415 - slow to import
    from evaluation.models import load_model  # noqa: PLC0415
    from evaluation.scores import dataset_entry, write_lines  # noqa: PLC0415
    from evaluation.suite import load_benchmarks  # noqa: PLC0415
    from student_trainer.monitoring.tensorboard import add_scores  # noqa: PLC0415

    output = settings.output
    benchmarks = load_benchmarks(settings.eval_datasets, settings.data_dir or default_data_dir(), settings.tasks_dir)
    model = load_model(
        settings.model_path,
        settings.dtype,
        settings.device,
        settings.batch_size,
        settings.format,
        settings.system_prompt,
    )
    for benchmark in benchmarks:
        benchmark.limit_answers(settings.max_new_tokens, model)
    results: dict[str, Any] = {}
    for number, benchmark in enumerate(benchmarks, start=1):
        label = f"{number} of {len(benchmarks)}, {benchmark.name}"
        logger.info("%s: %d questions", label, benchmark.count(settings.limit))
        lines, truncated = benchmark.run(model, settings.limit)
        write_lines(output.with_suffix("") / f"{benchmark.name}.jsonl", lines)
        entry = dataset_entry(benchmark.name, benchmark.metric, lines)
        entry |= {"truncated_prompts": truncated, "limit": settings.limit, "model": settings.model_path}
        entry["format"] = model.prompt_format.format
        _warn(label, entry)
        results[benchmark.name] = entry
        logger.info("%s: %.2f %%, 95 %% interval %.2f to %.2f", label, entry["score"], *entry["ci95"])
    average = sum(entry["score"] for entry in results.values()) / len(results)
    output_entries = _validation_of(settings.model_path, output) | results | {"average": average}
    write_json(output, output_entries)
    add_scores(Path(settings.model_path).parent, {name: entry["score"] for name, entry in results.items()})
    logger.info("average of %d datasets: %.2f; results in %s", len(results), average, output)
    return output_entries


def _warn(label: str, entry: dict[str, Any]) -> None:
    """Warns of questions that the model did not see whole or did not answer to the end."""
    if truncated := entry["truncated_prompts"]:
        logger.warning("%s: %d prompts are too long for this model and were truncated at the start", label, truncated)
    if unfinished := entry["unfinished_answers"]:
        logger.warning(
            "%s: %.1f %% of the answers were cut off before their end; raise --max_new_tokens",
            label,
            100 * unfinished,
        )


def _validation_of(model_path: str, output: Path) -> dict[str, Any]:
    """Validation entries that training wrote into the same file, to keep them beside the benchmarks."""
    if not output.is_file() or output.resolve().parent != Path(model_path).resolve().parent:
        return {}
    try:
        before = json.loads(output.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FieldError("--output_file", f"{output} exists and is not JSON: {error}; remove it") from error
    entries = before.items() if isinstance(before, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, dict) and entry.get("split") == "validation"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "multi_task_eval.py"))
