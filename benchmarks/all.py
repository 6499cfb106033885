"""Runs all benchmarks that need no GPU, collects their results in one file, and writes their tables into a page.

`make bench` runs it. On two cores where nothing else runs it takes at most 20 minutes. The result of each benchmark is
kept in OUTPUT/results.json as soon as it has ended, its messages in OUTPUT/NAME.log. If one fails, the others still
run, and the page is left as it was; with --resume, benchmarks whose results are in the file are not run again. Two
benchmarks read what `make real` makes, and are left out without it.

Examples:
  python -m benchmarks.all
  python -m benchmarks.all --resume
  python -m benchmarks.all --only transport serve
  python -m benchmarks.all --quick --output /tmp/bench      # the smallest sizes, to check the scripts; writes no page
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from benchmarks import tables
from kvcore.errors import FieldError, KVDistillError
from student_trainer.launching.processes import killed_with_parent, tail

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
REAL = ROOT / "outputs" / "real"
MOST_SECONDS = 900.0

Result = dict[str, Any]


class BenchmarkFailedError(KVDistillError):
    """A benchmark failed."""

    next_step = "read the log, then run the same command with --resume: what has succeeded is kept"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark of this folder.

    `arguments`: so that all benchmarks together take at most 20 minutes. `quick`: the smallest useful sizes. `needs`:
    files without which it is left out. `one_thread`: of OpenMP, as the servers that it is compared with have.
    """

    name: str
    title: str
    tables: Callable[[Result], str]
    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    needs: tuple[Path, ...] = ()
    one_thread: bool = False

    def given(self, quick: bool) -> tuple[str, ...]:
        """Its arguments."""
        return self.quick if quick else self.arguments

    @property
    def environment(self) -> dict[str, str]:
        """Its variables beside those of this process."""
        return {"OMP_NUM_THREADS": "1"} if self.one_thread else {}

    def missing(self) -> list[Path]:
        """The files that it needs and that are not there."""
        return [path for path in self.needs if not path.exists()]

    def shown(self, result: Result) -> str:
        """The tables of a result.

        Raises:
            FieldError: another version of the benchmark printed the result, and it lacks a figure of the tables.
        """
        try:
            return self.tables(result)
        except KeyError as error:
            problem = f"the result of '{self.name}' is of another version: it has no {error}; run this with --resume"
            raise FieldError("output", problem) from error

    def is_kept(self, results: Results, arguments: Sequence[str]) -> bool:
        """Whether there is a result with these arguments that the tables can show."""
        kept = results.found.get(self.name, {})
        if kept.get("arguments") != list(arguments):
            return False
        try:
            self.shown(kept["result"])
        except FieldError:
            return False
        return True


_TEACHER, _STUDENT = REAL / "models" / "teacher", REAL / "models" / "student"
_TRAIN, _VAL = (REAL / "full" / "data" / f"{split}.jsonl" for split in ("train", "val"))
_CODEC = ("--model", str(_TEACHER), "--data", str(_VAL), "--calibration-data", str(_TRAIN))

BENCHMARKS = (
    Benchmark(
        "serve",
        "Serving",
        tables.serve,
        ("--rounds", "3"),
        ("--rounds", "1", "--requests", "2", "--samples", "4"),
        one_thread=True,
    ),
    Benchmark("transport", "Transports", tables.transport, (), ("--rounds", "1", "--megabytes", "16")),
    Benchmark("scale", "Replicas, ranks and teachers", tables.scale, (), ("--quick",)),
    Benchmark(
        "result_cache",
        "A second epoch from the server's cache",
        tables.result_cache,
        ("--rounds", "3"),
        ("--rounds", "1", "--requests", "2"),
    ),
    Benchmark(
        "codec",
        "Codecs",
        tables.codec,
        _CODEC,
        (*_CODEC, "--texts", "2", "--calibration", "8", "--rounds", "1"),
        needs=(_TEACHER, _TRAIN, _VAL),
    ),
    Benchmark("train_step", "A training step (smaller models)", tables.train_step, ("--quick",), ("--quick",)),
    Benchmark(
        "latent_step",
        "A latent step",
        tables.latent_step,
        ("--rounds", "3"),
        ("--rounds", "1", "--layers", "2", "--vocabulary", "512", "--batch", "1"),
    ),
    Benchmark(
        "cross_entropy",
        "Cross-entropy",
        tables.cross_entropy,
        ("--rounds", "2"),
        ("--rounds", "1", "--vocabulary", "1024", "--batch", "1"),
    ),
    Benchmark(
        "student",
        "Latents against written reasoning",
        tables.student,
        ("--batch", "1", "--passes", "1", "3", "--rounds", "1"),
        ("--quick", "--batch", "1", "--passes", "1", "--rounds", "1"),
    ),
    Benchmark(
        "padding",
        "Padding in micro-batches",
        tables.padding,
        ("--data", str(_TRAIN), "--tokenizer", str(_STUDENT)),
        ("--data", str(_TRAIN), "--tokenizer", str(_STUDENT)),
        needs=(_TRAIN, _STUDENT),
    ),
)


@dataclass(slots=True)
class Results:
    """The results so far, in one file: by benchmark, what it printed, its arguments, its time and its machine."""

    path: Path
    found: dict[str, Result]

    @classmethod
    def read(cls, path: Path) -> Results:
        """Reads the file; there are no results if there is none.

        Raises:
            FieldError: the file holds something else.
        """
        if not path.is_file():
            return cls(path, {})
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FieldError("output", f"{path} is not JSON: {error}; remove it, or give another folder") from error
        if not isinstance(content, dict):
            raise FieldError("output", f"{path} holds no JSON object; remove it, or give another folder")
        return cls(path, cast("dict[str, Result]", content))

    def add(self, name: str, result: Result) -> None:
        """Keeps a result, on disk too. An interruption leaves the results from before."""
        self.found[name] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.with_suffix(".new")
        written.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        written.replace(self.path)


def run_one(benchmark: Benchmark, arguments: Sequence[str], log: Path) -> Result:
    """Runs one benchmark in a process of its own; returns what it printed, and how it was run.

    Raises:
        BenchmarkFailedError: it failed, took too long, or its last line is no JSON object.
    """
    command = killed_with_parent([sys.executable, "-m", f"benchmarks.{benchmark.name}", *arguments])
    began, load = time.monotonic(), os.getloadavg()[0]
    try:
        with log.open("w", encoding="utf-8") as messages:
            ended = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, **benchmark.environment},
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
                check=False,
                timeout=MOST_SECONDS,
            )
    except subprocess.TimeoutExpired as error:
        raise BenchmarkFailedError(
            f"benchmarks.{benchmark.name} ran longer than {MOST_SECONDS:.0f} s; its log: {log}"
        ) from error
    if ended.returncode:
        raise BenchmarkFailedError(
            f"benchmarks.{benchmark.name} ended with code {ended.returncode}; the end of its log {log}:\n{tail(log)}"
        )
    lines = ended.stdout.splitlines()
    try:
        result = json.loads(lines[-1] if lines else "")
    except ValueError as error:
        raise BenchmarkFailedError(
            f"the last line of benchmarks.{benchmark.name} is not JSON; its log: {log}"
        ) from error
    return {
        "result": result,
        "arguments": list(arguments),
        "seconds": round(time.monotonic() - began, 1),
        "machine": machine() | {"load_before": round(load, 2)},
    }


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "kvdistill": version("kvdistill"),
        "python": platform.python_version(),
        "torch": version("torch"),
        "cpu": cpu_name(Path("/proc/cpuinfo")),
        "cores": os.cpu_count(),
    }


def cpu_name(cpuinfo: Path) -> str:
    """The model of the CPU, as the kernel names it."""
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def run_all(
    benchmarks: Sequence[Benchmark], results: Results, *, quick: bool, resume: bool
) -> list[BenchmarkFailedError]:
    """Runs the benchmarks one after the other; returns the failures."""
    failures: list[BenchmarkFailedError] = []
    for number, benchmark in enumerate(benchmarks, start=1):
        progress, arguments = f"[{number}/{len(benchmarks)}] {benchmark.name}", benchmark.given(quick)
        if missing := benchmark.missing():
            _say(f"{progress}: left out, because {missing[0]} is not there; make real makes it")
            continue
        if resume and benchmark.is_kept(results, arguments):
            _say(f"{progress}: has a result")
            continue
        log = results.path.parent / f"{benchmark.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        _say(f"{progress} {' '.join(arguments)} (messages: {log})")
        try:
            result = run_one(benchmark, arguments, log)
        except BenchmarkFailedError as error:
            _say(f"{progress}: {error}")
            failures.append(error)
            continue
        results.add(benchmark.name, result)
        _say(f"{progress}: {result['seconds']:.0f} s")
    return failures


def section(benchmarks: Sequence[Benchmark], found: Mapping[str, Result]) -> str:
    """The generated section: the machine, then a heading and the tables of each benchmark that has a result.

    Raises:
        FieldError: a result is of another version of its benchmark.
    """
    shown = [benchmark for benchmark in benchmarks if benchmark.name in found]
    seconds = sum(found[benchmark.name]["seconds"] for benchmark in shown)
    parts = [f"`make bench` wrote this section; it took {seconds / 60:.0f} minutes.\n"]
    rows = [_machine_row(found[benchmark.name], benchmark) for benchmark in shown]
    headers = ("benchmark", "date", "kvdistill", "Python", "torch", "CPU", "cores", "load before")
    parts.append(tables.table(headers, rows))
    for benchmark in shown:
        arguments = found[benchmark.name]["arguments"]
        variables = [f"{name}={value}" for name, value in benchmark.environment.items()]
        command = " ".join([*variables, "python -m", f"benchmarks.{benchmark.name}", *map(_from_root, arguments)])
        parts.append(f"### {benchmark.title}\n")
        parts.append(f"`{command}`\n")
        parts.append(benchmark.shown(found[benchmark.name]["result"]))
    return "\n".join(parts)


def _machine_row(result: Result, benchmark: Benchmark) -> list[object]:
    names = ("date", "kvdistill", "python", "torch", "cpu", "cores", "load_before")
    return [f"`{benchmark.name}`", *(result["machine"][name] for name in names)]


def _from_root(argument: str) -> str:
    path = Path(argument)
    return str(path.relative_to(ROOT)) if path.is_absolute() and path.is_relative_to(ROOT) else argument


def around_section(page: Path) -> tuple[str, str]:
    """What is before and after the markers of a page.

    Raises:
        FieldError: the page does not have the two markers once, in this order.
    """
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise FieldError("page", f"{page} needs the lines {BEGIN} and {END}, once each, in this order")
    return before, after


def write_section(page: Path, content: str) -> None:
    """Replaces what is between the markers of a page.

    Raises:
        FieldError: as `around_section`.
    """
    before, after = around_section(page)
    page.write_text(f"{before}{BEGIN}\n\n{content.strip()}\n\n{END}{after}", encoding="utf-8")


def _say(message: str) -> None:
    sys.stderr.write(message + "\n")


def full_results(results: Results) -> dict[str, Result]:
    """The results of the sizes that the page has, without those of `--quick`."""
    full = {benchmark.name: list(benchmark.arguments) for benchmark in BENCHMARKS}
    return {name: one for name, one in results.found.items() if one.get("arguments") == full.get(name)}


def main() -> None:
    """Parses the arguments, runs the benchmarks, and writes the page unless one failed."""
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "bench", help="folder of results and logs")
    parser.add_argument("--page", type=Path, help="page with the markers; docs/benchmarks.md, and none with --quick")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--resume", action="store_true", help="do not run again what has a result with these arguments")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, to check the scripts")
    given = parser.parse_args()
    page = given.page or (None if given.quick else PAGE)
    if page is not None:
        around_section(page)  # now, and not after many minutes
    results = Results.read(given.output / "results.json")
    chosen = [benchmark for benchmark in BENCHMARKS if benchmark.name in given.only]
    failures = run_all(chosen, results, quick=given.quick, resume=given.resume)
    if failures:
        problems = "; ".join(str(failure).splitlines()[0] for failure in failures)
        raise BenchmarkFailedError(
            f"{len(failures)} of {len(chosen)} benchmarks failed, no page was written: {problems}"
        )
    if page is not None:
        write_section(page, section(BENCHMARKS, full_results(results)))
        _say(f"wrote {page}")
    sys.stdout.write(json.dumps(results.found) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KVDistillError as error:
        sys.exit(error.line())
