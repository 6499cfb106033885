"""Tests of the `--help` of every script for users: it shows examples, with flags that the script has."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.support.servers import REPOSITORY

# Only other programs start these.
INTERNAL = {
    "experiments/demo/arms.py",
    "experiments/recipe/job.py",
    "kvdistill/__main__.py",
    "student_trainer/launching/processes.py",
    "student_trainer/launching/slurm.py",
}
# A script without a flag parser would run when the test passes it `--help`.
READS_FLAGS = re.compile(
    r"ArgumentParser\(|typer\.Typer|recipe\.config import|evaluation\.config import|extraction\.command import"
    r"|comparisons\.base import"
)
# All scripts run in one process, so that slow imports are paid for once.
CODE = """
import contextlib, io, json, runpy, sys
sys.path.insert(0, ".")
shown = {}
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        runpy.run_module(path.removesuffix(".py").replace("/", "."), run_name="__main__")
    shown[path] = out.getvalue()
print(json.dumps(shown))
"""


def entry_points() -> list[str]:
    listed = subprocess.run(
        ["git", "grep", "--untracked", "-l", '^if __name__ == "__main__":', "--", "*.py"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [path for path in listed.stdout.split() if path not in INTERNAL and not path.startswith("tests/")]
    return [path for path in paths if READS_FLAGS.search((REPOSITORY / path).read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def shown() -> dict[str, str]:
    command = [sys.executable, "-W", "ignore", "-c", CODE, *entry_points()]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_script_shows_examples(shown: dict[str, str]) -> None:
    assert len(shown) > 8
    assert [
        path for path, text in shown.items() if not re.search(r"^ *Examples:?", text, re.IGNORECASE | re.MULTILINE)
    ] == []


def test_examples_call_the_script_itself_with_existing_flags(shown: dict[str, str]) -> None:
    for path, text in shown.items():
        before, _, after = re.sub(r"\s+", " ", text).partition("xamples")
        module = path.removesuffix(".py").replace("/", ".").removesuffix(".__main__")
        assert path in after or module in after, path
        known = set(re.findall(r"--[\w-]+", f"{before} {re.split(r'[Oo]ptions', after)[-1]}"))
        used = re.findall(r"(?<= )--[a-z][\w-]+", after)
        launchers = {"--standalone", "--nproc_per_node"}
        assert set(used) - known - launchers == set(), path
