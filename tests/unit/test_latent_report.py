"""The section of `kvdistill report` about latents: KV losses, and the tokens of tiny students' latents."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest

from data.records import Record, write_records
from kvcore.errors import ConfigError
from kvdistill import load_student
from kvdistill.report.finished_runs import find_runs
from kvdistill.report.latent_report import kv_by_latent, latent_sections
from kvdistill.report.write_report import write_report
from student_trainer.model.latent import new_reasoning, save_reasoning
from student_trainer.model.pretrained import load_pretrained
from student_trainer.model.prompt_format import PromptFormat
from tests.support.finished_runs import STEPS, write_run
from tests.support.tiny_models import save_tiny_model, tiny_spec

LATENTS, PASSES = 3, 2
RECORDS = [Record(str(number), f"What is {number} <+> 1?", f" {number} up", f" {number + 1}") for number in range(5)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a latent student. Its first latent has no target."""
    folder = write_run(tmp_path / "runs" / "latent")
    losses = {f"val/kv_loss/latent{number}": number / 8 for number in range(2, LATENTS + 1)}
    line = {"step": STEPS[1], "val/loss": 0.1, **losses}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    model = save_tiny_model(folder / "best_model", tiny_spec("llama", layers=2, seed=4))
    lm, _ = load_pretrained(str(model), "auto", "path")
    reasoning = new_reasoning(lm, LATENTS, PASSES, seed=5)
    save_reasoning(reasoning, reasoning.state_dict(), model)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    write_records(tmp_path / "val.jsonl", RECORDS)
    return tmp_path / "val.jsonl"


def cells(page: str) -> list[list[str]]:
    """The rows of all tables whose first cell is a number."""
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    return [[unescape(cell) for cell in row] for row in rows if row and row[0].isdigit()]


def test_latents_are_shown_pass_by_pass_beside_their_kv_loss(run: Path, prompts: Path, tmp_path: Path) -> None:
    page = write_report([run], tmp_path / "report", prompts)[0].read_text(encoding="utf-8")
    expected = [["2", "0.250"], ["3", "0.375"]]
    for thoughts in load_student(run / "best_model").think([record.prompt for record in RECORDS[:3]], top=1):
        for place, loss in enumerate(("-", "0.250", "0.375")):
            best = [thoughts.tokens[number][place][0] for number in range(PASSES)]
            shown = [f"{json.dumps(one.text, ensure_ascii=False)} {one.probability:.0%}" for one in best]
            expected.append([str(place + 1), loss, *shown])
    assert cells(page) == expected
    assert "What is 2 &lt;+&gt; 1? Reasoning: 2 up Answer: 3" in page
    assert "What is 3" not in page


def test_without_prompts_only_kv_losses_are_shown(run: Path) -> None:
    other = write_run(run.parent / "other")
    runs = find_runs([run, other])
    assert [kv_by_latent(one) for one in runs] == [{2: 0.25, 3: 0.375}, {}]
    assert cells("".join(latent_sections(runs, None))) == [["2", "0.250"], ["3", "0.375"]]
    assert latent_sections(runs[1:], None) == []


def test_prompts_are_written_as_in_training(run: Path, prompts: Path) -> None:
    PromptFormat("chat").save(run / "best_model")
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        latent_sections(find_runs([run]), prompts)


def test_prompts_need_a_latent_student(run: Path, prompts: Path) -> None:
    other = write_run(run.parent / "other")
    with pytest.raises(ConfigError, match="--prompts: none of the runs has a best_model with latents"):
        latent_sections(find_runs([other]), prompts)
