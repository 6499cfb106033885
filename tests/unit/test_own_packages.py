"""A user's folder or module that hides one of kvdistill's packages is named before anything is imported from it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvdistill.own_packages import ROOT


def version(directory: Path, launcher: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m kvdistill --version` in a directory, with kvdistill on PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *launcher, "-m", "kvdistill", "--version"]
    return subprocess.run(
        command, cwd=directory, env=environment | variables, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", ["data/__init__.py", "kvcore/__init__.py", "align.py"])
def test_what_hides_a_package_is_named_with_its_path(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    ended = version(tmp_path)
    hiding = tmp_path / name.removesuffix("/__init__.py")
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"kvdistill: {hiding} hides the package '{hiding.stem}' of kvdistill in {ROOT}")
    assert "next: rename it, run from another directory" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_hiding_folder_on_pythonpath_is_named(tmp_path: Path) -> None:
    (tmp_path / "fuse").mkdir()
    (tmp_path / "fuse" / "__init__.py").touch()
    ended = version(Path("/"), PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT))))
    assert ended.returncode == 2
    assert str(tmp_path / "fuse") in ended.stderr


def test_torchrun_ranks_name_it_too(tmp_path: Path) -> None:
    (tmp_path / "data.py").touch()
    ended = version(tmp_path, ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"))
    assert ended.returncode != 0
    assert f"kvdistill: {tmp_path / 'data.py'} hides the package 'data'" in ended.stderr


def test_a_folder_without_python_files_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert version(tmp_path).returncode == 0


def test_the_next_step_that_the_message_names_works(tmp_path: Path) -> None:
    (tmp_path / "data.py").touch()
    assert version(tmp_path, PYTHONSAFEPATH="1").returncode == 0
