"""Evaluate a model on several benchmarks; see `--help`."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.config import FLAGS, EvalSettings
from kvcore.command_line import run_command
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
        logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S", force=True)
        for name in ("lm_eval", "httpx", "datasets", "huggingface_hub", "transformers"):
            logging.getLogger(name).setLevel(logging.ERROR)
        evaluate(settings)

    return run_command(program, command)


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

    output = settings.output
    benchmarks = load_benchmarks(settings.eval_datasets, settings.data_dir or default_data_dir(), settings.tasks_dir)
    model = load_model(settings.model_path, settings.dtype, settings.device, settings.batch_size)
    for benchmark in benchmarks:
        benchmark.limit_answers(settings.max_new_tokens, model)
    results: dict[str, Any] = {}
    for number, benchmark in enumerate(benchmarks, start=1):
        label = f"{number} of {len(benchmarks)}, {benchmark.name}"
        logger.info("%s: %d questions", label, benchmark.count(settings.limit))
        lines, truncated = benchmark.run(model, settings.limit)
        if truncated:
            logger.warning(
                "%s: %d prompts are too long for this model and were truncated at the start", label, truncated
            )
        write_lines(output.with_suffix("") / f"{benchmark.name}.jsonl", lines)
        entry = dataset_entry(benchmark.name, benchmark.metric, lines)
        entry |= {"truncated_prompts": truncated, "limit": settings.limit, "model": settings.model_path}
        results[benchmark.name] = entry
        logger.info("%s: %.2f %%, 95 %% interval %.2f to %.2f", label, entry["score"], *entry["ci95"])
    average = sum(entry["score"] for entry in results.values()) / len(results)
    output_entries = _validation_of(settings.model_path, output) | results | {"average": average}
    write_json(output, output_entries)
    logger.info("average of %d datasets: %.2f; results in %s", len(results), average, output)
    return output_entries


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
