"""Builds the Kubernetes manifests and checks that they are consistent with each other and with kvdistill's flags."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.recipe.config import FLAGS as RECIPE_FLAGS
from kvcore.config import parse
from kvcore.errors import ConfigError
from student_trainer.config import TrainConfig
from teacher_server.config import FLAGS as SERVE_FLAGS
from teacher_server.config import ServeConfig

OVERLAYS = Path(__file__).resolve().parent.parent / "deploy" / "k8s" / "overlays"
SERVE = ["python", "-m", "kvdistill", "serve"]
PREPARE = ["python", "-m", "experiments.train_multi_teacher_kv"]
# Kinds of operators, for which Kubernetes has no schema.
FOREIGN = {"ServiceMonitor", "PyTorchJob"}

Document = dict[str, Any]


def build(kustomize: str, overlay: Path) -> list[Document]:
    """Builds the objects of one overlay; raises CalledProcessError if kustomize fails."""
    done = subprocess.run([kustomize, "build", str(overlay)], stdout=subprocess.PIPE, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def with_schema(documents: Sequence[Document]) -> Iterator[Document]:
    """The objects that Kubernetes has schemas for. Objects of operators are replaced by a Job per pod template."""
    for document in documents:
        if document["kind"] not in FOREIGN:
            yield document
            continue
        for name, template in pod_templates(document):
            metadata = {**document["metadata"], "name": f"{document['metadata']['name']}-{name}".lower()}
            yield {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": {"template": template}}


def pod_templates(tree: object, name: str = "") -> Iterator[tuple[str, Document]]:
    """All pod templates in an object, with the key above each."""
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        if key == "template":
            yield name, value
        else:
            yield from pod_templates(value, key)


def problems(overlay: str, documents: Sequence[Document]) -> Iterator[str]:
    """Inconsistencies in flags, durations, the run's configuration and its teachers' addresses, one line each."""
    replicas: dict[str, int] = {}
    for document in of_kind(documents, "StatefulSet"):
        name = document["metadata"]["name"]
        replicas[name] = max_replicas(documents, document)
        try:
            yield from (f"{overlay}: {name}: {problem}" for problem in teacher_problems(document))
        except ConfigError as error:
            yield f"{overlay}: {name}: {error}"
    try:
        for document in of_kind(documents, "Job"):
            check_preparation(document)
        (settings,) = of_kind(documents, "ConfigMap")
        run = parse(yaml.safe_load(settings["data"]["run.yaml"]), TrainConfig)
    except ConfigError as error:
        yield f"{overlay}: {error}"
        return
    slowest = max(max_load_seconds(teacher) for teacher in of_kind(documents, "StatefulSet"))
    if run.kv.patience_s <= slowest:
        yield f"{overlay}: run.yaml: kv.patience_s must be longer than the time a server may take to load, {slowest} s"
    served = {f"{name}-{number}.{name}:50051" for name, count in replicas.items() for number in range(count)}
    asked = {endpoint for teacher in run.teachers for endpoint in teacher.endpoints}
    yield from (f"{overlay}: run.yaml: no pod has the address {endpoint}" for endpoint in sorted(asked - served))
    yield from (f"{overlay}: run.yaml: {endpoint} is missing" for endpoint in sorted(served - asked))


def teacher_problems(document: Document) -> Iterator[str]:
    """Wrong flags (raised as ConfigError), wrong ports, and a grace period shorter than the shutdown."""
    pod = document["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command = [*container["command"], *container.get("args", [])]
    config = served(command)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    if ports != {"grpc": config.grpc_port, "http": config.http_port}:
        yield f"it listens on {config.grpc_port} and {config.http_port}, but its ports are {ports}"
    stop = container["lifecycle"]["preStop"]["sleep"]["seconds"] + config.drain_seconds
    if pod["terminationGracePeriodSeconds"] < stop + 10:
        yield f"terminationGracePeriodSeconds must be at least {stop + 10:g} s: preStop, drain and 10 s"


def max_load_seconds(document: Document) -> int:
    """The time that a server's startup probe allows, in seconds."""
    (container,) = document["spec"]["template"]["spec"]["containers"]
    probe = container["startupProbe"]
    return probe["periodSeconds"] * probe["failureThreshold"]


def served(command: list[str]) -> ServeConfig:
    """The configuration that a server's command line sets.

    Raises:
        ConfigError: a flag is unknown, or a value is wrong.
    """
    if command[: len(SERVE)] != SERVE:
        raise ConfigError(f"expected {' '.join(SERVE)}, got {command}")
    return SERVE_FLAGS.read(command[len(SERVE) :], "kvdistill serve")


def check_preparation(document: Document) -> None:
    """Parses the flags of a Job that prepares data; raises ConfigError if one is wrong."""
    for container in document["spec"]["template"]["spec"]["containers"]:
        arguments = container.get("args", [])
        if arguments[: len(PREPARE)] == PREPARE:
            RECIPE_FLAGS.read(arguments[len(PREPARE) :], document["metadata"]["name"])


def max_replicas(documents: Sequence[Document], teacher: Document) -> int:
    """The maximum number of pods of a StatefulSet: its replicas, or its autoscaler's maximum."""
    name = teacher["metadata"]["name"]
    scaled = [
        scaler["spec"]["maxReplicas"]
        for scaler in of_kind(documents, "HorizontalPodAutoscaler")
        if scaler["spec"]["scaleTargetRef"]["name"] == name
    ]
    return scaled[0] if scaled else teacher["spec"]["replicas"]


def of_kind(documents: Sequence[Document], kind: str) -> Iterator[Document]:
    """The objects of one kind."""
    return (document for document in documents if document["kind"] == kind)
