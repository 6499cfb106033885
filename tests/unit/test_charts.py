"""Tests of the data that pages give to the browser's charts, and of the scripts that draw them."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from kvcore.monitoring import live_page
from kvcore.monitoring.charts import MOST_POINTS, Chart, Event, chart_block
from kvcore.monitoring.live_page import HEADERS, add_scripts, saved_page

UPLOT = Path(live_page.__file__).parent / "static" / "uplot"


def content(block: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json">(.*)</script><noscript>', block)
    assert found, block
    return json.loads(found[1])


def test_charts_have_their_curves_units_levels_and_events() -> None:
    block = chart_block(
        [Chart("KV loss", {"train": [(1, 0.5), (2, 0.25)]}, "%", ((1.0, "mean"),), top=1.0)],
        [Event(2, "best", "best so far")],
    )
    assert content(block) == {
        "charts": [
            {
                "title": "KV loss",
                "unit": "%",
                "lines": [[1.0, "mean"]],
                "top": 1.0,
                "time": False,
                "curves": [{"name": "train", "colour": 0, "x": [1, 2], "y": [0.5, 0.25]}],
            }
        ],
        "events": [{"step": 2, "kind": "best", "text": "best so far"}],
        "controls": True,
    }


def test_charts_leave_out_values_that_are_not_finite_and_curves_without_other_values() -> None:
    bad = {"train": [(1, math.nan), (2, 3.0)], "never": [(1, math.inf)]}
    (chart,) = content(chart_block([Chart("a", bad), Chart("b", {"never": [(1, math.nan)]})]))["charts"]
    assert [(curve["name"], curve["x"], curve["y"]) for curve in chart["curves"]] == [("train", [2], [3.0])]


def test_a_curve_keeps_its_colour_whatever_other_curves_have_a_value() -> None:
    (chart,) = content(chart_block([Chart("a", {"ada": [], "ben": [(1, 0.5)]})]))["charts"]
    assert [(curve["name"], curve["colour"]) for curve in chart["curves"]] == [("ben", 1)]


def test_long_curves_are_thinned_and_keep_both_ends() -> None:
    (chart,) = content(chart_block([Chart("a", {"train": [(step, float(step)) for step in range(5001)]})]))["charts"]
    x = chart["curves"][0]["x"]
    assert MOST_POINTS / 2 < len(x) <= MOST_POINTS + 1
    assert (x[0], x[-1]) == (0, 5000)
    assert len({after - before for before, after in itertools.pairwise(x[:-1])}) == 1


def test_names_cannot_end_the_script_element() -> None:
    block = chart_block([Chart("</script><b>", {"<!--": [(1, 1.0)]})], [Event(1, "best", "</script>")])
    assert block.count("</script>") == 1
    assert content(block)["charts"][0]["title"] == "</script><b>"


def test_live_pages_run_only_scripts_of_their_own_server() -> None:
    app = FastAPI()
    add_scripts(app)
    client = TestClient(app)
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    names = re.findall(r'src="(static/[^"]+)"', live_page.live_page("title", ()))
    assert len(names) == 3
    for name in names:
        answer = client.get(f"/{name}")
        assert answer.headers["content-type"].startswith("text/javascript")
        assert answer.text
    for name in ("static/../live_page.py", "static/%2e%2e/live_page.py", "static/uplot/LICENSE"):
        assert client.get(f"/{name}").status_code == 404


def test_a_saved_page_needs_no_server_and_runs_only_its_own_scripts() -> None:
    page = saved_page("title", [chart_block([])])
    assert 'src="' not in page
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 2
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy
    assert policy[1].count("'sha256-") == 2
    assert "connect-src" not in policy[1], "it may load nothing"


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("uPlot.iife.min.js", "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"),
        ("uPlot.min.css", "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04"),
    ],
)
def test_uplot_is_unmodified(name: str, digest: str) -> None:
    assert hashlib.sha256((UPLOT / name).read_bytes()).hexdigest() == digest
