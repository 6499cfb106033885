"""The list of mutations stays true to the code: each still applies, its test exists, and the page shows them all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.mutate import LIST, PAGE, ROOT, Mutation, load, run, with_table

MUTATIONS = load()


def test_every_mutation_applies_in_exactly_one_place() -> None:
    texts = {one.file: (ROOT / one.file).read_text(encoding="utf-8") for one in MUTATIONS}
    wrong = [str(one) for one in MUTATIONS if texts[one.file].count(one.old) != 1 or one.old == one.new]
    assert not wrong, f"mend {LIST}"


def test_every_killer_test_exists() -> None:
    for one in MUTATIONS:
        file, name = one.test.split("::")
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), one.test


def test_the_parts_that_kv_pass_through_are_all_mutated() -> None:
    least = {"align/": 30, "fuse/": 10, "kvcore/selectors/": 5, "student_trainer/": 20}
    for prefix, count in least.items():
        assert sum(one.file.startswith(prefix) for one in MUTATIONS) >= count, prefix


def test_the_page_shows_the_list() -> None:
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    assert with_table(page, MUTATIONS) == page, "run: python scripts/mutate.py --table"


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ("+", "-", "killed"),
        ("+", "+ 0 +", "SURVIVED"),
        ("*", "/", "DOES NOT APPLY: sums.py holds 0 times, not once: *"),
        ("+", "(", "NOT RUN: pytest ended with 4"),
    ],
)
def test_the_script_tells_a_mutation_that_is_noticed_from_one_that_is_not(
    old: str, new: str, verdict: str, tmp_path: Path
) -> None:
    (tmp_path / "sums.py").write_text("def add(a, b):\n    return a + b\n", encoding="utf-8")
    test = "from sums import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n"
    (tmp_path / "test_sums.py").write_text(test, encoding="utf-8")
    profile = 'from hypothesis import settings\n\nsettings.register_profile("any_failure")\n'
    (tmp_path / "conftest.py").write_text(profile, encoding="utf-8")
    (outcome,) = run([tmp_path], [Mutation("sums.py", old, new, "test_sums.py::test_add", "an example")])
    assert outcome.verdict == verdict
    assert outcome.killed == (verdict == "killed")
    assert "a + b" in (tmp_path / "sums.py").read_text(encoding="utf-8")
