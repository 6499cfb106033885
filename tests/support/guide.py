"""The code blocks of the user's guide, run unchanged in a copy of the checkout, with tiny models instead of the hub's.

`Qwen/Qwen2.5-7B` is a directory in the copy, because transformers prefers a local directory of that name to the hub.
The datasets are local copies in their real schemas (`$KVDISTILL_DATA_DIR`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from kvdistill.own_packages import PACKAGES
from tests.support.benchmark_data import write_benchmarks
from tests.support.guide_data import write_guide_datasets
from tests.support.servers import REPOSITORY
from tests.support.tiny_models import TinySpec, save_tiny_model, tiny_spec

PAGE = REPOSITORY / "docs" / "guide.md"
CHINESE_PAGE = REPOSITORY / "docs" / "guide.zh.md"
STAGES = ("stage1_fixed", "stage2_similarity", "stage3_learnable")

MODELS: dict[str, TinySpec] = {
    "Qwen/Qwen2.5-1.5B": tiny_spec("qwen2", layers=2, kv_heads=1, seed=1),
    "Qwen/Qwen2.5-7B": tiny_spec("qwen2", seed=2),
    "Qwen/Qwen2.5-14B": tiny_spec("qwen2", layers=4, kv_heads=4, head_dim=8, seed=3),
    "Qwen/Qwen2.5-32B": tiny_spec("qwen2", layers=5, seed=4),
    "meta-llama/Llama-3.1-8B": tiny_spec("llama", layers=4, head_dim=12, seed=5),
}


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    text: str

    @property
    def needs_slurm(self) -> bool:
        return self.text.startswith("sbatch ")


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page, in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Block(language, text) for language, text in found]


class Checkout:
    """A copy of the checkout in which the blocks of the guide run, with models and datasets.

    Args:
        directory: where the copy is made.
        questions: the number of questions per dataset.
        models: the names in `MODELS` to save in the copy.
        environment: variables for every block, in addition to those of this process.
    """

    def __init__(
        self, directory: Path, questions: int, models: Sequence[str], environment: dict[str, str] | None = None
    ) -> None:
        self.directory = directory
        self.ran: list[Block] = []
        _copy_sources(directory)
        for name in models:
            save_tiny_model(directory / name, MODELS[name])
        copies = directory / "copies"
        write_guide_datasets(copies, questions)
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(directory),
            "HF_HOME": str(directory / "hf_home"),
            "KVDISTILL_DATA_DIR": str(copies),
            **(environment or {}),
        }

    def add_benchmarks(self) -> None:
        """Add one question of every benchmark and subject to the datasets."""
        write_benchmarks(self.directory / "copies", 1)

    def block(self, piece: str) -> Block:
        """The only block that contains `piece`."""
        (found,) = [block for block in blocks(PAGE) if piece in block.text]
        self.ran.append(found)
        return found

    def command(self, block: Block) -> list[str]:
        """The command that runs a block."""
        if block.language == "python":
            return [sys.executable, "-c", block.text]
        assert block.language == "bash"
        return ["bash", "-euo", "pipefail", "-c", block.text]

    def attempt(self, block: Block, seconds: float = 600) -> subprocess.CompletedProcess[str]:
        """Run a block; `stdout` has both output streams."""
        return subprocess.run(
            self.command(block),
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )

    def run(self, block: Block) -> str:
        """Run a block that has to succeed, and return its output."""
        done = self.attempt(block)
        assert done.returncode == 0, done.stdout[-8000:]
        return done.stdout


def shorten(saved: Path, rows: int) -> None:
    """Shorten a saved dataset to its first rows."""
    whole = Dataset.load_from_disk(str(saved), keep_in_memory=True)
    shutil.rmtree(saved)
    whole.select(range(rows)).save_to_disk(str(saved))


def _copy_sources(directory: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "prepared")
    for name in sorted({*PACKAGES, "kvdistill", "configs", "scripts"}):
        shutil.copytree(REPOSITORY / name, directory / name, ignore=ignored)
    # `make setup` creates it here, and jobs expect it here.
    (directory / ".venv").symlink_to(sys.prefix)
