"""Compares the Grafana dashboard, the alerts and their settings with the metrics that the programs export."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics_core import Metric

from student_trainer.kv_sources.failover import FailoverSource
from student_trainer.kv_sources.kv_batch import TeacherSums
from student_trainer.monitoring.run_metrics import FIGURES, RunMetrics
from student_trainer.monitoring.run_state import RunState
from teacher_server.monitoring.metrics import Metrics
from tests.support.scripted_replica import ScriptedReplica
from tests.support.training_parts import train_config

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
PAGE = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "info": ("_info",), "gauge": ("",)}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def names(metrics: Iterable[Metric]) -> set[str]:
    return {metric.name + suffix for metric in metrics for suffix in SUFFIXES[metric.type]}


def server_metrics() -> set[str]:
    return names(Metrics().registry.collect())


def trainer_metrics() -> set[str]:
    teacher = FailoverSource("ada", [ScriptedReplica("a:1")], patience_s=1.0)
    teacher.connect()
    state = RunState()
    state.connected({"ada": teacher})
    state.stepped(1, 1)
    state.log(1, dict.fromkeys(FIGURES, 1.0))
    state.account(1.0, {}, {"ada": TeacherSums()})
    return names(RunMetrics(train_config(), state).collect())


@pytest.fixture(scope="module")
def known() -> set[str]:
    return server_metrics() | trainer_metrics()


def rules() -> list[dict[str, Any]]:
    files = sorted((PROMETHEUS / "rules").glob("*.yml"))
    return [rule for file in files for group in load(file)["groups"] for rule in group["rules"]]


def panels() -> Iterator[dict[str, Any]]:
    yield from json.loads((GRAFANA / "dashboards" / "kvdistill.json").read_text(encoding="utf-8"))["panels"]


def expressions() -> dict[str, str]:
    shown = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in panels()
        for target in panel.get("targets", ())
    }
    return shown | {rule["alert"]: rule["expr"] for rule in rules()}


def test_panels_and_alerts_query_existing_metrics(known: set[str]) -> None:
    assert len(expressions()) > 50
    for name, expression in expressions().items():
        queried = re.findall(r"\b(?:kvdistill|process)_\w+|\bup\b", expression)
        assert queried, name
        assert set(queried) <= known | {"up", "process_resident_memory_bytes", "process_cpu_seconds_total"}, name


def test_expressions_use_existing_label_values() -> None:
    state = RunMetrics(train_config(), RunState())
    values = {
        (label, value)
        for metric in state.collect()
        for sample in metric.samples
        for label, value in sample.labels.items()
    }
    for name, expression in expressions().items():
        for label, value in re.findall(r'\b(phase|stage)="(\w+)"', expression):
            assert (label, value) in values, name


def test_docs_explain_every_metric_and_alert(known: set[str]) -> None:
    unexplained = {name for name in known if f"`{name.removesuffix('_bucket')}`" not in PAGE}
    assert {name for name in unexplained if not name.endswith(("_sum", "_count")) and "process_" not in name} == set()
    headings = re.findall(r"^### (\w+)$", PAGE, re.MULTILINE)
    assert {rule["alert"] for rule in rules()} <= set(headings)


def test_docs_do_not_mention_removed_metrics(known: set[str]) -> None:
    documented = set(re.findall(r"`(kvdistill_\w+)`", PAGE))
    assert documented <= known | {name.removesuffix("_bucket") for name in known}


def test_every_alert_has_a_firing_and_a_non_firing_test() -> None:
    files = sorted((PROMETHEUS / "tests").glob("*.yml"))
    checks = [check for file in files for test in load(file)["tests"] for check in test["alert_rule_test"]]
    fires = {check["alertname"] for check in checks if check["exp_alerts"]}
    is_quiet = {check["alertname"] for check in checks if not check["exp_alerts"]}
    alerts = {rule["alert"] for rule in rules()}
    assert fires == is_quiet == alerts
    for rule in rules():
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in panels()]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for a, b in combinations(places, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart or above, (a, b)
    numbers = [panel["id"] for panel in panels()]
    assert len(set(numbers)) == len(numbers)


def test_prometheus_and_grafana_settings_match_compose() -> None:
    compose = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    services = yaml.safe_load(re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", compose))["services"]
    groups = {group["labels"]["job"]: group["targets"] for group in load(PROMETHEUS / "targets/cpu/targets.yml")}
    assert groups.keys() == {"teacher", "trainer"}
    for target in (*groups["teacher"], *groups["trainer"]):
        host, port = target.split(":")
        assert any(published.endswith(f":{port}") for published in services[host]["ports"])
    provider = load(GRAFANA / "provisioning" / "dashboards" / "kvdistill.yml")["providers"][0]
    mounts = dict(mount.split(":")[:2] for mount in services["grafana"]["volumes"])
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    source = load(GRAFANA / "provisioning" / "datasources" / "prometheus.yml")["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in services
    interval = load(PROMETHEUS / "prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == interval
