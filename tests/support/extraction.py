"""A small dataset in both styles, tiny models, and commands that extract its K/V."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from data.synthetic import ChainTask, make_splits
from tests.support.tiny_models import save_tiny_model, tiny_spec

QUESTIONS = 20


@dataclass(frozen=True)
class ExtractionWorld:
    """A student, two teachers of other families, and 40 samples, on disk."""

    student: Path
    teachers: dict[str, Path]
    dataset: Path
    rows: list[dict[str, str]]

    def flags(self, output: Path, **changes: Any) -> list[str]:
        """The flags of a run. A change to None omits a flag; a list gives it several values."""
        settings: dict[str, Any] = {
            "teacher_models": [str(path) for path in self.teachers.values()],
            "student_model": self.student,
            "dataset_path": self.dataset,
            "output_dir": output,
            "device": "cpu",
            **changes,
        }
        flags: list[str] = []
        for name, value in settings.items():
            if value is not None:
                flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return flags

    def command(self, output: Path, **changes: Any) -> list[str]:
        """The command line of the script with these flags."""
        return [sys.executable, "scripts/extract_dual_style_kv.py", *self.flags(output, **changes)]


def make_world(directory: Path, questions: int = QUESTIONS) -> ExtractionWorld:
    """Two samples per question, as in the prepared datasets."""
    rows = [
        {
            "id": f"{record.id}:{style}",
            "prompt": record.prompt,
            "reasoning": record.reasoning if style == "cot" else "",
            "answer": record.answer,
            "style": style,
            "task_type": "arithmetic",
            "dataset": "chain",
            "language": "en",
        }
        for record in make_splits(ChainTask(), questions, 1, 1, seed=0).train
        for style in ("cot", "direct")
    ]
    Dataset.from_list(rows).save_to_disk(str(directory / "train"))
    teachers = {
        "ada": save_tiny_model(directory / "ada", tiny_spec("qwen2", seed=1)),
        "ben": save_tiny_model(directory / "ben", tiny_spec("llama", layers=4, kv_heads=4, head_dim=8, seed=2)),
    }
    student = save_tiny_model(directory / "student", tiny_spec("qwen3", layers=2, kv_heads=1, seed=3))
    return ExtractionWorld(student, teachers, directory / "train", rows)


def assert_same_kv(one: Path, other: Path) -> None:
    """Compare two files exactly, except K/V, whose last bits depend on the other samples in the batch."""
    left, right = load_pt(one), load_pt(other)
    assert [entry["example_id"] for entry in left] == [entry["example_id"] for entry in right]
    for ours, theirs in zip(left, right, strict=True):
        for mine, its in zip(ours["teacher_kvs"], theirs["teacher_kvs"], strict=True):
            assert (mine["teacher"], mine["seq_len"]) == (its["teacher"], its["seq_len"])
            assert torch.equal(mine["positions"], its["positions"])
            for name in ("keys", "values"):
                torch.testing.assert_close(mine[name], its[name], atol=0.02, rtol=0.02)


def load_pt(path: Path) -> list[dict[str, Any]]:
    """Load a .pt file as users load it."""
    return torch.load(path, weights_only=True)  # noqa: TID251 - what users read it with
