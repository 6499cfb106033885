"""Makes the virtual environment from the pinned files; does nothing where it already matches them.

Needs Python 3.11 or later with the venv module (Debian: python3-venv) and a package index. Nothing is compiled.
Runs before anything is installed, so it uses the standard library alone.

Examples:
  python3 scripts/setup_env.py
  python3 scripts/setup_env.py /scratch/kvdistill-venv
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


def environment_key(root: Path) -> str:
    """Names the environment that the pinned files ask for: equal keys need no reinstall."""
    import tomllib  # noqa: PLC0415  (Python 3.11: older ones must get as far as check_python)

    pyproject = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    packaging = [pyproject["build-system"], pyproject["project"], pyproject["tool"]["setuptools"]]
    parts = [json.dumps(packaging, sort_keys=True), (root / "constraints.txt").read_text(encoding="utf-8")]
    parts += [sys.version, sys.base_prefix, str(root)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def pinned(constraints: str, package: str) -> str:
    """The exact version that the constraints give a package."""
    found = re.search(rf"^{re.escape(package)}==(\S+)$", constraints, flags=re.MULTILINE | re.IGNORECASE)
    if found is None:
        raise SetupError(f"constraints.txt does not pin {package}")
    return found.group(1)


def install_commands(python: str, constraints: str) -> list[list[str]]:
    """The pip calls, in order: torch first and by its exact version, since a range may take another build."""
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "-c", "constraints.txt"]
    return [
        [*pip, f"torch=={pinned(constraints, 'torch')}", *BUILD_TOOLS],
        [*pip, "--no-build-isolation", "--editable", ".[dev]"],
    ]


def build(root: Path, venv: Path) -> None:
    """Makes the environment from nothing."""
    if venv.exists():
        shutil.rmtree(venv)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    # DeepSpeed compiles its operators only where it is asked to.
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    constraints = (root / "constraints.txt").read_text(encoding="utf-8")
    for command in install_commands(str(venv / "bin" / "python"), constraints):
        say(" ".join(command[2:]))
        subprocess.run(command, cwd=root, env=environment, check=True)


def ensure(root: Path, venv: Path) -> bool:
    """Builds the environment unless it is there and complete; says whether it did.

    The stamp is written last, so an interrupted build is redone from nothing.
    """
    check_python()
    stamp = venv / STAMP
    key = environment_key(root)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == key:
        return False
    started = time.monotonic()
    say(f"building {venv} (about 2 GB, some minutes)")
    build(root, venv)
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
    venv = parser.parse_args().venv
    try:
        ensure(ROOT, venv if venv.is_absolute() else ROOT / venv)
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
