"""`kvdistill push` against a small HTTP server with the hub's endpoints for uploads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from student_trainer.model.latent import new_reasoning, save_reasoning
from student_trainer.model.pretrained import load_pretrained
from tests.support.local_hub import Hub, local_hub
from tests.support.tiny_models import save_tiny_model, tiny_spec

CARD = "---\nlicense: other\ntags:\n- kvdistill\n---\n\n# s\n\n## Results\n\nnone yet\n\n## Teachers\n\nada\n"
SCORES = {"gsm8k": {"metric": "exact_match", "score": 10.0, "num_examples": 10}, "average": 10.0}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with local_hub() as found:
        yield found


@pytest.fixture
def student(tmp_path: Path) -> Path:
    directory = save_tiny_model(tmp_path / "run" / "best_model", tiny_spec("llama", layers=1))
    lm, _ = load_pretrained(str(directory), "auto", "path")
    reasoning = new_reasoning(lm, 3, 2, seed=5)
    save_reasoning(reasoning, reasoning.state_dict(), directory)
    (directory / "README.md").write_text(CARD, encoding="utf-8")
    return directory


def push(hub: Hub, home: Path, *arguments: object, token: str | None = "hf_secret") -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "kvdistill", "push", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def files_of(student: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in student.iterdir()}


def test_a_student_is_uploaded_with_the_newest_scores_in_its_card(hub: Hub, student: Path, tmp_path: Path) -> None:
    (student.parent / "eval_results.json").write_text(json.dumps(SCORES), encoding="utf-8")
    done = push(hub, tmp_path, student, "someone/student", "--private", "--revision", "v1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"uploaded to {hub.address}/someone/student/tree/v1"
    (created,) = hub.created
    assert (created["name"], created["organization"], created["visibility"]) == ("student", "someone", "private")
    assert hub.branches == ["v1"]
    assert hub.tokens == {"Bearer hf_secret"}
    assert hub.commits == {"v1": files_of(student)}
    assert b"| gsm8k | test | 10 | exact_match | 10.0 | 1.8 to 40.4 |" in hub.commits["v1"]["README.md"]
    assert b"none yet" not in hub.commits["v1"]["README.md"]
    assert "hf_secret" not in done.stdout + done.stderr


def test_a_dry_run_lists_the_files_and_uploads_nothing(hub: Hub, student: Path, tmp_path: Path) -> None:
    before = files_of(student)
    done = push(hub, tmp_path, student, "someone/student", "--dry-run", token=None)
    assert done.returncode == 0, done.stderr
    first, *listed = done.stdout.splitlines()
    assert first == f"would upload {len(before)} files to someone/student:"
    assert [line.partition("  ")[0] for line in listed] == sorted(before)
    assert not hub.created
    assert files_of(student) == before


def test_what_cannot_be_pushed_is_refused_with_the_next_step(hub: Hub, student: Path, tmp_path: Path) -> None:
    plain = save_tiny_model(tmp_path / "plain", tiny_spec("llama", layers=1))
    for directory, repo, token, problem in (
        (student, "someone/student", None, "HF_TOKEN: is not set, and there is no login to the hub; next: create a"),
        (plain, "someone/student", "hf_secret", "MODEL_DIR: '{}' is not a student: it has no README.md with the tag"),
        (tmp_path / "no", "someone/student", "hf_secret", "MODEL_DIR: there is no directory '{}'; give the best_model"),
        (student, "a/b/c", "hf_secret", "REPO_ID: 'a/b/c' is not a hub id"),
    ):
        done = push(hub, tmp_path, directory, repo, token=token)
        assert done.returncode == 2, done.stderr
        assert problem.format(directory) in done.stderr
        assert "Traceback" not in done.stderr
    assert not hub.created
