"""The Kubernetes manifests as kustomize builds them, and whether their parts fit each other and the programs."""

from __future__ import annotations

import re
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
# Kinds of operators, whose schemas are not Kubernetes' own.
FOREIGN = {"ServiceMonitor", "PyTorchJob"}

Document = dict[str, Any]


def build(kustomize: str, overlay: Path) -> list[Document]:
    """The objects of one overlay.

    Raises:
        subprocess.CalledProcessError: kustomize refuses it; its message is on stderr.
    """
    done = subprocess.run([kustomize, "build", str(overlay)], stdout=subprocess.PIPE, text=True, check=True)
    return list(yaml.safe_load_all(done.stdout))


def with_schema(documents: Sequence[Document]) -> Iterator[Document]:
    """The objects that Kubernetes has schemas for, and in place of an operator's kinds a Job of each pod in them."""
    for document in documents:
        if document["kind"] not in FOREIGN:
            yield document
            continue
        for name, template in pod_templates(document):
            metadata = {**document["metadata"], "name": f"{document['metadata']['name']}-{name}".lower()}
            yield {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": {"template": template}}


def pod_templates(tree: object, name: str = "") -> Iterator[tuple[str, Document]]:
    """Every `template` of pods in an object, with the key above it."""
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        if key == "template":
            yield name, value
        else:
            yield from pod_templates(value, key)


def problems(overlay: str, documents: Sequence[Document]) -> Iterator[str]:
    """What does not fit, one line each: flags, durations, the run's configuration, and its teachers' addresses."""
    replicas: dict[str, int] = {}
    for document in of_kind(documents, "StatefulSet"):
        name = document["metadata"]["name"]
        replicas[name] = most_replicas(documents, document)
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
    slowest = max(most_seconds_to_load(teacher) for teacher in of_kind(documents, "StatefulSet"))
    if run.kv.patience_s <= slowest:
        yield f"{overlay}: run.yaml: kv.patience_s is no longer than a server may take to load, {slowest} s"
    served = {f"{name}-{number}.{name}:50051" for name, count in replicas.items() for number in range(count)}
    asked = {endpoint for teacher in run.teachers for endpoint in teacher.endpoints}
    yield from (f"{overlay}: run.yaml: no pod is at {endpoint}" for endpoint in sorted(asked - served))
    yield from (f"{overlay}: run.yaml: {endpoint} is not asked" for endpoint in sorted(served - asked))


def teacher_problems(document: Document) -> Iterator[str]:
    """Flags that the server does not take (raised), ports that differ, a grace shorter than the end takes."""
    pod = document["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command = [*container["command"], *container.get("args", [])]
    config = served(command)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    if ports != {"grpc": config.grpc_port, "http": config.http_port}:
        yield f"it listens on {config.grpc_port} and {config.http_port}, and its ports are {ports}"
    stop = container["lifecycle"]["preStop"]["sleep"]["seconds"] + config.drain_seconds
    if pod["terminationGracePeriodSeconds"] < stop + 10:
        yield f"terminationGracePeriodSeconds is less than preStop and drain, {stop:g} s, and 10 s"


def most_seconds_to_load(document: Document) -> int:
    """How long the startup probe of a server lets it take."""
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
    """Reads the flags of a Job that prepares the recipe's data.

    Raises:
        ConfigError: one is wrong.
    """
    for container in document["spec"]["template"]["spec"]["containers"]:
        arguments = container.get("args", [])
        if arguments[: len(PREPARE)] == PREPARE:
            RECIPE_FLAGS.read(arguments[len(PREPARE) :], document["metadata"]["name"])


def most_replicas(documents: Sequence[Document], teacher: Document) -> int:
    """How many pods a StatefulSet may have: its own number, or its autoscaler's most."""
    name = teacher["metadata"]["name"]
    scaled = [
        scaler["spec"]["maxReplicas"]
        for scaler in of_kind(documents, "HorizontalPodAutoscaler")
        if scaler["spec"]["scaleTargetRef"]["name"] == name
    ]
    return scaled[0] if scaled else teacher["spec"]["replicas"]


def of_kind(documents: Sequence[Document], kind: str) -> Iterator[Document]:
    """The objects of one kind."""
    return (document for document in documents if re.fullmatch(kind, document["kind"]))
