"""The blocks of docs/python.md run in order with replicas of a tiny teacher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.records import write_records
from data.synthetic import ChainTask, make_splits
from tests.support.guide import MODELS, blocks
from tests.support.servers import REPOSITORY, running_teacher
from tests.support.tiny_models import save_tiny_model

pytestmark = pytest.mark.slow

PAGE = REPOSITORY / "docs" / "python.md"
STUDENT = "Qwen/Qwen2.5-1.5B"


@pytest.mark.timeout(400)
def test_every_block_runs(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / STUDENT, MODELS[STUDENT])
    teacher = save_tiny_model(tmp_path / "teacher", MODELS["Qwen/Qwen2.5-7B"])
    splits = make_splits(ChainTask(), 64, 8, 1, seed=0)
    write_records(tmp_path / "train.jsonl", splits.train)
    write_records(tmp_path / "val.jsonl", splits.val)
    script = "\n".join(block.text for block in blocks(PAGE) if block.language == "python")
    logs = tmp_path / "one.log", tmp_path / "two.log"
    with running_teacher(teacher, logs[0]) as one, running_teacher(teacher, logs[1]) as two:
        for written, served in (("localhost:50051", one), ("node1:50051", one), ("node2:50051", two)):
            assert f'"{written}"' in script
            script = script.replace(f'"{written}"', f'"{served.endpoint}"')
        done = subprocess.run(
            [sys.executable, "-W", "error:::kvdistill", "-c", script],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=360,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "did you mean 'uniform'" in done.stdout
    assert "kvdistill doctor --teacher" in done.stdout
