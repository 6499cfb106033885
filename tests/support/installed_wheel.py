"""The wheel, built from the files that git knows, and installed into environments outside the checkout.

An environment holds what pip would install there: the wheel, and links to the packages of the environment that runs the
tests, exactly those that the wheel's metadata ask for. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
# What would lead an environment back to the checkout, or change which folders Python searches.
NOT_PASSED_ON = ("PYTHONPATH", "PYTHONSAFEPATH", "VIRTUAL_ENV")


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the wheel in it, and the directory that its commands run in."""

    directory: Path
    work: Path

    @property
    def site_packages(self) -> Path:
        return next(self.directory.glob("lib/python3*/site-packages"))

    def command(self, name: str, *arguments: object) -> list[str]:
        """One of the environment's programs with its arguments."""
        return [str(self.directory / "bin" / name), *map(str, arguments)]

    def variables(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}

    def run(self, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Runs one of the environment's programs to its end."""
        command = self.command(name, *arguments)
        return subprocess.run(
            command, cwd=self.work, env=self.variables(), capture_output=True, text=True, check=False, timeout=300
        )

    def start(self, log: Path, name: str, *arguments: object) -> subprocess.Popen[bytes]:
        """Starts one of the environment's programs; all it prints goes to `log`."""
        with log.open("wb") as out:
            command = self.command(name, *arguments)
            return subprocess.Popen(command, cwd=self.work, env=self.variables(), stdout=out, stderr=out)


def source_files() -> list[str]:
    """Every file of the checkout that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (REPOSITORY / name).is_file()]


def build_wheel(directory: Path) -> Path:
    """Builds the wheel from a copy of the source files, so that nothing else can get into it; returns its path."""
    source = directory / "source"
    for name in source_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(directory)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = directory.glob("kvdistill-*.whl")
    return wheel


def install(wheel: Path, directory: Path, work: Path, extras: Iterable[str] = ()) -> Environment:
    """A new environment in `directory` with the wheel and what it needs, as `pip install 'kvdistill[extras]'` gives."""
    venv.create(directory, with_pip=False, symlinks=True)
    environment = Environment(directory, work)
    python = str(directory / "bin" / "python")
    options = ["--no-deps", "--no-index", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *options, str(wheel)], check=True)
    site = environment.site_packages
    (own,) = importlib.metadata.distributions(name="kvdistill", path=[str(site)])
    for distribution in _closure(own.requires or [], set(extras)):
        _link(distribution, site)
    return environment


def _closure(lines: Iterable[str], extras: set[str]) -> Iterator[importlib.metadata.Distribution]:
    """Every distribution that the requirements lead to."""
    waiting = [*_applying(lines, extras)]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key in seen:
            continue
        seen.add(key)
        distribution = importlib.metadata.distribution(requirement.name)
        waiting += _applying(distribution.requires or [], requirement.extras)
        yield distribution


def _applying(lines: Iterable[str], extras: set[str]) -> list[Requirement]:
    """The requirements that hold here, with these extras."""
    requirements = map(Requirement, lines)
    return [
        each
        for each in requirements
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    ]


def _link(distribution: importlib.metadata.Distribution, site: Path) -> None:
    """Links what a distribution has in its site-packages, its metadata too."""
    for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
        if not (site / top).exists():
            (site / top).symlink_to(Path(str(distribution.locate_file(top))))
