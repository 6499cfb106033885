"""Tests of the check that no folder or module of the user shadows a package of kvdistill."""

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
def test_shadowing_module_is_reported_with_its_path(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    ended = version(tmp_path)
    shadowing = tmp_path / name.removesuffix("/__init__.py")
    assert ended.returncode == 2
    assert ended.stderr.startswith(
        f"kvdistill: {shadowing} hides the package '{shadowing.stem}' of kvdistill in {ROOT}"
    )
    assert "next: rename it, run from another directory" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_shadowing_folder_on_pythonpath_is_reported(tmp_path: Path) -> None:
    (tmp_path / "fuse").mkdir()
    (tmp_path / "fuse" / "__init__.py").touch()
    ended = version(Path("/"), PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT))))
    assert ended.returncode == 2
    assert str(tmp_path / "fuse") in ended.stderr


def test_torchrun_ranks_report_the_shadowing_module(tmp_path: Path) -> None:
    (tmp_path / "data.py").touch()
    ended = version(tmp_path, ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"))
    assert ended.returncode != 0
    assert f"kvdistill: {tmp_path / 'data.py'} hides the package 'data'" in ended.stderr


def test_folder_without_python_files_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert version(tmp_path).returncode == 0


def test_pythonsafepath_avoids_the_shadowing(tmp_path: Path) -> None:
    (tmp_path / "data.py").touch()
    assert version(tmp_path, PYTHONSAFEPATH="1").returncode == 0
