"""Compares docker-compose.yml and the Dockerfile with the flags and settings of servers and trainer."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvcore.config import load_config
from kvcore.extras import EXTRAS
from kvdistill.own_packages import PACKAGES
from scripts.image_requirements import requirements
from student_trainer.config import TrainConfig
from teacher_server.config import FLAGS as SERVE_FLAGS
from teacher_server.config import ServeConfig

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "deploy/docker/Dockerfile").read_text("utf-8")
CUDA_CONSTRAINTS = "deploy/docker/cuda-constraints.txt"
TEACHERS = ("teacher-a", "teacher-b-1", "teacher-b-2")
GPU_TEACHERS = ("teacher-a-gpu", "teacher-b-gpu")
STUDENTS = ("student", "student-gpu")


def without_variables(text: str) -> str:
    """Replaces each `${NAME:-default}` by its default, as compose does for unset variables."""
    return re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", text)


PROJECT: dict[str, Any] = yaml.safe_load(without_variables((ROOT / "docker-compose.yml").read_text("utf-8")))
SERVICES: dict[str, dict[str, Any]] = PROJECT["services"]
each_service = pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
each_teacher = pytest.mark.parametrize("name", [*TEACHERS, *GPU_TEACHERS])
each_student = pytest.mark.parametrize("name", STUDENTS)
each_profile = pytest.mark.parametrize("profile", ["cpu", "gpu"])


def active(profile: str) -> dict[str, dict[str, Any]]:
    """The services that compose starts with this profile."""
    return {name: service for name, service in SERVICES.items() if profile in service.get("profiles", [profile])}


def network_name(name: str) -> str:
    """The name under which the other services of the profile reach a service."""
    networks = SERVICES[name].get("networks")
    return networks["default"]["aliases"][0] if networks else name


def seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))


def served_by(name: str) -> ServeConfig:
    """The server configuration of a teacher's container, parsed from the image's entry point and its command."""
    entry = next(line for line in DOCKERFILE.splitlines() if line.startswith('ENTRYPOINT ["kvdistill", "serve"'))
    arguments = [*json.loads(entry.removeprefix("ENTRYPOINT "))[2:], *SERVICES[name]["command"]]
    return SERVE_FLAGS.read(arguments, "kvdistill serve")


def trained_by(name: str) -> TrainConfig:
    """The training configuration of a student's container, loaded from its file and --set as in `kvdistill train`."""
    assert SERVICES[name]["entrypoint"] == ["python", "-m", "student_trainer.launching.ranks", "2"]
    program, *words = SERVICES[name]["command"]
    assert program == "train"
    (config,) = [word.removeprefix("--config=/app/") for word in words if word.startswith("--config=")]
    changes = [word.removeprefix("--set=") for word in words if word.startswith("--set=")]
    return load_config(ROOT / config, changes, TrainConfig)


def names_in_network() -> set[str]:
    aliases = [s["networks"]["default"]["aliases"] for s in SERVICES.values() if isinstance(s.get("networks"), dict)]
    return set(SERVICES) | {alias for some in aliases for alias in some}


@each_service
def test_ports_are_published_on_loopback_only(service):
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in service.get("ports", []))


@each_service
def test_containers_are_unprivileged_and_write_only_to_volumes(service):
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged")
    assert all(mount.startswith("/tmp:") for mount in service["tmpfs"])


@each_service
def test_containers_have_memory_and_pid_limits(service):
    assert {"memory", "pids"} <= service["deploy"]["resources"]["limits"].keys()


def test_long_running_services_have_health_checks():
    assert {name for name, service in SERVICES.items() if "healthcheck" not in service} == {"models"}


def test_teachers_wait_for_models_and_students_for_teachers():
    for name in TEACHERS:
        assert SERVICES[name]["depends_on"] == {"models": {"condition": "service_completed_successfully"}}
    assert SERVICES["student"]["depends_on"] == {name: {"condition": "service_healthy"} for name in TEACHERS}
    assert SERVICES["student-gpu"]["depends_on"] == {name: {"condition": "service_healthy"} for name in GPU_TEACHERS}


@each_teacher
def test_teacher_health_check_uses_its_port(name):
    config, service = served_by(name), SERVICES[name]
    assert (config.grpc_host, config.http_host) == ("0.0.0.0", "0.0.0.0")
    assert [int(port.rpartition(":")[2]) for port in service["ports"]] == [config.grpc_port, config.http_port]
    assert service["healthcheck"]["test"] == ["CMD", "healthy", str(config.http_port), "/readyz"]
    assert f'CMD ["healthy", "{config.http_port}", "/readyz"]' in DOCKERFILE


@each_teacher
def test_teacher_stop_grace_period_exceeds_drain(name):
    assert seconds(SERVICES[name]["stop_grace_period"]) > served_by(name).drain_seconds + 5


@each_student
def test_student_endpoints_match_the_teacher_services(name):
    served = {served_by(teacher).name for teacher in SERVICES[name]["depends_on"]}
    config = trained_by(name)
    assert {teacher.name for teacher in config.teachers} == served
    for teacher in config.teachers:
        for host, port in (endpoint.split(":") for endpoint in teacher.endpoints):
            assert host in names_in_network()
            assert int(port) == served_by("teacher-a").grpc_port
    assert name == "student-gpu" or [len(teacher.endpoints) for teacher in config.teachers] == [1, 2]


@each_student
def test_student_uses_its_monitor_port_and_volumes(name):
    config, service = trained_by(name), SERVICES[name]
    mounts = [mount.split(":")[1] for mount in service["volumes"]]
    assert config.monitor.host == "0.0.0.0"
    assert [int(port.rpartition(":")[2]) for port in service["ports"]] == [config.monitor.port]
    assert service["healthcheck"]["test"] == ["CMD", "healthy", str(config.monitor.port), "/healthz"]
    assert config.run.output_dir.is_relative_to("/outputs")
    assert "outputs:/outputs" in service["volumes"]
    assert config.data.val is not None
    for path in (config.data.train, config.data.val):
        assert any(path.is_relative_to(mount) for mount in mounts)


def test_only_the_models_service_writes_models():
    writers = [name for name, service in SERVICES.items() if "models:/models" in service.get("volumes", [])]
    assert writers == ["models"]


def test_each_image_is_built_once_and_tagged_with_the_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    ours = {s["image"] for s in SERVICES.values() if s["image"].startswith("kvdistill/")}
    assert ours == {f"kvdistill/{i}:{version}{v}" for i in ("teacher", "trainer") for v in ("", "-cuda")}
    assert sorted(s["image"] for s in SERVICES.values() if "build" in s) == sorted(ours)


def test_images_run_as_unprivileged_user():
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    images = [stage for stage in stages if re.match(r"base AS (trainer|teacher)\n", stage)]
    assert len(images) == 2
    assert all("\nUSER 10001:10001\n" in stage for stage in images)


def test_pulled_images_have_a_pinned_version():
    pulled = {s["image"] for s in SERVICES.values() if not s["image"].startswith("kvdistill/")}
    pulled |= {build["args"]["PYTHON_IMAGE"] for s in SERVICES.values() if (build := s.get("build"))}
    assert all(re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+(-[\w-]+)?", image) for image in pulled), pulled


def test_build_context_has_every_package():
    included = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    assert {*PACKAGES, "kvdistill"} <= included
    copied = re.findall(r"^COPY (?!--from)(?:--chmod=755 )?(.+) \S+$", DOCKERFILE, flags=re.MULTILINE)
    assert {path for line in copied for path in line.split()} - {"."} <= included
    assert all((ROOT / path).exists() for path in included)


def test_cuda_pins_are_exact_and_unique():
    lines = {name: (ROOT / name).read_text("utf-8").splitlines() for name in ("constraints.txt", CUDA_CONSTRAINTS)}
    pins = {name: [line for line in some if not line.startswith("#")] for name, some in lines.items()}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for some in pins.values() for pin in some)
    named = [pin.partition("==")[0].lower() for some in pins.values() for pin in some]
    assert len(named) == len(set(named))


def test_teacher_does_not_import_packages_of_the_train_extra():
    imported: set[str] = set()
    for package in ("teacher_server", "kvcore", "protos", "kvdistill"):
        for path in (ROOT / package).rglob("*.py"):
            if path.is_relative_to(ROOT / "kvdistill/report") or path.is_relative_to(ROOT / "kvdistill/sweep"):
                # Only `kvdistill report` and `kvdistill sweep` import them, with the extra `train`.
                continue
            for node in ast.parse(path.read_text("utf-8")).body:
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add(str(node.module).partition(".")[0])
    assert imported.isdisjoint(EXTRAS["train"])


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_only_trainer_image_installs_the_train_extra(variant):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    trainer, teacher = (requirements(ROOT, image, variant) for image in ("trainer", "teacher"))
    assert set(extras["train"]) <= set(trainer)
    assert set(trainer) - set(teacher) == set(extras["train"]) - set(extras["gpu"] if variant == "cuda" else ())
    assert (set(extras["gpu"]) <= set(teacher)) == (variant == "cuda")
    assert set(extras["otel"]) <= set(teacher)
    assert requirements(ROOT, "torch", variant)[0].startswith("torch==")


@each_profile
def test_prometheus_scrapes_exactly_the_servers_of_the_profile(profile):
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text("utf-8"))
    (job,) = config["scrape_configs"]
    assert [some["files"] for some in job["file_sd_configs"]] == [["/targets/*.yml"]]
    (service,) = [active(profile)[name] for name in active(profile) if name.startswith("prometheus")]
    (folder,) = [mount.split(":")[0] for mount in service["volumes"] if mount.endswith(":/targets:ro")]
    groups = [group for path in (ROOT / folder).glob("*.yml") for group in yaml.safe_load(path.read_text("utf-8"))]
    scraped = {(group["labels"]["job"], target) for group in groups for target in group["targets"]}
    teachers = [name for name in active(profile) if name.startswith("teacher")]
    assert scraped == {("trainer", "student:8010"), *(("teacher", f"{network_name(name)}:8001") for name in teachers)}


@each_profile
def test_services_of_a_profile_share_no_port_and_no_network_name(profile):
    services = active(profile)
    ports = [port.rpartition(":")[0] for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == len(set(ports)) > 3
    names = [network_name(name) for name in services]
    assert len(names) == len(set(names))
    assert {"prometheus", "grafana", "student", "teacher-a", "teacher-b-1"} <= set(names)
    for service in services.values():
        for name, condition in service.get("depends_on", {}).items():
            assert name in services or condition.get("required") is False


def test_the_profile_is_cpu_unless_another_is_given():
    assert "COMPOSE_PROFILES=cpu" in (ROOT / ".env").read_text("utf-8").splitlines()
    assert set(active("cpu")) & set(active("gpu")) == {"grafana"}


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_health_check_of_the_images_follows_the_status(status, healthy):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, format, *args):  # noqa: A002 - the name of the base class
            del format, args

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    check = [str(ROOT / "deploy/docker/healthy"), str(server.server_port), "/readyz"]
    assert (subprocess.run(check, check=False).returncode == 0) == healthy
    server.shutdown()
    server.server_close()
    assert subprocess.run(check, capture_output=True, check=False).returncode != 0
