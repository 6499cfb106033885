"""Tests of `kvdistill report`: runs, tables, pictures, and messages about missing pictures."""

from __future__ import annotations

import csv
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from kvcore.errors import ConfigError
from kvdistill.report.finished_runs import find_runs, read_run
from kvdistill.report.report_charts import kv_by_layer, pictures, weights_by_dataset
from kvdistill.report.report_table import comparison, comparison_csv, markdown
from kvdistill.report.write_report import write_report
from student_trainer.monitoring.chart_style import LIGHT, draw
from tests.support.finished_runs import write_run

STAGES = ("stage1_fixed", "stage2_similarity", "stage3_learnable")
MEASURED = {"gsm8k_test": {"dataset": "gsm8k_test", "score": 61.25, "num_examples": 1319, "ci95": [58.5, 64.0]}}


@pytest.fixture
def stages(tmp_path: Path) -> Path:
    """Three stages. The second has an additional evaluation, and the third has not ended."""
    home = tmp_path / "three_stage_routing"
    write_run(home / STAGES[0])
    write_run(home / STAGES[1], by_dataset={"gsm8k": 0.9, "math23k": 0.3}, scores=MEASURED)
    write_run(home / STAGES[2], by_dataset={"gsm8k": 0.7}, ended=False)
    return home


class Page(HTMLParser):
    """The resources that a browser would load, and the text of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in {"script", "link", "iframe"}
        self.addresses += [value or "" for name, value in attrs if name in {"src", "srcset", "href"}]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_find_runs_returns_each_run_once_with_a_unique_name(stages: Path) -> None:
    (stages / STAGES[0] / "checkpoints" / "step-1").mkdir(parents=True)
    (stages / STAGES[0] / "checkpoints" / "step-1" / "summary.json").write_text("{}")
    assert [run.name for run in find_runs([stages, stages / STAGES[1]])] == list(STAGES)
    assert [run.name for run in find_runs([stages / STAGES[1]])] == [STAGES[1]]
    other = write_run(stages.parent / "other" / "run")
    assert [run.name for run in find_runs([other, stages])] == ["other/run", *(f"{stages.name}/{s}" for s in STAGES)]


def test_folder_without_runs_raises_with_its_name(stages: Path) -> None:
    (stages.parent / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty: has no run"):
        find_runs([stages, stages.parent / "empty"])
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        find_runs([stages.parent / "nowhere"])


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("eval_results.json", '{"val": {"score": "high"}}', "'score'"),
        ("eval_results.json", '{"val": {}}', "'score'"),
        ("summary.json", "{", "not valid JSON"),
        ("metrics.jsonl", "[1]\n", "expected a JSON object"),
    ],
)
def test_damaged_file_raises_with_its_name(tmp_path: Path, file: str, text: str, message: str) -> None:
    run = write_run(tmp_path / "run")
    (run / file).write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        find_runs([run])
    assert str(run / file) in str(caught.value)


def test_incomplete_last_line_is_ignored(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 40, "trai')
    assert read_run(run, "run").steps == 30


def test_validation_is_from_the_best_step(stages: Path) -> None:
    _, second, third = find_runs([stages])
    assert second.validation["step"] == 20
    # A run that has not ended has no best step yet.
    assert third.validation["step"] == 30
    assert weights_by_dataset(second) == {
        "gsm8k": {"ada": pytest.approx(0.9), "ben": pytest.approx(0.1)},
        "math23k": {"ada": pytest.approx(0.3), "ben": pytest.approx(0.7)},
    }
    assert [layer for layer, _ in kv_by_layer(second, "v")] == [0, 1, 2]
    assert [error for _, error in kv_by_layer(second, "v")] == pytest.approx([0.4, 0.41, 0.42])


def test_layers_are_sorted_by_number(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", layers=12), "run")
    assert [layer for layer, _ in kv_by_layer(run, "k")] == list(range(12))


def test_table_has_every_dataset_and_marks_unknown_values(stages: Path) -> None:
    headings, rows = comparison(find_runs([stages]))
    assert headings[:4] == ["run", "val", "gsm8k_test", "average"]
    assert headings[4:7] == ["cross-entropy", "perplexity", "KV loss"]
    assert rows[1][:7] == [STAGES[1], "60.0 [31.3, 83.2]", "61.2 [58.5, 64.0]", "60.0", "0.900", "2.46", "0.400"]
    assert rows[0][2] == "-"
    assert rows[0][7:] == ["30", "12.5", "3.4%", "23,456"]
    assert rows[2][7:] == ["30, unfinished", "-", "-", "-"]
    assert markdown(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 |\n"


def test_csv_has_every_value_in_its_own_column(stages: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(comparison_csv(find_runs([stages])))))
    assert [row["run"] for row in rows] == list(STAGES)
    second = rows[1]
    assert (float(second["gsm8k_test"]), float(second["gsm8k_test_low"])) == (61.25, 58.5)
    assert (float(second["val_ce_loss"]), second["val_answer_ce"]) == (pytest.approx(0.9), "")
    assert (second["gsm8k_test_num_examples"], second["finished"], second["steps"]) == ("1319", "True", "30")
    assert rows[0]["gsm8k_test"] == ""
    assert (rows[2]["finished"], rows[2]["seconds"]) == ("False", "")


def test_report_writes_page_tables_and_pictures(stages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = stages.parent / "report"
    paths = write_report([stages], output)
    pngs = ("learning_curves", "routing_weights", "routing_by_dataset", "kv_loss_by_layer")
    assert [path.name for path in paths] == [
        "report.html",
        "report.md",
        "report.csv",
        *(f"{name}.png" for name in pngs),
    ]
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in paths)
    page = Page(paths[0].read_text(encoding="utf-8"))
    assert len(page.addresses) == 4 * len(pngs), "light and dark, for wide and narrow windows"
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert {*STAGES, "61.2 [58.5, 64.0]"} <= set(page.words)
    for path in paths[3:]:
        image = imread(path)
        assert min(image.shape[:2]) > 300
        assert image[..., :3].std() > 0.03
    message = capsys.readouterr().out
    assert message.startswith(paths[1].read_text(encoding="utf-8"))
    assert str(paths[0]) in message


@pytest.mark.parametrize(
    ("name", "figure", "other"),
    [
        ("learning_curves", '"val/ce_loss": 0.9', '"val/ce_loss": 0.4'),
        ("routing_weights", '"routing/weights_mean/ada": 0.5', '"routing/weights_mean/ada": 0.2'),
        ("routing_by_dataset", 'gsm8k/routing/weights_mean/ada": 0.9', 'gsm8k/routing/weights_mean/ada": 0.4'),
        ("kv_loss_by_layer", '"val/kv_loss/v/layer0": 0.4', '"val/kv_loss/v/layer0": 0.6'),
    ],
)
def test_pictures_depend_on_the_values(tmp_path: Path, name: str, figure: str, other: str) -> None:
    run = write_run(tmp_path / "run", by_dataset={"gsm8k": 0.9})

    def drawn() -> bytes:
        (picture,) = (picture for picture in pictures(find_runs([run]))[0] if picture.name == name)
        return draw(picture.wide[0], LIGHT, picture.wide[1], "png")

    before = drawn()
    assert drawn() == before
    metrics = run / "metrics.jsonl"
    text = metrics.read_text(encoding="utf-8")
    metrics.write_text(text.replace(figure, other), encoding="utf-8")
    assert figure in text
    assert drawn() != before


def test_a_teacher_has_one_colour_in_all_pictures(tmp_path: Path) -> None:
    first = write_run(tmp_path / "runs" / "a")
    text = (first / "metrics.jsonl").read_text(encoding="utf-8").replace("weights_mean/ada", "weights_mean/cai")
    (first / "metrics.jsonl").write_text(text, encoding="utf-8")
    write_run(tmp_path / "runs" / "b", by_dataset={"gsm8k": 0.9})
    colours: dict[str, set[str]] = {}
    for picture in pictures(find_runs([tmp_path / "runs"]))[0]:
        if picture.name.startswith("routing_"):
            figure = Figure()
            picture.wide[0](figure, LIGHT)
            for line in figure.legends[0].get_lines():
                colours.setdefault(str(line.get_label()), set()).add(str(line.get_color()))
    assert {name: len(found) for name, found in colours.items()} == {"cai": 1, "ben": 1, "ada": 1}


def test_a_run_has_one_colour_in_all_pictures(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", layers=0)
    write_run(tmp_path / "runs" / "b")
    colours: dict[str, str] = {}
    for picture in pictures(find_runs([tmp_path / "runs"]))[0]:
        figure = Figure()
        picture.wide[0](figure, LIGHT)
        for line in figure.legends[0].get_lines():
            if line.get_label() == "b":
                colours[picture.name] = str(line.get_color())
    assert colours["learning_curves"] == colours["kv_loss_by_layer"] == LIGHT.series[1]


def test_narrow_pictures_have_one_panel_above_the_other(tmp_path: Path) -> None:
    picture = pictures(find_runs([write_run(tmp_path / "run")]))[0][0]
    (_, wide), (fill, narrow) = picture.wide, picture.narrow
    assert narrow[0] < wide[0] / 2
    assert narrow[1] > 2 * wide[1]
    figure = Figure()
    fill(figure, LIGHT)
    figure.draw_without_rendering()
    left, bottom = zip(*((axes.get_position().x0, axes.get_position().y0) for axes in figure.axes[:3]), strict=True)
    assert max(left) - min(left) < 0.1
    assert list(bottom) == sorted(bottom, reverse=True)


def test_missing_pictures_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "scores"
    folder.mkdir()
    (folder / "eval_results.json").write_text(json.dumps({**MEASURED, "average": 61.25}))
    paths = write_report([folder], tmp_path / "report")
    assert [path.suffix for path in paths] == [".html", ".md", ".csv"]
    page = "".join(Page(paths[0].read_text(encoding="utf-8")).words)
    message = capsys.readouterr().out
    for sentence in (
        "No learning curves",
        "No routing weights:",
        "No routing weights by dataset",
        "No KV loss by layer",
    ):
        assert sentence in page
        assert sentence in message
    assert "unfinished" not in page


def test_more_runs_than_colours_are_distinguishable(tmp_path: Path) -> None:
    for number in range(10):
        write_run(tmp_path / "runs" / f"run{number}")
    drawn, missing = pictures(find_runs([tmp_path / "runs"]))
    assert [picture.name for picture in drawn] == ["learning_curves", "routing_weights", "kv_loss_by_layer"]
    assert len(missing) == 1
    figure = Figure()
    drawn[0].wide[0](figure, LIGHT)
    (legend,) = figure.legends
    looks = {(line.get_color(), line.get_linestyle()) for line in legend.get_lines()}
    assert len(looks) == 10
