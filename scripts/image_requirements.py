"""Prints what an image installs, one requirement a line: `image_requirements.py {torch,teacher,trainer} {cpu,cuda}`.

pyproject.toml says what the project needs, constraints.txt which versions; this says who needs what. Runs in
the image's build before anything is installed, so it uses the standard library alone.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

# DeepSpeed's setup script imports these while pip builds its wheel.
BUILD_TOOLS = ("setuptools", "wheel", "packaging", "ninja", "py-cpuinfo")
# A teacher serves a model and no more: no DeepSpeed, no datasets, no evaluation.
TEACHER_NEEDS_NOT = frozenset({"datasets", "deepspeed", "lm-eval", "matplotlib", "tensorboard"})


def requirements(directory: Path, image: str, variant: str) -> list[str]:
    """The requirements of one image, read from the pyproject.toml and constraints.txt of a directory.

    Raises:
        KeyError: the constraints do not pin torch, or the project has no such extra.
    """
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (directory / "constraints.txt").read_text("utf-8"), re.MULTILINE))
    if image == "torch":
        return [f"torch=={pins['torch']}", *BUILD_TOOLS]
    project = tomllib.loads((directory / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = project["dependencies"] + extras["otel"]
    if variant == "cuda":
        needed += extras["gpu"]
    unneeded = TEACHER_NEEDS_NOT if image == "teacher" else frozenset[str]()
    return [line for line in needed if name_of(line) not in unneeded]


def name_of(requirement: str) -> str:
    """The package that a requirement names."""
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None, requirement
    return found.group()


if __name__ == "__main__":
    print("\n".join(requirements(Path(), *sys.argv[1:])))
