"""What an evaluation is told, as flags. Free of torch, so that `--help` and mistakes are instant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from kvcore.config import StrictModel
from kvcore.errors import FieldError
from kvcore.extras import require
from kvcore.flags import FlagSet

BENCHMARKS = ("gsm8k_test", "math500", "bbh", "gpqa", "truthfulqa", "cmmlu_subset", "ceval_subset")

_DESCRIPTION = """Evaluate a model on benchmarks with lm-evaluation-harness.

A best_model of a latent run thinks in its latents; any other directory or hub id is read as a plain causal language
model. Every benchmark is loaded before the model is: if one cannot be, none is evaluated."""

_EXAMPLES = """examples:
  The seven benchmarks of the guide, from the hub:
    COMMAND --model_path outputs/three_stage_routing/stage3_learnable/best_model
  Two of them from local copies, the first 100 questions (of each subject):
    COMMAND --model_path outputs/run/best_model --eval_datasets gsm8k_test bbh \\
        --data_dir copies --limit 100 --output_file outputs/run/quick_eval.json
  A baseline, under lm-evaluation-harness's own five-shot GSM8K:
    COMMAND --model_path Qwen/Qwen2.5-1.5B --eval_datasets gsm8k gsm8k_test \\
        --output_file outputs/qwen_1_5b.json --dtype bf16 --batch_size 32"""

# Headings of --help, in order; under each its fields and what to say about them.
_GROUPS: Mapping[str, Mapping[str, str]] = {
    "model": {
        "model_path": "a best_model, or a directory or hub id for transformers",
        "device": "auto, cpu, cuda or cuda:N",
        "dtype": "of the weights; auto is as they were saved",
        "batch_size": "questions read at once",
        "max_new_tokens": "longest answer; the task's own by default, and 64 after latents, which reason without words",
    },
    "benchmarks": {
        "eval_datasets": "any of the default ones, or any task of lm-evaluation-harness by its name there",
        "data_dir": "local copies: PATH/NAME.jsonl and so on; $KVDISTILL_DATA_DIR by default",
        "tasks_dir": "more tasks, as YAML files of lm-evaluation-harness",
        "limit": "only the first so many questions of each dataset, or of each of its subjects",
    },
    "output": {"output_file": "results; eval_results.json beside the model's directory by default"},
}

Positive = Annotated[int, Field(ge=1)]


class EvalSettings(StrictModel):
    """One evaluation; `_GROUPS` says what each field means."""

    model_path: Annotated[str, Field(min_length=1)]
    eval_datasets: Annotated[tuple[str, ...], Field(min_length=1)] = BENCHMARKS
    output_file: Path | None = None
    data_dir: Path | None = None
    tasks_dir: Path | None = None
    limit: Positive | None = None
    batch_size: Positive = 8
    max_new_tokens: Positive | None = None
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")] = "auto"
    dtype: Literal["auto", "fp32", "bf16"] = "auto"

    @field_validator("output_file")
    @classmethod
    def _is_json(cls, path: Path | None) -> Path | None:
        if path is not None and path.suffix != ".json":
            raise ValueError("expected a name that ends in .json; the folder of the questions' lines has it without")
        return path

    @property
    def output(self) -> Path:
        """Where the results go: beside the model's directory by default.

        Raises:
            FieldError: none is given, and the model is no directory.
        """
        if self.output_file is not None:
            return self.output_file
        if not Path(self.model_path).is_dir():
            raise FieldError(
                "--output_file", f"is required, as there is no directory {self.model_path} to write beside"
            )
        return Path(self.model_path).resolve().parent / "eval_results.json"


FLAGS = FlagSet(EvalSettings, _DESCRIPTION, _EXAMPLES, _GROUPS, script="evaluation/multi_task_eval.py")


def read_flags(arguments: Sequence[str], program: str) -> EvalSettings:
    """Settings from the command line; `--help` prints and exits.

    Raises:
        ConfigError: a flag is unknown (names the nearest) or lacks a value, or packages are not installed.
        FieldError: a value is missing or cannot be used, by its flag.
    """
    settings = FLAGS.read(arguments, program)
    require("train", program)
    if settings.data_dir is not None:
        return settings
    from data.local_copies import default_data_dir  # noqa: PLC0415 - slow to import, and --help needs none of it

    return settings.model_copy(update={"data_dir": default_data_dir()})
