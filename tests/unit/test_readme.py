"""Tests of README.md: valid commands, figures that match the code, and a limited length."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from align.layer_map import LayerMapper
from kvcore.config import apply_override, load_config, parse
from kvcore.plan import CodecSpec
from kvcore.tensors.codec import layer_bytes
from kvdistill.cli import app
from kvdistill.describe import raw_token_bytes
from student_trainer.config import TrainConfig
from tests.support.guide import blocks
from tests.support.servers import REPOSITORY

PAGE = REPOSITORY / "README.md"
TEXT = PAGE.read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]


def command_lines() -> list[str]:
    """Command lines of the bash blocks, and inline code that starts with the name of a program."""
    lines = [
        line
        for block in blocks(PAGE)
        if block.language == "bash"
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    marked = re.findall(r"`((?:make|kvdistill|sbatch|kubectl|docker|pip|tensorboard) [^`]+)`", prose)
    return [*lines, *marked]


LINES = sorted(set(command_lines()))


@pytest.mark.parametrize("line", [line for line in LINES if "kvdistill " in line])
def test_kvdistill_commands_parse(line: str) -> None:
    name, *arguments = shlex.split(line.partition("kvdistill ")[2])
    if name.startswith("-"):
        assert name in ("--install-completion", "--version")
        return
    context = COMMANDS[name].make_context(name, arguments)
    given = context.params
    if name in ("train", "plan"):
        path = str(given["config"])
        tree = run() if path == "run.yaml" else yaml.safe_load((REPOSITORY / path).read_text(encoding="utf-8"))
        for override in given["overrides"] or []:
            apply_override(tree, override)
        config = parse(tree, TrainConfig)
        named = {item.partition("=")[0] for item in given.get("teacher_model") or []}
        assert named <= {teacher.name for teacher in config.teachers}


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("make ")])
def test_make_targets_exist(line: str) -> None:
    target = shlex.split(line)[1]
    assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_readme_is_short_and_ends_with_six_links() -> None:
    assert len(TEXT.splitlines()) <= 150
    end = TEXT.partition("\n## Read on\n")[2]
    assert len(re.findall(r"^- \[", end, re.MULTILINE)) == 6


def test_environment_is_activated_before_the_first_command_that_needs_it() -> None:
    commands = [line for block in blocks(PAGE) if block.language == "bash" for line in block.text.splitlines()]
    activated = next(n for n, line in enumerate(commands) if line.startswith("source .venv/bin/activate"))
    needs_it = [n for n, line in enumerate(commands) if re.match(r"(kvdistill|torchrun) ", line)]
    assert len(needs_it) > 5
    assert activated < min(needs_it)


def test_vllm_version_matches_the_pin() -> None:
    pinned = re.search(r'"vllm==(\d+\.\d+)', (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert pinned is not None
    assert f"vLLM {pinned[1]} " in TEXT


def test_demo_picture_is_the_only_picture() -> None:
    assert re.findall(r"!\[[^]]*\]\(([^)]+)\)|<img", TEXT) == ["docs/demo.png"]


def test_files_in_commands_exist() -> None:
    named = [word for line in LINES for word in shlex.split(line) if re.match(r"(configs|deploy|scripts)/", word)]
    assert len(named) > 3
    assert [path for path in named if not (REPOSITORY / path).exists()] == []


def run() -> dict[str, object]:
    """The run.yaml in the README."""
    (block,) = [block for block in blocks(PAGE) if block.language == "yaml"]
    return yaml.safe_load(block.text)


def test_run_yaml_is_a_valid_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run()), encoding="utf-8")
    config = load_config(path, [], TrainConfig)
    assert [teacher.name for teacher in config.teachers] == ["qwen14b", "llama8b"]


def test_figures_for_a_70b_teacher_follow_from_its_geometry() -> None:
    token, text_tokens = raw_token_bytes(80, 8, 128), 300
    layers = len(LayerMapper(80, 28).layers_needed)
    sample = layers * layer_bytes(CodecSpec(), 8, 24, 128) + 24 * 4
    for figure in (
        f"A student of 28 layers needs only {layers} of the teacher's layers",
        f"{token:,} bytes per token",
        f"{token * text_tokens / 1e6:.0f} MB for a text of {text_tokens} tokens",
        f"{sample / 1e6:.2f} MB",
        f"{int(token * text_tokens / sample)} times",
        f"{sample * 64 * 8 / 1e9:.2f} Gbit/s",
    ):
        assert figure in TEXT.replace("\n", " "), figure
