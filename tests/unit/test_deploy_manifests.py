"""Tests of scripts/deploy_manifests.py: it reports each inconsistency of an overlay and no false problems."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from scripts.deploy_manifests import Document, problems, with_schema

FLAGS = ["--model=m", "--grpc-port=50051", "--http-port=8001", "--drain-seconds=30"]
TEACHER = {
    "kind": "StatefulSet",
    "metadata": {"name": "teacher-a"},
    "spec": {
        "replicas": 2,
        "template": {
            "spec": {
                "terminationGracePeriodSeconds": 60,
                "containers": [
                    {
                        "command": ["python", "-m", "kvdistill", "serve"],
                        "args": FLAGS,
                        "ports": [{"name": "grpc", "containerPort": 50051}, {"name": "http", "containerPort": 8001}],
                        "lifecycle": {"preStop": {"sleep": {"seconds": 5}}},
                        "startupProbe": {"periodSeconds": 10, "failureThreshold": 30},
                    }
                ],
            }
        },
    },
}
PREPARE = {
    "kind": "Job",
    "metadata": {"name": "prepare"},
    "spec": {"template": {"spec": {"containers": [{"args": ["python", "-m", "experiments.demo.prepare", "/models"]}]}}},
}
SCALER = {"kind": "HorizontalPodAutoscaler", "spec": {"maxReplicas": 3, "scaleTargetRef": {"name": "teacher-a"}}}
BOTH = ["teacher-a-0.teacher-a:50051", "teacher-a-1.teacher-a:50051"]


def run(endpoints: list[str]) -> Document:
    config: dict[str, Any] = {
        "student": {"path": "s"},
        "teachers": [{"name": "a", "endpoints": endpoints}],
        "kv": {"patience_s": 301.0},
        "data": {"train": "t"},
        "run": {"output_dir": "o", "steps": 1},
    }
    return {"kind": "ConfigMap", "metadata": {"name": "run"}, "data": {"run.yaml": yaml.safe_dump(config)}}


def found(*documents: Document) -> list[str]:
    return list(problems("demo", documents))


def teacher(**changes: Any) -> Document:
    """The teacher manifest with changed keys of its container."""
    changed: Document = copy.deepcopy(TEACHER)
    changed["spec"]["template"]["spec"]["containers"][0].update(changes)
    return changed


def test_consistent_manifests_have_no_problem() -> None:
    assert found(TEACHER, PREPARE, run(BOTH)) == []


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (teacher(args=[*FLAGS, "--dtype=fp7"]), "demo: teacher-a: --dtype: expected one of auto"),
        (
            teacher(args=[*FLAGS, "--drain-seconds=46"]),
            "terminationGracePeriodSeconds must be at least 61 s",
        ),
        (teacher(args=[*FLAGS, "--http-port=8002"]), "it listens on 50051 and 8002"),
        (teacher(command=["kvdistill"]), "demo: teacher-a: expected python -m kvdistill serve"),
    ],
)
def test_inconsistent_server_flags_are_named(changed: Document, problem: str) -> None:
    (reported,) = found(changed, PREPARE, run(BOTH))
    assert problem in reported


def test_run_lists_exactly_the_existing_replicas() -> None:
    assert found(TEACHER, run(BOTH[:1])) == ["demo: run.yaml: teacher-a-1.teacher-a:50051 is missing"]
    assert found(TEACHER, SCALER, run(BOTH)) == ["demo: run.yaml: teacher-a-2.teacher-a:50051 is missing"]
    assert found(TEACHER, run([*BOTH, "teacher-b-0.teacher-b:50051"])) == [
        "demo: run.yaml: no pod has the address teacher-b-0.teacher-b:50051"
    ]


def test_patience_must_exceed_server_load_time() -> None:
    slow = teacher(startupProbe={"periodSeconds": 10, "failureThreshold": 31})
    (reported,) = found(slow, run(BOTH))
    assert reported == "demo: run.yaml: kv.patience_s must be longer than the time a server may take to load, 310 s"


def test_wrong_flags_of_prepare_job_are_named() -> None:
    wrong = copy.deepcopy(PREPARE)
    module = "experiments.train_multi_teacher_kv"
    wrong["spec"]["template"]["spec"]["containers"][0]["args"] = ["python", "-m", module, "--prepare_onyl", "true"]
    (reported,) = found(TEACHER, wrong, run(BOTH))
    assert "prepare_only" in reported


def test_pods_inside_custom_resources_are_checked() -> None:
    pod = {"spec": {"containers": []}}
    specs = {"Master": {"template": pod}, "Worker": {"template": pod}}
    job = {"kind": "PyTorchJob", "metadata": {"name": "trainer"}, "spec": {"pytorchReplicaSpecs": specs}}
    known = list(with_schema([job, TEACHER]))
    assert [(document["kind"], document["metadata"]["name"]) for document in known] == [
        ("Job", "trainer-master"),
        ("Job", "trainer-worker"),
        ("StatefulSet", "teacher-a"),
    ]
    assert known[0]["spec"]["template"] == pod
