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


def requirements(directory: Path, image: str, variant: str) -> list[str]:
    """The requirements of one image, read from the pyproject.toml and constraints.txt of a directory.

    Raises:
        KeyError: the constraints do not pin torch, or the project has no such extra.
    """
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (directory / "constraints.txt").read_text("utf-8"), re.MULTILINE))
    if image == "torch":
        return [f"torch=={pins['torch']}", *BUILD_TOOLS]
    project = tomllib.loads((directory / "pyproject.toml").read_text("utf-8"))["project"]
    extras = ["otel", *(["train"] if image == "trainer" else []), *(["gpu"] if variant == "cuda" else [])]
    return project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]


if __name__ == "__main__":
    print("\n".join(requirements(Path(), *sys.argv[1:])))
