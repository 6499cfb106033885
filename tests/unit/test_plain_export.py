"""`kvdistill export --plain` writes the backbone of a latent student, and nothing over what exists."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvcore.errors import FieldError
from kvdistill import cli, load_student
from kvdistill.plain_export import export_plain
from student_trainer.model.latent import new_reasoning, save_reasoning
from student_trainer.model.pretrained import load_pretrained
from tests.support.tiny_models import build_model, save_tiny_model, tiny_spec

SPEC = tiny_spec("qwen2", layers=2, seed=3)
PROMPT = "Question: What is 2+3?\nAnswer:"


@pytest.fixture
def latent(tmp_path: Path) -> Path:
    directory = save_tiny_model(tmp_path / "student", SPEC)
    lm, _ = load_pretrained(str(directory), "auto", "path")
    reasoning = new_reasoning(lm, 3, 2, seed=5)
    save_reasoning(reasoning, reasoning.state_dict(), directory)
    return directory


def test_the_backbone_is_written_as_a_plain_model(latent: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain"
    said = export_plain(str(latent), out)
    assert said.startswith(f"{out}: the backbone of {latent}")
    assert "lacks the 3 latents" in said
    loaded = AutoModelForCausalLM.from_pretrained(out)
    expected = build_model(SPEC).state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in loaded.state_dict().items())
    assert not list(out.glob("*latent*")) + list(out.glob("*.py"))
    ids = AutoTokenizer.from_pretrained(out)(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        whole = loaded.generate(ids, max_new_tokens=6)  # pyright: ignore[reportAttributeAccessIssue]
    plain = load_student(out, device="cpu")
    assert plain.latents == 0
    (text,) = plain.generate(PROMPT, 6)
    assert text == plain.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    assert text != load_student(latent, device="cpu").generate(PROMPT, 6)[0]


def test_nothing_is_written_over_what_exists(latent: Path, tmp_path: Path) -> None:
    with pytest.raises(FieldError, match=rf"^OUT: {tmp_path} exists; give a directory that does not exist yet"):
        export_plain(str(latent), tmp_path)


def test_a_plain_model_is_refused(tmp_path: Path) -> None:
    plain = save_tiny_model(tmp_path / "student", SPEC)
    with pytest.raises(FieldError, match=r"^MODEL: .* has no latents: it is a plain model already"):
        export_plain(str(plain), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_asks_for_plain_and_says_what_is_lost(
    latent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["kvdistill", "export", str(latent), str(tmp_path / "out")]
    for extra, status in (([], 2), (["--plain"], 0), (["--plain"], 2)):
        monkeypatch.setattr("sys.argv", [*arguments, *extra])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == status
    printed = capsys.readouterr()
    assert "answers without thinking" in printed.out
    first, second = (line for line in printed.err.splitlines() if "kvdistill: " in line)
    assert "--plain: is missing. transformers can load MODEL itself" in first
    assert "OUT: " in second
