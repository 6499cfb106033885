"""Tests of `kvdistill generate` and `kvdistill think` with a tiny student."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from kvdistill import load_student
from kvdistill.cli import main
from student_trainer.model.latent import new_reasoning, save_reasoning
from student_trainer.model.pretrained import load_pretrained
from tests.support.tiny_models import save_tiny_model, tiny_spec

LATENTS, PASSES = 3, 2
SHORT = ("--max-new-tokens", "5", "--device", "cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_tiny_model(tmp_path_factory.mktemp("latent"), tiny_spec("llama", layers=2, seed=4))
    lm, _ = load_pretrained(str(made), "auto", "path")
    reasoning = new_reasoning(lm, LATENTS, PASSES, seed=5)
    save_reasoning(reasoning, reasoning.state_dict(), made)
    return made


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs the command line in this process and returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["kvdistill", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_an_answer_goes_to_stdout_and_its_cost_to_stderr(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "generate", str(directory), "Question: 2+3?", *SHORT) == 0
    shown = capsys.readouterr()
    assert shown.out == load_student(directory).generate("Question: 2+3?", 5)[0] + "\n"
    cost = "[8 forward passes: 1 over the prompt, 2 over 3 latents, 5 for the answer; "
    assert shown.err.startswith(cost)
    assert "the answer was cut off; to allow a longer one, raise --max-new-tokens" in shown.err


def test_all_flags_reach_the_student(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--format", "question", "--passes", "1", "--latents", "2", "--temperature", "0.8", "--top-p", "0.9")
    assert call(monkeypatch, "generate", str(directory), *flags, "--seed", "3", "2+3?", "4+4?", *SHORT) == 0
    settings = {"format": "question", "passes": 1, "latents": 2, "temperature": 0.8, "top_p": 0.9, "seed": 3}
    one, two = load_student(directory).generate(["2+3?", "4+4?"], 5, **settings)
    shown = capsys.readouterr()
    assert shown.out == f"2+3?\n{one}\n\n4+4?\n{two}\n"
    assert shown.err.count(": 1 over the prompt, 1 over 2 latents, ") == 2


def test_each_latent_is_shown_with_its_tokens_pass_by_pass(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "think", str(directory), "Question: 2+3?", "--top", "2", "--passes", "4") == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^Pass (\d) of 4: ", shown, re.MULTILINE) == ["1", "2", "3", "4"]
    assert re.findall(r"^latent (\d)  ", shown, re.MULTILINE) == ["1", "2", "3"] * 4
    (thoughts,) = load_student(directory).think("Question: 2+3?", top=2, passes=4)
    shares = [f"{token.probability:.1%}" for latents in thoughts.tokens for tokens in latents for token in tokens]
    assert re.findall(r" (\d+\.\d%)", shown) == shares


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("generate", "MODEL", "x", "--latents", "4"), "latents: this student was trained with 3"),
        (("generate", "MODEL", "x", "--chat"), "format: the tokenizer has no chat template"),
        (("generate", "MODEL", "x", "--chat", "--format", "question"), "--chat: conflicts with --format question"),
        (
            ("think", "MODEL", "x", "--system-prompt", "y"),
            "system_prompt: needs format 'chat', but this student reads texts as 'plain'",
        ),
        (("generate", "MODEL", "x", "--top-p", "1.5"), "top_p: Input should be less than or equal to 1 (got 1.5)"),
        (("generate", "MODEL", "x", "--device", "gpu"), "device: expected auto, cpu, cuda or cuda:N"),
        (("generate", "MODEL", "x", "--max-new-tokens", "600"), "prompts.0: its "),
        (("generate", "MODEL"), "Missing argument"),
        (("generate", "nowhere/model", "x"), "path: 'nowhere/model' is not a directory"),
        (("think", "MODEL", "x", "--top", "999"), "top: expected at least 1"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: tuple[str, ...],
    problem: str,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert call(monkeypatch, *(str(directory) if word == "MODEL" else word for word in arguments)) == 2
    shown = capsys.readouterr().err.strip()
    assert shown.startswith(f"kvdistill: {problem}")
    assert "\n" not in shown
