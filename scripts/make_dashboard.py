"""Writes the Grafana dashboard, deploy/grafana/dashboards/kvdistill.json; `--check` says whether the file is fresh.

Examples:
  python -m scripts.make_dashboard
  python -m scripts.make_dashboard --check
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.dashboard_panels import ROWS, Panel

OUTPUT = Path(__file__).resolve().parent.parent / "deploy" / "grafana" / "dashboards" / "kvdistill.json"
COLUMNS = 24
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard() -> dict[str, Any]:
    """The whole dashboard, as Grafana imports it."""
    return {
        "uid": "kvdistill",
        "title": "kvdistill",
        "description": "A training run and the teacher servers that it pulls K/V from.",
        "tags": ["kvdistill"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_datasource(), _instances("trainer", "step"), _instances("server", "ready")]},
        "panels": list(_laid_out(ROWS)),
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _instances(name: str, metric: str) -> dict[str, Any]:
    metric = f"kvdistill_train_{metric}" if name == "trainer" else f"kvdistill_{metric}"
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": f"label_values({metric}, instance)", "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _laid_out(rows: dict[str, tuple[Panel, ...]]) -> Iterator[dict[str, Any]]:
    """Row by row from the left; a panel that does not fit begins a new line."""
    number, y = 1, 0
    for title, panels in rows.items():
        yield {"id": number, "type": "row", "title": title, "gridPos": _place(0, y, COLUMNS, 1), "panels": []}
        number, x, y = number + 1, 0, y + 1
        for panel in panels:
            if x + panel.width > COLUMNS:
                x, y = 0, y + panel.height
            yield _panel(panel, number, _place(x, y, panel.width, panel.height))
            number, x = number + 1, x + panel.width
        y += panels[-1].height


def _place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, **panel.defaults}
    options = panel.options
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "lineWidth": 2,
            "fillOpacity": 30 if panel.stack != "none" else 0,
            "showPoints": "never",
            "stacking": {"mode": panel.stack, "group": "A"},
        }
        options = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "expr": query.expr,
                "legendFormat": query.legend or "__auto",
                # One number is the one of now: over a range every phase of the past would have its own.
                "instant": panel.kind != "timeseries",
                "range": panel.kind == "timeseries",
            }
            for index, query in enumerate(panel.queries)
        ],
    }


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file is not fresh")
    text = json.dumps(dashboard(), indent=2) + "\n"
    if parser.parse_args().check:
        if OUTPUT.is_file() and OUTPUT.read_text(encoding="utf-8") == text:
            return 0
        print(f"{OUTPUT.name} is not what {Path(__file__).name} writes; run: make docs")
        return 1
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
