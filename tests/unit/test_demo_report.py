"""Tests of the demo's results, verdict, table, plot and page with artificial runs."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from experiments.demo import results as gather
from experiments.demo.demo_charts import draw_picture
from experiments.demo.demo_config import ARMS, DemoPaths
from experiments.demo.demo_page import render_page
from experiments.demo.demo_report import HEADINGS, table_rows, text_table, verdict, write_report
from experiments.demo.questions import WRITTEN, Asked, Inference, Way
from experiments.demo.results import Arm, Replay, ResultError, Results
from kvdistill.report.finished_runs import Run

REPORT_KEYS = {
    "arms",
    "chance",
    "bytes_per_sample",
    "raw_bf16_bytes_per_sample",
    "stall_fraction",
    "samples_per_second",
    "teacher_tokens_per_second",
    "peak_memory_mb",
    "offline_matches_online",
    "inference",
    "seconds",
}


def arm(*accuracy: float, kv_loss: float | None) -> Arm:
    steps = [100, 200, 300]
    curve = list(zip(steps, [0.15, 0.5 * accuracy[0] + 0.07, accuracy[0]], strict=True))
    losses = [] if kv_loss is None else list(zip(steps, [1.1, 0.5 + kv_loss / 2, kv_loss], strict=True))
    return Arm(list(accuracy), [kv_loss] * len(accuracy), curve, losses)


@pytest.fixture
def results() -> Results:
    return Results(
        arms={
            "kv_two_teachers": arm(1.0, 0.99, kv_loss=0.12),
            "kv_one_teacher": arm(0.98, 0.97, kv_loss=0.15),
            "no_kv": arm(0.15, 0.14, kv_loss=None),
            "shuffled_kv": arm(0.13, 0.16, kv_loss=0.98),
        },
        chance=1 / 7,
        bytes_per_sample=2345.0,
        raw_bf16_bytes_per_sample=19456.0,
        stall_fraction=0.034,
        samples_per_second=412.0,
        teacher_tokens_per_second=9000.0,
        peak_memory_mb={"trainer_rank0": 700.0, "trainer_rank1": 690.0, "teacher_a": 610.0, "teacher_b": 605.0},
        replay=Replay(steps=64, largest_difference=0.0, same_steps=True),
        seconds={"data": 1.2, "kv_two_teachers seed 0": 80.0},
        inference=Inference(
            Path("runs/kv_two_teachers-seed0/best_model"),
            [Asked("3 +4 x2 -5 +1 =", " 3", " 3", 6, " 0 0 2 3", 5)],
            [Way("3 latent passes", 0.995, 8.0), Way(WRITTEN, 0.985, 7.5)],
        ),
        stages_ms={"queue": 1.0, "prefill": 4.0, "encode": 2.0, "network": 3.0, "decode": 2.0, "stall": 1.5},
        facts={"Question": "3 +4 x2 -5 +1 ="},
    )


def test_report_json_has_the_documented_keys(results: Results, tmp_path: Path) -> None:
    paths = write_report(results, tmp_path / "out")
    assert [path.name for path in paths] == ["report.json", "report.png", "report.html"]
    report = json.loads(paths[0].read_text(encoding="utf-8"))
    assert set(report) == REPORT_KEYS
    assert set(report["arms"]) == set(ARMS)
    assert report["arms"]["kv_two_teachers"] == {"accuracy": [1.0, 0.99], "kv_loss": [0.12, 0.12]}
    assert report["arms"]["no_kv"]["kv_loss"] == [None, None]
    assert report["offline_matches_online"] is True
    assert report["inference"]["forward_passes"] == {"latents": [6], WRITTEN: [5]}
    assert report["inference"]["accuracy"] == {"3 latent passes": 0.995, WRITTEN: 0.985}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in paths)


def test_verdict_of_expected_results_has_their_values(results: Results) -> None:
    assert results.misses() == []
    sentences = " ".join(verdict(results))
    for figure in ("14.5%", "99.5%", "14.3%", "2345", "19456", "3.4%", "64 steps"):
        assert figure in sentences


def test_misses_name_every_arm_outside_its_limit(results: Results) -> None:
    bad = replace(
        results,
        arms=results.arms
        | {"kv_one_teacher": arm(0.97, 0.949, kv_loss=0.3), "shuffled_kv": arm(0.25, 0.31, kv_loss=0.9)},
    )
    misses = bad.misses()
    assert len(misses) == 2
    assert misses[0].startswith("kv_one_teacher, seed 1: 94.9%")
    assert misses[1].startswith("shuffled_kv, seed 1: 31.0%")
    sentences = verdict(bad)
    assert sentences[0] == "NOT as expected:"
    assert not any("raise the accuracy" in sentence for sentence in sentences)


@pytest.mark.parametrize(
    ("replay", "matches"),
    [
        (Replay(64, 9e-7, same_steps=True), True),
        (Replay(64, 2e-6, same_steps=True), False),
        (Replay(64, float("nan"), same_steps=True), False),
        (Replay(63, 0.0, same_steps=False), False),
        (Replay(0, float("inf"), same_steps=True), False),
    ],
)
def test_replay_matches_only_with_equal_losses_and_steps(results: Results, replay: Replay, *, matches: bool) -> None:
    compared = replace(results, replay=replay)
    assert compared.as_json()["offline_matches_online"] is matches
    assert any("from the store" in miss for miss in compared.misses()) is not matches


class ExternalLoads(HTMLParser):
    """Collects the external resources that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in {"src", "srcset", "href", "data"}]


def test_page_is_self_contained_and_fits_phones_and_dark_screens(results: Results) -> None:
    page = render_page(results, HEADINGS, table_rows(results), verdict(results))
    parser = ExternalLoads()
    parser.feed(page)
    assert len(parser.addresses) == 12
    assert all(address.startswith("data:image/svg+xml;base64,") for address in parser.addresses)
    assert not {"script", "link", "iframe"} & set(parser.tags)
    assert "@import" not in page
    assert "url(" not in page
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page
    for name in ARMS:
        assert f"<td>{name}</td>" in page
    assert "<td> 3</td><td>6</td><td> 0 0 2 3</td><td>5</td>" in page


def test_page_escapes_text(results: Results) -> None:
    page = render_page(replace(results, facts={"<b>": "a & b"}), HEADINGS, [], ["1 < 2"])
    assert "&lt;b&gt;" in page
    assert "a &amp; b" in page
    assert "1 &lt; 2" in page


def test_plot_is_drawn_without_kv_losses(results: Results) -> None:
    bare = {name: arm(0.5, kv_loss=None) for name in ARMS}
    for drawn in (draw_picture(results), draw_picture(replace(results, arms=bare, stages_ms={}))):
        assert drawn.startswith(b"\x89PNG\r\n\x1a\n")


def test_table_has_aligned_columns_in_ascii(results: Results) -> None:
    lines = text_table([HEADINGS, *table_rows(results)])
    assert re.match(r"kv_two_teachers\s+100\.0% / 99\.0%\s+0\.120 / 0\.120\s+answer", lines[1])
    assert "".join(lines).isascii()
    assert {line.index(cell) for line, cell in zip(lines[:2], ("what the", "answer,"), strict=True)} == {
        lines[0].index("what the")
    }


def write_run(run: Path, metrics: list[dict[str, float]], accuracy: float | None, kv_loss: float | None) -> None:
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics), encoding="utf-8")
    (run / "summary.json").write_text(json.dumps({"val_kv_loss": kv_loss}), encoding="utf-8")
    (run / "result.json").write_text(json.dumps({"test_accuracy": accuracy, "seconds": 1.0}), encoding="utf-8")


def test_gather_arm_reads_all_seeds(tmp_path: Path) -> None:
    paths = DemoPaths(tmp_path)
    lines = [
        {"step": 20, "train/loss": 3.0, "train/kv_loss": 1.0},
        {"step": 40, "train/loss": 2.0, "train/kv_loss": 0.5},
        {"step": 40, "val/task_metrics/accuracy": 0.75},
    ]
    write_run(paths.run("kv_one_teacher-seed0"), lines, 0.9, 0.4)
    write_run(paths.run("kv_one_teacher-seed1"), [], 0.8, None)
    found = gather.gather_arm([paths.run(f"kv_one_teacher-seed{seed}") for seed in range(2)])
    assert found == Arm([0.9, 0.8], [0.4, None], [(40, 0.75)], [(20, 1.0), (40, 0.5)])
    with pytest.raises(ResultError, match=r"kv_one_teacher-seed2.*missing"):
        gather.gather_arm([paths.run("kv_one_teacher-seed2")])


def test_stages_ms_is_per_micro_batch_and_teacher() -> None:
    lines = [
        {"step": 20, "kv/prefill_s": 0.8, "kv/stall_s": 0.03},
        {"step": 20, "val/loss": 1.0},
        {"step": 40, "kv/prefill_s": 0.4, "kv/stall_s": 0.01},
    ]
    found = gather.stages_ms(Run("run", Path(), lines), teachers=2)
    assert found == pytest.approx({"prefill": 300.0, "stall": 10.0})
    assert gather.stages_ms(Run("run", Path(), [{"step": 1}]), teachers=2) == {}


@pytest.mark.parametrize(
    ("offline", "expected"),
    [
        ([(1, 2.0, 0.5), (2, 1.5, 0.25)], Replay(2, 0.0, same_steps=True)),
        ([(1, 2.0, 0.5), (2, 1.5, 0.75)], Replay(2, 0.5, same_steps=True)),
        ([(1, 2.0, 0.5)], Replay(1, 0.0, same_steps=False)),
        ([(1, 9.0, 9.0), (2, 1.5, math.nan)], Replay(2, math.nan, same_steps=True)),
    ],
)
def test_gather_replay_compares_every_step(
    tmp_path: Path, offline: list[tuple[int, float, float]], expected: Replay
) -> None:
    paths = DemoPaths(tmp_path)
    for mode, losses in (("record", [(1, 2.0, 0.5), (2, 1.5, 0.25)]), ("offline", offline)):
        lines = [{"step": step, "train/loss": loss, "train/kv_loss": kv} for step, loss, kv in losses]
        write_run(paths.run(mode), lines, None, None)
    found = gather.gather_replay(paths)
    assert (found.steps, found.same_steps) == (expected.steps, expected.same_steps)
    assert found.largest_difference == pytest.approx(expected.largest_difference, abs=0.0, nan_ok=True)
