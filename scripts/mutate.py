"""Breaks the code in known ways and sees a test fail each time.

tests/mutations.toml lists the mutations, each with the test that kills it. They are made in a copy of the working tree,
one at a time. The run fails if a mutation survives or does not apply, or if a killer test fails without its mutation.
`--table` writes the list into docs/testing.md instead.

Examples:
  python scripts/mutate.py
  python scripts/mutate.py codec --jobs 2
  python scripts/mutate.py --table
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = Path("tests") / "mutations.toml"
PAGE = Path("docs") / "testing.md"
BEGIN = "<!-- Written by: python scripts/mutate.py --table -->"
END = "<!-- End of what is written. -->"


@dataclass(frozen=True, slots=True)
class Mutation:
    """`old` stands exactly once in `file`; with `new` in its place, the pytest id `test` fails. `what`: its kind."""

    file: str
    old: str
    new: str
    test: str
    what: str

    def apply(self, root: Path) -> str:
        """Mutates the file below `root`; returns its text before.

        Raises:
            ValueError: `old` is not there exactly once.
        """
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.file} holds {count} times, not once: {self.old}")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")
        return text

    def __str__(self) -> str:
        return f"{self.file}: {self.what}: {self.old} -> {self.new or '(nothing)'}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """`verdict`: killed, SURVIVED, or why nothing can be said."""

    mutation: Mutation
    verdict: str
    seconds: float

    @property
    def killed(self) -> bool:
        """Whether the test noticed."""
        return self.verdict == "killed"


def load(root: Path = ROOT) -> list[Mutation]:
    """The list, in its order."""
    tree = tomllib.loads((root / LIST).read_text(encoding="utf-8"))
    return [Mutation(**entry) for entry in tree["mutation"]]


@contextmanager
def copies(count: int) -> Iterator[list[Path]]:
    """So many copies of the working tree, but for what git ignores; removed on leaving."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    with tempfile.TemporaryDirectory(prefix="mutations-") as scratch:
        roots = [Path(scratch) / str(index) for index in range(count)]
        for root in roots:
            for name in names:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, root / name)
        yield roots


def run_tests(root: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs tests below `root` until one fails."""
    # A file that is mutated and restored within a second would be taken for its own byte code.
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    # The seed makes property tests draw the same examples each time.
    examples = ("--hypothesis-seed=0", "--hypothesis-profile=any_failure")
    command = [sys.executable, "-m", "pytest", "-x", "-q", *examples, *tests]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def run_one(root: Path, mutation: Mutation) -> Outcome:
    """Mutates, tests, restores."""
    started = time.monotonic()
    try:
        before = mutation.apply(root)
    except ValueError as error:
        return Outcome(mutation, f"DOES NOT APPLY: {error}", 0.0)
    try:
        code = run_tests(root, [mutation.test]).returncode
    finally:
        (root / mutation.file).write_text(before, encoding="utf-8")
    verdict = {0: "SURVIVED", 1: "killed"}.get(code, f"NOT RUN: pytest ended with {code}")
    return Outcome(mutation, verdict, time.monotonic() - started)


def run(roots: Sequence[Path], mutations: Sequence[Mutation]) -> Iterator[Outcome]:
    """Every mutation in one of the copies, as many at a time; outcomes in the list's order."""
    free: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for root in roots:
        free.put(root)

    def in_a_free_copy(mutation: Mutation) -> Outcome:
        root = free.get()
        try:
            return run_one(root, mutation)
        finally:
            free.put(root)

    with ThreadPoolExecutor(len(roots)) as pool:
        yield from pool.map(in_a_free_copy, mutations)


def passes_unmutated(root: Path, mutations: Sequence[Mutation]) -> bool:
    """Whether all killer tests pass as the code is; otherwise shows what pytest said."""
    started = time.monotonic()
    tests = list(dict.fromkeys(mutation.test for mutation in mutations))
    ended = run_tests(root, tests)
    seconds = time.monotonic() - started
    say(f"{'passed' if ended.returncode == 0 else 'FAILED'} {seconds:6.1f} s  unmutated: {len(tests)} killer tests")
    if ended.returncode != 0:
        say(ended.stdout + ended.stderr)
    return ended.returncode == 0


def table(mutations: Sequence[Mutation]) -> str:
    """The list as a table in Markdown, between its markers."""
    rows = ["| file | what | mutation | killed by |", "|---|---|---|---|"]
    for one in mutations:
        change = f"{_code(one.old)} → {_code(one.new) if one.new else 'nothing'}"
        rows.append(f"| `{one.file}` | {one.what} | {change} | `{one.test.removeprefix('tests/')}` |")
    return "\n".join([BEGIN, "", *rows, "", END])


def _code(text: str) -> str:
    """In one line, with what a table would take for a cell's end escaped."""
    return f"`{' '.join(text.split())}`".replace("|", "\\|")


def with_table(page: str, mutations: Sequence[Mutation]) -> str:
    """The page with the table that belongs there.

    Raises:
        ValueError: a marker is missing.
    """
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{PAGE} lacks a marker: {BEGIN} or {END}")
    return before + table(mutations) + after


def say(message: str) -> None:
    """One line, at once."""
    print(message, flush=True)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", default="", help="only mutations whose file, test or words hold this")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--table", action="store_true", help=f"write the list into {PAGE}, and run nothing")
    arguments = parser.parse_args()
    mutations = load()
    if arguments.table:
        page = (ROOT / PAGE).read_text(encoding="utf-8")
        (ROOT / PAGE).write_text(with_table(page, mutations), encoding="utf-8")
        return 0
    chosen = [one for one in mutations if arguments.pattern in f"{one.file} {one.what} {one.test}"]
    if not chosen or arguments.jobs < 1:
        parser.error("no mutation is to be run")
    return run_all(chosen, arguments.jobs)


def run_all(mutations: Sequence[Mutation], jobs: int) -> int:
    """Runs and reports; 0 if every mutation was killed."""
    started = time.monotonic()
    with copies(jobs) as roots:
        if not passes_unmutated(roots[0], mutations):
            return 1
        outcomes: list[Outcome] = []
        for outcome in run(roots, mutations):
            outcomes.append(outcome)
            say(f"{outcome.verdict} {outcome.seconds:6.1f} s  {outcome.mutation}")
    killed = sum(outcome.killed for outcome in outcomes)
    say(f"{killed} of {len(outcomes)} killed in {time.monotonic() - started:.0f} s")
    return 0 if killed == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
