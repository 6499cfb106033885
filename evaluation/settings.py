"""What an evaluation is told, as flags. Free of torch, so that `--help` and mistakes are instant."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import Field, field_validator

from kvcore.config import StrictModel, parse
from kvcore.errors import ConfigError, FieldError

BENCHMARKS = ("gsm8k_test", "math500", "bbh", "gpqa", "truthfulqa", "cmmlu_subset", "ceval_subset")

_DESCRIPTION = """Evaluate a model on benchmarks with lm-evaluation-harness.

A best_model of a latent run thinks in its latents; any other directory or hub id is read as a plain causal language
model. Every benchmark is loaded before the model is: if one cannot be, none is evaluated."""

_EXAMPLES = """examples:
  The seven benchmarks of the guide, from the hub:
    python evaluation/multi_task_eval.py --model_path outputs/three_stage_routing/stage3_learnable/best_model
  Two of them from local copies, the first 100 questions (of each subject):
    python evaluation/multi_task_eval.py --model_path outputs/run/best_model --eval_datasets gsm8k_test bbh \\
        --data_dir copies --limit 100 --output_file outputs/run/quick_eval.json
  A baseline, under lm-evaluation-harness's own five-shot GSM8K:
    python evaluation/multi_task_eval.py --model_path Qwen/Qwen2.5-1.5B --eval_datasets gsm8k gsm8k_test \\
        --output_file outputs/qwen_1_5b.json --dtype bf16 --batch_size 32"""

Positive = Annotated[int, Field(ge=1)]


class EvalSettings(StrictModel):
    """One evaluation; `parser` says what each field means."""

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


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as our errors."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parser(program: str) -> argparse.ArgumentParser:
    """The parser with every flag."""
    made = _Parser(
        prog=program,
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add = made.add_argument
    add("--model_path", metavar="PATH", help="required: a best_model, or a directory or hub id for transformers")
    add(
        "--eval_datasets",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(BENCHMARKS)} (default: all of these), or any task of lm-evaluation-harness by its name there",
    )
    add("--output_file", metavar="FILE", help="results (default: eval_results.json beside the model's directory)")
    add("--data_dir", metavar="DIR", help="local copies: DIR/NAME.jsonl and so on (default: $KVDISTILL_DATA_DIR)")
    add("--tasks_dir", metavar="DIR", help="more tasks, as YAML files of lm-evaluation-harness")
    add("--limit", type=int, metavar="N", help="only the first N questions of each dataset, or of each of its subjects")
    add("--batch_size", type=int, metavar="N", help="questions read at once (default: 8)")
    add(
        "--max_new_tokens",
        type=int,
        metavar="N",
        help="longest answer (default: the task's own, and 64 after latents, where no reasoning is written)",
    )
    add("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--dtype", choices=("auto", "fp32", "bf16"), help="of the weights (default: auto, as they were saved)")
    return made


def read_flags(arguments: Sequence[str], program: str) -> EvalSettings:
    """Settings from the command line; `--help` prints and exits.

    Raises:
        ConfigError: a flag is unknown (names the nearest), lacks a value, or one that is needed is missing.
        FieldError: a value that cannot be used, by its flag.
    """
    made = parser(program)
    known, extra = made.parse_known_args(list(arguments))
    if extra:
        flags = [flag for action in made._actions for flag in action.option_strings]  # noqa: SLF001 - no public list
        near = difflib.get_close_matches(extra[0].partition("=")[0], flags, n=1, cutoff=0.0)
        raise ConfigError(f"unknown flag {extra[0]}; did you mean {near[0]}?")
    given: dict[str, Any] = vars(known)
    from data.sources import default_data_dir  # noqa: PLC0415 - slow to import, and --help needs none of it

    given.setdefault("data_dir", default_data_dir())
    try:
        return parse(given, EvalSettings)
    except FieldError as error:
        required = error.problem.startswith("Field required")
        raise FieldError(f"--{error.field}", "is required" if required else error.problem) from error
