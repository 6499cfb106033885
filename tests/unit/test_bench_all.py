"""`benchmarks.all` keeps results, reports failures, and writes one section of a page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import all as bench
from benchmarks import tables
from benchmarks.all import BEGIN, BENCHMARKS, END, Benchmark, BenchmarkFailedError, Results
from kvcore.errors import FieldError
from tests.support.servers import REPOSITORY


def stand_in(name: str, *arguments: str, needs: tuple[Path, ...] = ()) -> Benchmark:
    return Benchmark(name, name.title(), lambda result: tables.table(("n",), [[result["n"]]]), arguments, needs=needs)


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `benchmarks` of one's own, whose module `good` prints its argument, and `bad` fails."""
    folder = tmp_path / "root" / "benchmarks"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    count = "import pathlib, sys\nruns = pathlib.Path(__file__).with_suffix('.runs')\nruns.open('a').write('x')\n"
    (folder / "good.py").write_text(count + "print('first')\nprint('{\"n\": %s}' % sys.argv[1])\n", encoding="utf-8")
    (folder / "bad.py").write_text("import sys\nprint('{}')\nsys.exit('no room on the device')\n", encoding="utf-8")
    (folder / "silent.py").write_text("print('done')\n", encoding="utf-8")
    monkeypatch.setattr(bench, "ROOT", folder.parent)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    # `python -m` finds the working directory's packages first, the wrapper's own among them.
    (folder.parent / "student_trainer").symlink_to(REPOSITORY / "student_trainer")
    return folder


def runs(scripts: Path) -> int:
    counted = scripts / "good.runs"
    return len(counted.read_text(encoding="utf-8")) if counted.is_file() else 0


def test_a_failure_is_reported_and_the_results_before_and_after_it_are_kept(
    scripts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = Results.read(tmp_path / "out" / "results.json")
    results.add("earlier", {"result": {"n": 1}, "arguments": [], "seconds": 1.0, "machine": {}})
    chosen = [stand_in("bad"), stand_in("good", "7")]
    (failure,) = bench.run_all(chosen, results, quick=False, resume=False)
    assert "benchmarks.bad ended with code 1" in str(failure)
    assert "no room on the device" in str(failure)
    kept = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert {name: entry["result"] for name, entry in kept.items()} == {"earlier": {"n": 1}, "good": {"n": 7}}
    assert kept["good"]["machine"]["cores"] >= 1
    shown = capsys.readouterr().err
    assert "[1/2] bad" in shown
    assert "[2/2] good 7" in shown


def test_a_run_with_a_failure_leaves_the_page_alone(
    scripts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\nold\n{END}\n", encoding="utf-8")
    monkeypatch.setattr(bench, "BENCHMARKS", (stand_in("good", "7"), stand_in("silent")))
    monkeypatch.setattr("sys.argv", ["all", "--output", str(tmp_path / "out"), "--page", str(page)])
    with pytest.raises(
        BenchmarkFailedError, match=r"1 of 2 benchmarks failed.*benchmarks\.silent is not JSON"
    ) as caught:
        bench.main()
    assert "--resume" in caught.value.line()
    assert page.read_text(encoding="utf-8") == f"{BEGIN}\nold\n{END}\n"
    (scripts / "silent.py").write_text("print('{\"n\": 1234}')\n", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["all", "--resume", "--output", str(tmp_path / "out"), "--page", str(page)])
    bench.main()
    assert runs(scripts) == 1
    text = page.read_text(encoding="utf-8")
    assert "old" not in text
    assert "### Good\n\n`python -m benchmarks.good 7`\n\n| n |\n| --- |\n| 7 |\n" in text
    assert "| 1,234 |" in text


def test_resuming_runs_again_what_had_other_arguments(scripts: Path, tmp_path: Path) -> None:
    results = Results.read(tmp_path / "results.json")
    for argument, count in (("1", 1), ("1", 1), ("2", 2)):
        assert bench.run_all([stand_in("good", argument)], results, quick=False, resume=True) == []
        assert runs(scripts) == count
    assert bench.run_all([stand_in("good", "2")], results, quick=False, resume=False) == []
    assert runs(scripts) == 3


def test_a_result_of_another_version_is_not_shown_and_resuming_runs_it_again(scripts: Path, tmp_path: Path) -> None:
    results, good = Results.read(tmp_path / "results.json"), stand_in("good", "7")
    assert bench.run_all([good], results, quick=False, resume=False) == []
    results.add("good", results.found["good"] | {"result": {"old": 1}})
    with pytest.raises(FieldError, match=r"the result of 'good' is of another version: it has no 'n'.*--resume"):
        bench.section([good], results.found)
    assert bench.run_all([good], results, quick=False, resume=True) == []
    assert runs(scripts) == 2
    assert "| 7 |" in bench.section([good], results.found)


@pytest.mark.parametrize(("one_thread", "expected"), [(True, 1), (False, 3)])
def test_a_benchmark_of_one_thread_gets_and_shows_its_variable(
    scripts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: bool, expected: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    source = "import os\nprint('{\"n\": %s}' % os.environ['OMP_NUM_THREADS'])\n"
    (scripts / "threads.py").write_text(source, encoding="utf-8")
    chosen, results = [replace(stand_in("threads"), one_thread=one_thread)], Results.read(tmp_path / "results.json")
    assert bench.run_all(chosen, results, quick=False, resume=False) == []
    assert results.found["threads"]["result"] == {"n": expected}
    shown = "`OMP_NUM_THREADS=1 python -m benchmarks.threads`" in bench.section(chosen, results.found)
    assert shown is one_thread


def test_a_benchmark_without_its_files_is_left_out(
    scripts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = Results.read(tmp_path / "results.json")
    assert bench.run_all([stand_in("good", needs=(tmp_path / "model",))], results, quick=False, resume=False) == []
    assert runs(scripts) == 0
    assert results.found == {}
    assert f"{tmp_path / 'model'} is not there; make real" in capsys.readouterr().err


def test_only_the_text_between_the_markers_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\n## Prose\n", encoding="utf-8")
    for content in ("first", "second\n"):
        bench.write_section(page, content)
    assert page.read_text(encoding="utf-8") == f"# Title\n\n{BEGIN}\n\nsecond\n\n{END}\n\n## Prose\n"


@pytest.mark.parametrize("text", ["", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}{BEGIN}{END}", f"{BEGIN}{END}{END}"])
def test_a_page_without_its_two_markers_is_refused_and_unchanged(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(FieldError, match=r"page: .*page\.md needs the lines"):
        bench.write_section(page, "new")
    assert page.read_text(encoding="utf-8") == text


def test_a_page_without_markers_is_refused_before_anything_runs(
    scripts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "page.md").write_text("# Title\n", encoding="utf-8")
    monkeypatch.setattr(bench, "BENCHMARKS", (stand_in("good", "7"),))
    monkeypatch.setattr("sys.argv", ["all", "--output", str(tmp_path), "--page", str(tmp_path / "page.md")])
    with pytest.raises(FieldError, match="needs the lines"):
        bench.main()
    assert runs(scripts) == 0


@pytest.mark.parametrize("content", ["{", "[]"])
def test_another_file_in_place_of_the_results_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content, encoding="utf-8")
    with pytest.raises(FieldError, match="remove it, or give another folder"):
        Results.read(tmp_path / "results.json")


def test_the_page_of_the_documentation_has_the_markers(tmp_path: Path) -> None:
    copy = tmp_path / "page.md"
    copy.write_bytes(bench.PAGE.read_bytes())
    bench.write_section(copy, "new")


def test_every_benchmark_runs_and_is_named_on_the_page() -> None:
    files = (REPOSITORY / "benchmarks").glob("*.py")
    commands = {path.stem for path in files if "def main(" in path.read_text(encoding="utf-8")}
    page = bench.PAGE.read_text(encoding="utf-8")
    assert {name for name in commands if f"python -m benchmarks.{name} " in page} == commands
    # The GPU's needs a GPU.
    assert {benchmark.name for benchmark in BENCHMARKS} == commands - {"all", "gpu"}


def test_the_cpu_is_named_as_the_kernel_names_it(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Some CPU @ 2 GHz\n", encoding="utf-8")
    assert bench.cpu_name(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz"
    assert bench.cpu_name(tmp_path / "missing")
