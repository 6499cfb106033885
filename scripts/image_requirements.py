"""Prints the requirements of an image, one per line: `image_requirements.py {torch,teacher,trainer} {cpu,cuda}`.

Reads pyproject.toml and constraints.txt. It runs in the image build before anything is installed, so it uses only the
standard library.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

# DeepSpeed's setup script imports these when pip builds its wheel.
BUILD_TOOLS = ("setuptools", "wheel", "packaging", "ninja", "py-cpuinfo")


def requirements(directory: Path, image: str, variant: str) -> list[str]:
    """The requirements of one image, from pyproject.toml and constraints.txt in a directory.

    Raises:
        KeyError: torch is not pinned, or the project has no such extra.
    """
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (directory / "constraints.txt").read_text("utf-8"), re.MULTILINE))
    if image == "torch":
        return [f"torch=={pins['torch']}", *BUILD_TOOLS]
    project = tomllib.loads((directory / "pyproject.toml").read_text("utf-8"))["project"]
    extras = ["otel", *(["train"] if image == "trainer" else []), *(["gpu"] if variant == "cuda" else [])]
    return project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]


if __name__ == "__main__":
    print("\n".join(requirements(Path(), *sys.argv[1:])))
