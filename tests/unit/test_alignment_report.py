"""Tests of the alignment report: valid JSON and a self-contained HTML page."""

from __future__ import annotations

import ast
import base64
import copy
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

import student_trainer.monitoring.alignment_report
from align.aligner import Aligner
from align.head_dim_adapter import KVGeometry
from kvcore.types import TENSORS
from student_trainer.monitoring.alignment_pictures import ratio
from student_trainer.monitoring.alignment_report import AlignmentReport
from tests.support.alignment_parts import MIXING, STUDENT, TEACHER, calibrate_on, calibrated, teacher_batch

EXPLAINED, LAYER_MAP, SIMILARITY, COVERAGE = (
    "explained variance by layer",
    "layer map",
    "similarity of layers",
    "token coverage",
)


class Page(HTMLParser):
    """The images, table cells, text and external links of an HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: dict[str, np.ndarray] = {}
        self.loads: list[str] = []
        self.cells: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        addresses = [value or "" for name, value in attrs if name in {"href", "srcset", "data", "action"}]
        self.loads += [address for address in addresses if not address.startswith("data:image/png;base64,")]
        if tag == "img":
            kind, _, content = (named["src"] or "").partition(",")
            assert kind == "data:image/png;base64"
            self.images[named["alt"] or ""] = imread(io.BytesIO(base64.b64decode(content, validate=True)))
        elif named.get("src"):
            self.loads.append(named["src"] or "")
        if tag not in {"img", "source", "meta", "!doctype"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(data)
        self.text.append(data)


def write_page(teachers: dict[str, Any], directory: Path) -> Page:
    paths = AlignmentReport(teachers).write(directory)
    assert paths == [directory / "alignment.json", directory / "alignment.html"]
    return Page(paths[1].read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def ridge() -> dict[str, Any]:
    return calibrated(Aligner(MIXING, STUDENT, layer_map="ratio"), noise=1.0)[0].report()


@pytest.fixture(scope="module")
def cka() -> dict[str, Any]:
    return calibrated(Aligner(TEACHER, STUDENT, layer_map="cka"), noise=1.0)[0].report()


@pytest.fixture(scope="module")
def twin() -> dict[str, Any]:
    geometry = KVGeometry(2, 2, 4)
    aligner = Aligner(geometry, geometry, head_adapter="identity")
    return calibrate_on(aligner, teacher_batch(30, 2, seed=3, geometry=geometry)).report()


def test_report_has_settings_and_measurements() -> None:
    aligner, _, _ = calibrated(Aligner(MIXING, STUDENT, layer_map="ratio"), noise=1.0)
    report = json.loads(json.dumps(aligner.report(), allow_nan=False))
    assert (report["direction"], report["head_adapter"], report["layer_strategy"]) == ("to_student", "ridge", "ratio")
    assert (report["tokens"], report["sink_tokens"]) == ("boundary", 1)
    assert report["teacher"] == {"layers": 4, "heads": 2, "head_dim": 4}
    assert report["student"] == {"layers": 3, "heads": 3, "head_dim": 2}
    assert report["layer_map"] == {"0": [[0, 1.0]], "1": [[1, 0.5], [2, 0.5]], "2": [[3, 1.0]]}
    assert report["cka"] is None
    assert report["rows"]["fit"] > report["rows"]["held_out"] > 0
    for column, tensor in enumerate(TENSORS):
        assert report["explained_variance"][tensor] == aligner.adapter.explained_variance(tensor)
        assert report["explained_variance_shuffled"][tensor] == aligner.shuffled_LK[:, column].tolist()
        assert report["alpha"][tensor] == aligner.adapter.alpha(tensor)
        assert report["scale"][tensor] == aligner.scale(tensor).tolist()
        assert report["variance"][tensor] == aligner.variance(tensor).tolist()


def test_report_has_the_rank_of_the_maps(tmp_path: Path) -> None:
    aligner = Aligner(TEACHER, STUDENT, ridge_rank=2)
    page = write_page({"ada": aligner.report()}, tmp_path)
    report = json.loads((tmp_path / "alignment.json").read_text(encoding="utf-8"))["teachers"]["ada"]
    assert report["ridge_rank"] == 2
    assert "ridge of rank 2" in page.cells


@pytest.mark.parametrize(
    ("layer_map", "adapter"), [("ratio", "ridge"), ("cka", "procrustes"), ("learned", "pool"), ("last", "linear")]
)
def test_unmeasured_values_are_null_in_json_and_missing_on_the_page(
    layer_map: str, adapter: str, tmp_path: Path
) -> None:
    aligner = Aligner(TEACHER, STUDENT, layer_map=layer_map, head_adapter=adapter)
    page = write_page({"ada": aligner.report()}, tmp_path)
    report = json.loads((tmp_path / "alignment.json").read_text(encoding="utf-8"))["teachers"]["ada"]
    assert report["coverage"] is None
    assert report["explained_variance"]["k"] == report["explained_variance_shuffled"]["v"] == [None] * 3
    assert report["scale"] == {"k": [None] * 3, "v": [None] * 3}
    assert (report["layer_map"] is None) == (layer_map == "cka")
    assert f"ada: {COVERAGE}" not in page.images
    assert f"ada: {SIMILARITY}" not in page.images
    assert "not measured" in page.cells


def test_report_has_current_weights_of_learned_map() -> None:
    aligner = Aligner(TEACHER, STUDENT, layer_map="learned")
    mapping = aligner.report()["layer_map"]
    assert aligner.learned_map is not None
    weights = aligner.learned_map.weights()
    for s in range(3):
        assert dict(mapping[str(s)]) == pytest.approx(dict(enumerate(weights[s].tolist())), abs=1e-6)


def test_json_has_the_report_of_every_teacher(tmp_path: Path, ridge: dict[str, Any], twin: dict[str, Any]) -> None:
    write_page({"ada": ridge, "ben": twin}, tmp_path)
    text = (tmp_path / "alignment.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"step": 0, "teachers": {"ada": ridge, "ben": twin}}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alignment.html", "alignment.json"]


def test_page_is_self_contained_and_has_a_plot_of_each_measurement(
    tmp_path: Path, ridge: dict[str, Any], cka: dict[str, Any], twin: dict[str, Any]
) -> None:
    page = write_page({"ada": ridge, "ben": cka, "cat": twin}, tmp_path)
    assert page.loads == []
    assert not re.search(r"https?://|@import|url\(", (tmp_path / "alignment.html").read_text(encoding="utf-8"))
    assert set(page.images) == {
        *(f"ada: {title}" for title in (EXPLAINED, LAYER_MAP, COVERAGE)),
        *(f"ben: {title}" for title in (EXPLAINED, LAYER_MAP, SIMILARITY, COVERAGE)),
        f"cat: {LAYER_MAP}",
    }
    for image in page.images.values():
        assert min(image.shape[:2]) > 150
        assert image[..., :3].std() > 0.05


def test_page_shows_explained_variance_and_its_control(tmp_path: Path, ridge: dict[str, Any]) -> None:
    page = write_page({"ada": ridge}, tmp_path)
    for name in ("explained_variance", "explained_variance_shuffled"):
        for tensor in TENSORS:
            assert f"{np.mean(ridge[name][tensor]):.3f}" in page.cells
            for value in ridge[name][tensor]:
                assert f"{value:.3f}" in page.cells
    seen, paired = (ridge["coverage"]["student_tokens"][key] for key in ("seen", "paired"))
    assert ratio({"seen": seen, "paired": paired}) in page.cells
    assert "0.500 of 1, 0.500 of 2" in page.cells


@pytest.mark.parametrize(
    ("paired", "seen", "shown"),
    [(1536, 6656, "3 of 13"), (500, 500, "all"), (0, 10, "fewer than 1 of 20"), (1, 1000, "fewer than 1 of 20")],
)
def test_share_of_tokens_is_shown_in_small_numbers(paired: int, seen: int, shown: str) -> None:
    assert ratio({"paired": paired, "seen": seen}) == shown


def test_page_has_pictures_for_dark_and_for_narrow_windows(tmp_path: Path, ridge: dict[str, Any]) -> None:
    write_page({"ada": ridge}, tmp_path)
    text = (tmp_path / "alignment.html").read_text(encoding="utf-8")
    sources = re.findall(r'<source media="([^"]+)" srcset="data:image/png;base64,([^"]+)">', text)
    assert len(sources) == 9, "three for each of three pictures"
    for media, content in sources:
        image = imread(io.BytesIO(base64.b64decode(content)))
        assert (image[0, 0, :3].mean() < 0.2) == ("dark" in media)
        assert image.shape[1] <= (620 if "max-width" in media else 1120)


def coloured(image: np.ndarray, more: int, less: int) -> int:
    """The number of pixels in which channel `more` clearly exceeds channel `less`."""
    return int((image[..., more] - image[..., less] > 0.4).sum())


def test_plots_depend_on_the_reported_values(tmp_path: Path, ridge: dict[str, Any]) -> None:
    """Taller bars have more pixels of their colour: blue for true pairs, red for the control."""
    low, high, moved = copy.deepcopy(ridge), copy.deepcopy(ridge), copy.deepcopy(ridge)
    low["explained_variance"]["k"] = [0.1, 0.1, 0.1]
    high["explained_variance_shuffled"]["v"] = [0.9, 0.9, 0.9]
    moved["layer_map"]["1"] = [[3, 1.0]]
    pages = [write_page({"ada": report}, tmp_path) for report in (ridge, low, high, moved)]
    bars = [page.images[f"ada: {EXPLAINED}"] for page in pages]
    blue, red = ([coloured(image, *channels) for image in bars] for channels in ((2, 0), (0, 2)))
    assert blue[1] < 0.8 * blue[0]
    assert red[2] > 2 * red[0]
    assert (blue[3], red[3]) == (blue[0], red[0])
    maps = [page.images[f"ada: {LAYER_MAP}"] for page in pages]
    assert np.array_equal(maps[0], maps[1])
    assert not np.array_equal(maps[0], maps[3])


def test_large_negative_explained_variance_is_plotted(tmp_path: Path, ridge: dict[str, Any]) -> None:
    bad = copy.deepcopy(ridge)
    bad["explained_variance"]["k"] = [-900.0, 0.5, None]
    bad["explained_variance_shuffled"]["k"] = [None, None, None]
    page = write_page({"ada": bad}, tmp_path)
    assert f"ada: {EXPLAINED}" in page.images
    assert "-900.000" in page.cells


def test_plots_of_many_layers_fit_the_page(tmp_path: Path) -> None:
    deep = KVGeometry(80, 1, 1)
    report = Aligner(deep, KVGeometry(28, 1, 1)).report()
    report["explained_variance"] = {tensor: [0.5] * 28 for tensor in TENSORS}
    report["explained_variance_shuffled"] = {tensor: [0.1] * 28 for tensor in TENSORS}
    page = write_page({"ada": report}, tmp_path)
    assert all(image.shape[1] <= 1120 for image in page.images.values())


def test_teacher_name_is_escaped_on_the_page(tmp_path: Path, twin: dict[str, Any]) -> None:
    page = write_page({'<b>"x"': twin}, tmp_path)
    assert '<b>"x"' in page.cells
    assert f'<b>"x": {LAYER_MAP}' in page.images


def test_second_write_replaces_the_report(tmp_path: Path, ridge: dict[str, Any], twin: dict[str, Any]) -> None:
    write_page({"ada": ridge}, tmp_path)
    write_page({"ben": twin}, tmp_path)
    assert list(json.loads((tmp_path / "alignment.json").read_text(encoding="utf-8"))["teachers"]) == ["ben"]


def test_nan_is_written_as_null(tmp_path: Path, twin: dict[str, Any]) -> None:
    AlignmentReport({"ada": {**twin, "sink_tokens": math.nan}}).write(tmp_path)
    saved = json.loads((tmp_path / "alignment.json").read_text(encoding="utf-8"))
    assert saved["teachers"]["ada"]["sink_tokens"] is None


def test_matplotlib_is_not_imported_before_a_report_is_written() -> None:
    tree = ast.parse(Path(student_trainer.monitoring.alignment_report.__file__).read_text(encoding="utf-8"))
    imported = [
        name
        for node in tree.body
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    ]
    assert "kvcore.files" in imported
    assert not [
        name for name in imported if name.startswith(("matplotlib", "student_trainer.monitoring.alignment_report"))
    ]
