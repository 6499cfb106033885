"""The configuration of `kvdistill eval`. Imports no torch, so that `--help` and validation are fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from kvcore.config import Device, PositiveInt, StrictModel, Text
from kvcore.errors import FieldError
from kvcore.flags import FlagSet

BENCHMARKS = ("gsm8k_test", "math500", "bbh", "gpqa", "truthfulqa", "cmmlu_subset", "ceval_subset")
# More sets of word problems, which papers on latent reasoning report.
WORD_PROBLEMS = ("gsm_hard", "multiarith")


class EvalSettings(StrictModel):
    """One evaluation: a model, the benchmarks, and the file of the results."""

    headings: ClassVar = {
        "Model": "model_path",
        "Prompts": "format",
        "Benchmarks": "eval_datasets",
        "Output": "output_file",
    }

    model_path: Text
    """A run's best_model, or a directory or hub id of a transformers model."""
    device: Device = "auto"
    """Device of the model: auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Data type of the weights. `auto` keeps the type in which they were saved."""
    batch_size: PositiveInt = 8
    """Number of questions in a batch."""
    format: Literal["auto", "plain", "chat"] = "auto"
    """How a prompt is written. `plain`: the text of its task; `chat`: this text as a message in the tokenizer's chat
    template; `auto`: the format of the student's training (`data.format`), and `plain` for other models."""
    system_prompt: Text | None = None
    """System message of chats. Defaults to that of the student's training (`data.system_prompt`)."""
    max_new_tokens: PositiveInt | None = None
    """Maximum length of an answer in tokens. Defaults to the task's own limit, or 64 for latent models, whose reasoning
    is not text."""

    eval_datasets: Annotated[tuple[str, ...], Field(min_length=1)] = BENCHMARKS
    """Benchmarks to run: any of the default ones, `gsm_hard`, `multiarith`, or any task name of
    lm-evaluation-harness."""
    data_dir: Path | None = None
    """Directory of local copies, such as PATH/NAME.jsonl. Defaults to $KVDISTILL_DATA_DIR."""
    tasks_dir: Path | None = None
    """Directory of more tasks, as YAML files of lm-evaluation-harness."""
    limit: PositiveInt | None = None
    """Number of questions per dataset, or per subject of a dataset. All by default."""

    output_file: Path | None = None
    """JSON file of the results. Defaults to eval_results.json next to the model's directory."""

    @field_validator("output_file")
    @classmethod
    def _is_json(cls, path: Path | None) -> Path | None:
        if path is not None and path.suffix != ".json":
            raise ValueError("expected a name that ends in .json")
        return path

    @property
    def output(self) -> Path:
        """The file of the results.

        Raises:
            FieldError: `output_file` is not set and the model is not a directory.
        """
        if self.output_file is not None:
            return self.output_file
        if not Path(self.model_path).is_dir():
            raise FieldError(
                "--model_path", f"there is no directory '{self.model_path}'; for a hub id, set --output_file"
            )
        return Path(self.model_path).resolve().parent / "eval_results.json"


FLAGS = FlagSet(
    EvalSettings,
    """Evaluate a model on benchmarks with lm-evaluation-harness.

The best_model of a latent run reasons in its latents. Any other model is evaluated as a causal language model. The
command loads all benchmarks before the model. If one cannot be loaded, it evaluates none.""",
    """# The seven benchmarks of the guide, from the hub
COMMAND --model-path outputs/three_stage_routing/stage3_learnable/best_model
# Two of them from local copies, the first 100 questions (of each subject)
COMMAND --model-path outputs/run/best_model --eval-datasets gsm8k_test bbh \\
    --data-dir copies --limit 100 --output-file outputs/run/quick_eval.json
# A baseline, with the five-shot GSM8K of lm-evaluation-harness
COMMAND --model-path Qwen/Qwen2.5-1.5B --eval-datasets gsm8k gsm8k_test \\
    --output-file outputs/qwen_1_5b.json --dtype bf16 --batch-size 32""",
    script="evaluation/multi_task_eval.py",
)
