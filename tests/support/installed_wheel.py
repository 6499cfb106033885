"""The wheel, built from the files that git tracks, and installed into environments outside the checkout.

An environment has what pip would install: the wheel, and links to exactly those packages of the tests' environment that
the wheel's metadata require. Nothing is downloaded.
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
# These would make an environment import from the checkout, or change the search path of Python.
NOT_PASSED_ON = ("PYTHONPATH", "PYTHONSAFEPATH", "VIRTUAL_ENV")


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the wheel, and the working directory of its commands."""

    directory: Path
    work: Path

    @property
    def site_packages(self) -> Path:
        return next(self.directory.glob("lib/python3*/site-packages"))

    def command(self, name: str, *arguments: object) -> list[str]:
        """The command line of a program of the environment."""
        return [str(self.directory / "bin" / name), *map(str, arguments)]

    def variables(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}

    def run(self, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment until it ends."""
        command = self.command(name, *arguments)
        return subprocess.run(
            command, cwd=self.work, env=self.variables(), capture_output=True, text=True, check=False, timeout=300
        )

    def start(self, log: Path, name: str, *arguments: object) -> subprocess.Popen[bytes]:
        """Start a program of the environment with its output in `log`."""
        with log.open("wb") as out:
            command = self.command(name, *arguments)
            return subprocess.Popen(command, cwd=self.work, env=self.variables(), stdout=out, stderr=out)


def source_files() -> list[str]:
    """Every file of the checkout that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (REPOSITORY / name).is_file()]


def build_wheel(directory: Path) -> Path:
    """Build the wheel from a copy of the source files, so that it contains nothing else, and return its path."""
    source = directory / "source"
    for name in source_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(directory)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = directory.glob("kvdistill-*.whl")
    return wheel


def install(wheel: Path, directory: Path, work: Path, extras: Iterable[str] = ()) -> Environment:
    """Make an environment in `directory` with the wheel and its requirements, as `pip install 'kvdistill[extras]'`."""
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
    """Every distribution that the requirements need, directly or indirectly."""
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
    """The requirements whose markers apply here, with these extras."""
    requirements = map(Requirement, lines)
    return [
        each
        for each in requirements
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    ]


def _link(distribution: importlib.metadata.Distribution, site: Path) -> None:
    """Link the files and metadata of a distribution into `site`."""
    for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
        if not (site / top).exists():
            (site / top).symlink_to(Path(str(distribution.locate_file(top))))
