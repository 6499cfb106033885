"""The end of the demo: a student answers test items after latents and with written reasoning."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from data.records import Record
from experiments.demo.questions import WRITTEN, Inference, ask, measure_inference
from kvdistill import Student, load_student
from student_trainer.model.latent import new_reasoning, save_reasoning
from student_trainer.model.pretrained import load_pretrained
from student_trainer.model.prompt_format import PLAIN
from tests.support.tiny_models import save_tiny_model, tiny_spec

PASSES, REASONING_TOKENS = 2, 4
PROMPTS = ("3 +4 =", "5 x2 =", "1 -6 =", "2 +2 =")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model(tmp_path_factory.mktemp("latent"), tiny_spec("llama", layers=2, seed=4))
    lm, _ = load_pretrained(str(directory), "auto", "path")
    reasoning = new_reasoning(lm, 3, PASSES, seed=5)
    save_reasoning(reasoning, reasoning.state_dict(), directory)
    return directory


def writer(model: Path) -> Student:
    student = load_student(model, device="cpu")
    return Student(student.lm, student.tokenizer, None, PLAIN)


@pytest.fixture(scope="module")
def inference(model: Path) -> Inference:
    """The reference answers are those after one pass for the first record, and those with written reasoning."""
    answers = load_student(model, device="cpu").generate(PROMPTS[:1], 2, passes=1)
    answers += writer(model).generate(PROMPTS[1:], REASONING_TOKENS + 2)
    pairs = zip(PROMPTS, answers, strict=True)
    records = [Record(str(number), prompt, " r", answer) for number, (prompt, answer) in enumerate(pairs)]
    return measure_inference(model, records, REASONING_TOKENS)


def test_forward_passes_are_those_of_the_answers(inference: Inference, model: Path) -> None:
    """None of these answers ends early, so each takes a pass for each token."""
    latent = load_student(model, device="cpu").answer(PROMPTS[:3], 2)
    written = writer(model).answer(PROMPTS[:3], REASONING_TOKENS + 2)
    assert [one.question for one in inference.asked] == list(PROMPTS[:3])
    assert [one.latent for one in inference.asked] == [answer.text for answer in latent]
    assert [one.written for one in inference.asked] == [answer.text for answer in written]
    assert {one.latent_passes for one in inference.asked} == {1 + PASSES + 2}
    assert {one.written_passes for one in inference.asked} == {REASONING_TOKENS + 2}


def test_accuracy_is_measured_for_each_number_of_passes_and_for_written_reasoning(inference: Inference) -> None:
    accuracy = inference.as_json()["accuracy"]
    assert list(accuracy) == ["1 latent pass", "2 latent passes", WRITTEN]
    assert accuracy["1 latent pass"] == 0.25
    assert accuracy[WRITTEN] >= 0.75
    assert all(way.milliseconds > 0 for way in inference.ways)


def test_the_demo_ends_with_the_command_and_its_answers(
    inference: Inference, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(inference)
    shown = capsys.readouterr()
    command = re.search(r"^\$ (.*)$", shown.out, re.MULTILINE)
    assert command is not None
    assert shlex.split(command[1]) == ["kvdistill", "generate", str(inference.model), *PROMPTS[:3]]
    for prompt in PROMPTS[:3]:
        (answer,) = load_student(inference.model, device="cpu").generate(prompt)
        assert f"{prompt}\n{answer}\n" in shown.out
    assert "took 5 forward passes per question" in shown.out
    assert "and 6 when the same weights wrote the reasoning first" in shown.out
    assert shown.err.count("1 over the prompt, 2 over 3 latents") == 3
