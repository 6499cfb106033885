"""The model card that is written beside a student."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from kvcore.models.files import CARD
from kvcore.types import TeacherInfo
from student_trainer.config import TrainConfig
from student_trainer.loop import ds_engine
from student_trainer.loop.sample_order import SampleOrder
from student_trainer.loop.student_loading import load_student, with_latents
from student_trainer.loop.training_context import TrainingContext
from student_trainer.model.distill_model import DistillModel
from student_trainer.model.export import save_model
from student_trainer.model.model_card import with_results, write_card
from tests.support.chat_templates import TINY_CHATML
from tests.support.kv_fakes import INFO, MemorySource
from tests.support.plain_engine import PlainEngine
from tests.support.tiny_models import save_tiny_model, tiny_spec
from tests.support.training_parts import RECORDS, collator, one_rank, train_config

RESULTS = {
    "val": {
        "dataset": "val",
        "metric": "accuracy",
        "split": "validation",
        "score": 50.0,
        "num_examples": 8,
        "answer_ce": 1.23456,
        "kv_loss": 0.5,
    },
    "average": 50.0,
}


class Teacher(MemorySource):
    def __init__(self, info: TeacherInfo) -> None:
        super().__init__()
        self._info = info

    @property
    def info(self) -> TeacherInfo:
        return self._info


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ds_engine, "device", lambda: torch.device("cpu"))
    with one_rank():
        yield


def context_of(path: Path, mode: str = "latent", **sections: Any) -> TrainingContext:
    student = {"path": str(path), **sections.pop("student", {})}
    config: TrainConfig = train_config(mode, teachers=("ada", "ben"), student=student, **sections)
    lm, tokenizer = load_student(config.student, config.run.seed)
    model = DistillModel(with_latents(lm, config), [], {}, config)
    order = SampleOrder(config.run, len(RECORDS), 0, 1)
    sources = {
        "ada": Teacher(replace(INFO, model="/secret/place/Big-7B")),
        "ben": Teacher(replace(INFO, model="org/Other-3B", weights_digest="c3" * 16)),
    }
    val = [replace(record, dataset="gsm8k") for record in RECORDS[:5]]
    return TrainingContext(config, tokenizer, collator(), RECORDS, val, sources, model, order, None, {}, finished=False)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "base", tiny_spec("qwen2", layers=1))


def card_of(context: TrainingContext, directory: Path, results: dict[str, Any] | None = None) -> str:
    directory.mkdir(exist_ok=True)
    write_card(context, RESULTS if results is None else results, directory)
    return (directory / CARD).read_text(encoding="utf-8")


def section(card: str, title: str) -> str:
    return card.partition(f"\n## {title}\n\n")[2].partition("\n\n## ")[0].strip()


def test_the_card_says_how_the_student_was_made(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/x/kvdistill/__main__.py", "train", "--config", "my run.yaml"])
    run = {"output_dir": str(tmp_path / "our-student"), "license": "apache-2.0"}
    card = card_of(context_of(base, run=run, loss={"kv_loss": "cosine"}), tmp_path)
    assert "\n# our-student\n" in card
    assert "reasons in 3 latents between prompt and answer, which it computes in 2 passes" in card
    teachers = section(card, "Teachers").splitlines()[2:]
    assert teachers == [
        f"| ada | Big-7B | 1 | `{'a1' * 16}` | fp32 |",
        f"| ben | org/Other-3B | 1 | `{'c3' * 16}` | fp32 |",
    ]
    assert section(card, "Results").splitlines()[2] == (
        "| val | validation | 8 | accuracy | 50.0 | 21.5 to 78.5 | 1.235 | 0.500 |"
    )
    assert section(card, "Data").splitlines()[2:] == [
        f"| training | none.jsonl |  | {len(RECORDS)} |",
        "| validation | none.jsonl | gsm8k | 5 |",
    ]
    settings = yaml.safe_load(section(card, "Settings").partition("```yaml\n")[2].partition("```")[0])
    assert settings["loss"]["kv_loss"] == "cosine"
    assert settings["kv"]["selection"]["selector"] == "right"
    assert section(card, "Command") == "```bash\nkvdistill train --config 'my run.yaml'\n```"
    for private in ("/secret", "127.0.0.1", str(tmp_path)):
        assert private not in card


def test_the_header_is_what_the_hub_reads(base: Path, tmp_path: Path) -> None:
    card_of(context_of(base, run={"license": "apache-2.0"}), tmp_path / "a")
    data = ModelCard.load(tmp_path / "a" / CARD).data.to_dict()
    assert data == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["kvdistill", "kv-distillation", "latent-reasoning"],
        "metrics": ["accuracy"],
    }
    card = card_of(context_of(base, mode="token"), tmp_path / "b")
    data = ModelCard.load(tmp_path / "b" / CARD).data.to_dict()
    assert (data["license"], data["tags"]) == ("other", ["kvdistill", "kv-distillation"])
    assert "trust_remote_code" not in card
    assert "an ordinary causal language model" in card


def test_the_base_model_is_the_hub_id_or_that_of_the_earlier_run(base: Path, tmp_path: Path) -> None:
    context = context_of(base)
    student = context.config.student
    at_hub = replace(
        context, config=context.config.model_copy(update={"student": student.model_copy(update={"path": "org/tiny"})})
    )
    card_of(at_hub, base)
    assert ModelCard.load(base / CARD).data.to_dict()["base_model"] == "org/tiny"
    card_of(context, tmp_path / "next")
    assert ModelCard.load(tmp_path / "next" / CARD).data.to_dict()["base_model"] == "org/tiny"


@pytest.mark.parametrize("mode", ["latent", "token"])
@pytest.mark.parametrize("data", [{}, {"format": "chat", "system_prompt": 'Say "go".'}], ids=["plain", "chat"])
def test_the_code_in_the_card_runs_and_both_ways_answer_alike(
    base: Path,
    tmp_path: Path,
    mode: str,
    data: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    context = context_of(base, mode, data=data)
    context.tokenizer.chat_template = TINY_CHATML
    best = tmp_path / "best"
    save_model(PlainEngine(context.model, context.config, 1), context, best, RESULTS)
    use = section((best / CARD).read_text(encoding="utf-8"), "Use").replace("REPO", str(best))
    first, second = (block.partition("```")[0] for block in use.split("```python\n")[1:])
    capsys.readouterr()
    exec(first, {})
    said = capsys.readouterr().out
    exec(second.replace("generate(", "generate(max_new_tokens=64, prompts="), {})
    assert said.strip()
    assert capsys.readouterr().out.endswith(said)


def test_scores_of_benchmarks_replace_those_of_the_validation(base: Path, tmp_path: Path) -> None:
    card = card_of(context_of(base), tmp_path)
    entry = {"metric": "exact_match", "score": 12.5, "num_examples": 40, "ci95": [5.5, 26.1]}
    changed = with_results(card, {"gsm8k_test": entry, **RESULTS})
    assert section(changed, "Results").splitlines()[2:] == [
        "| gsm8k_test | test | 40 | exact_match | 12.5 | 5.5 to 26.1 |  |  |",
        "| val | validation | 8 | accuracy | 50.0 | 21.5 to 78.5 | 1.235 | 0.500 |",
    ]
    assert with_results(changed, RESULTS) == card
    assert section(card_of(context_of(base), tmp_path, {}), "Results") == "The run had no validation data."


def test_the_best_model_has_the_card_and_only_the_code_that_is_ours(base: Path, tmp_path: Path) -> None:
    context = context_of(base)
    save_model(PlainEngine(context.model, context.config, 1), context, tmp_path / "best", RESULTS)
    files = {file.name for file in (tmp_path / "best").iterdir()}
    assert {CARD, "hub_student.py", "latent.safetensors", "backbone.safetensors"} <= files
    tree = json.loads((tmp_path / "best" / "config.json").read_text(encoding="utf-8"))
    assert (tree["latents"], tree["passes"]) == (3, 2)
