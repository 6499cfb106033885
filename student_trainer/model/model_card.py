"""The model card of a student, written beside its weights: how to use it, its scores, and how it was made."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from kvcore.intervals import wilson_interval
from kvcore.models.files import CARD, CARD_TAG

if TYPE_CHECKING:
    from student_trainer.config import TrainConfig
    from student_trainer.loop.training_context import TrainingContext

# The settings that decide what a student learns. Paths and addresses of the machines are left out.
_SETTINGS: dict[str, Any] = {
    "student": {"dtype", "mode", "latents", "passes", "projection", "latents_per_step", "lora"},
    "self_teacher": True,
    "kv": {"selection", "codec", "control"},
    "align": True,
    "fuse": True,
    "loss": True,
    "optim": True,
    "data": {"format", "system_prompt", "steps", "drop_last_step", "max_tokens", "answer_tokens"},
    "run": {"seed", "steps", "epochs", "curriculum_epochs", "global_batch", "best_by"},
}
_RESULTS = "## Results"
_IN_LATENTS = """It reasons in {latents} latents between prompt and answer, which it computes in {passes} passes,
instead of writing its reasoning. The code that does so is `hub_student.py`, so `trust_remote_code=True` is needed.
Without it, transformers refuses the model."""
_AS_TEXT = "It is an ordinary causal language model, which writes its reasoning as text."
_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("REPO"{trust})
tokenizer = AutoTokenizer.from_pretrained("REPO"{trust})
{batch}
tokens = model.generate(**batch, max_new_tokens=64)
print(tokenizer.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))
```

or, with kvdistill installed,

```python
from kvdistill import load_student

print(load_student("REPO").generate({prompt})[0])
```

where `REPO` is the name of this repository, or the path of its folder."""


def write_card(context: TrainingContext, results: Mapping[str, Any], directory: Path) -> None:
    """Writes the model card of a run's best model.

    Args:
        context: the run.
        results: the content of `eval_results.json`; empty without validation.
        directory: of the model.
    """
    header = _header(context).to_yaml(line_break="\n")
    (directory / CARD).write_text(f"---\n{header}\n---\n\n{_text(context, results)}", encoding="utf-8")


def with_results(card: str, results: Mapping[str, Any]) -> str:
    """A model card with the scores of another `eval_results.json`, such as one with benchmarks."""
    replaced = f"{_RESULTS}\n\n{results_table(results)}\n\n"
    return re.sub(rf"^{_RESULTS}\n.*?(?=^## )", lambda _: replaced, card, count=1, flags=re.MULTILINE | re.DOTALL)


def results_table(results: Mapping[str, Any]) -> str:
    """The scores with their 95 % intervals and the validation losses, as a table in Markdown."""
    rows: list[Sequence[Any]] = []
    for name, entry in results.items():
        if not isinstance(entry, Mapping):
            continue  # The average.
        score, count = entry["score"], entry["num_examples"]
        low, high = entry.get("ci95") or (100 * end for end in wilson_interval(score / 100, count))
        losses = [f"{entry[key]:.3f}" if key in entry else "" for key in ("answer_ce", "kv_loss")]
        split = entry.get("split", "test")
        rows.append((name, split, count, entry["metric"], f"{score:.1f}", f"{low:.1f} to {high:.1f}", *losses))
    if not rows:
        return "The run had no validation data."
    names = ("data", "split", "samples", "metric", "score (%)", "95 % interval", "answer cross-entropy", "KV loss")
    return _table(names, rows)


def _header(context: TrainingContext) -> ModelCardData:
    config = context.config
    datasets = sorted({record.dataset for record in context.train if record.dataset})
    return ModelCardData(
        license=config.run.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[CARD_TAG, "kv-distillation", *(["latent-reasoning"] if _is_latent(config) else [])],
        base_model=_base_model(config.student.path),
        datasets=datasets or None,
        metrics=["accuracy"] if context.val else None,
    )


def _base_model(path: str) -> Any:
    """The hub id of the model that training started from; of an earlier run's model the one in its card, if any."""
    directory = Path(path).expanduser()
    if not directory.is_dir():
        return path
    card = directory / CARD
    return (
        ModelCard.load(card, ignore_metadata_errors=True).data.to_dict().get("base_model") if card.is_file() else None
    )


def _text(context: TrainingContext, results: Mapping[str, Any]) -> str:
    config = context.config
    latent = _is_latent(config)
    kind = _IN_LATENTS.format(latents=config.student.latents, passes=config.student.passes) if latent else _AS_TEXT
    sections = {
        "Use": _use(config),
        "Results": results_table(results),
        "Teachers": _teachers(context),
        "Data": _data(context),
        "Settings": f"```yaml\n{_settings(config)}```\n\ndocs/configuration.md of kvdistill describes each key.",
        "Command": f"```bash\n{_command()}\n```",
    }
    intro = f"This student was trained by kvdistill to match the keys and values of its teachers.\n{kind}"
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"# {config.run.output_dir.resolve().name}\n\n{intro}\n\n{body}\n"


def _use(config: TrainConfig) -> str:
    """How to load the student, and to ask it in the format in which it was trained."""
    trust = ", trust_remote_code=True" if _is_latent(config) else ""
    if config.data.format == "plain":
        prompt = json.dumps("Question: What is 2+3?\nAnswer:")
        return _USE.format(trust=trust, prompt=prompt, batch=f'batch = tokenizer({prompt}, return_tensors="pt")')
    system = [{"role": "system", "content": config.data.system_prompt}] if config.data.system_prompt else []
    messages = json.dumps([*system, {"role": "user", "content": "What is 2+3?"}], ensure_ascii=False)
    arguments = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
    batch = f"messages = {messages}\nbatch = tokenizer.apply_chat_template(messages, {arguments})"
    return _USE.format(trust=trust, prompt=json.dumps("What is 2+3?"), batch=batch)


def _teachers(context: TrainingContext) -> str:
    sources = context.connected
    if context.config.self_teacher:
        return "The student itself: its latents learned from its own keys and values of the reasoning as text."
    if not sources:
        return "None: this run trained on text alone."
    weights = {teacher.name: teacher.weight for teacher in context.config.teachers}
    rows = [
        (name, _public(source.info.model), f"{weights[name]:g}", f"`{source.info.weights_digest}`", source.info.dtype)
        for name, source in sources.items()
    ]
    return _table(("name", "model", "weight", "digest of its weights", "data type"), rows)


def _data(context: TrainingContext) -> str:
    data = context.config.data
    rows: list[Sequence[Any]] = []
    for split, path, records in (("training", data.train, context.train), ("validation", data.val, context.val)):
        counts = Counter(record.dataset or "" for record in records)
        rows += [(split, path.name if path else "", name, count) for name, count in sorted(counts.items())]
    return _table(("split", "file", "dataset", "samples"), rows)


def _settings(config: TrainConfig) -> str:
    tree = config.model_dump(mode="json", include=_SETTINGS)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _command() -> str:
    """The command line of this process. Every rank of a launch has the same one."""
    program = Path(sys.argv[0])
    name = "kvdistill" if program.stem == "__main__" else program.name
    return shlex.join([name, *sys.argv[1:]])


def _is_latent(config: TrainConfig) -> bool:
    return config.student.mode == "latent"


def _public(model: str) -> str:
    """A hub id as it is; of a directory the last part, because its path concerns this machine only."""
    return Path(model).name if Path(model).is_absolute() or model.startswith(".") else model


def _table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
