"""Tests of the repository: tracked files, packaging, pins, documentation, and that the linters catch violations."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from kvcore.extras import EXTRAS
from kvdistill.own_packages import PACKAGES
from scripts.draw_pictures import PICTURES

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MOST_LINES = 450
# Import name to distribution name, where they differ.
DISTRIBUTIONS = {
    "google": "protobuf",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "opentelemetry": "opentelemetry-api",
    "yaml": "pyyaml",
    "pydantic_core": "pydantic",
    "starlette": "fastapi",
}
# Imported only where an extra is installed.
OPTIONAL = {"accelerate", "bitsandbytes", "mlflow", "vllm", "wandb"}


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def tracked(pattern: str) -> list[Path]:
    """Tracked and untracked files that git does not ignore."""
    listed = git("ls-files", "--cached", "--others", "--exclude-standard", "--", pattern)
    assert listed.returncode == 0, listed.stderr
    return [path for path in map(Path, listed.stdout.splitlines()) if (ROOT / path).is_file()]


def is_generated(path: Path) -> bool:
    return "_pb2" in path.name


def packages_in_tree() -> set[str]:
    found = {".".join(path.parent.parts) for path in tracked("*/__init__.py")}
    return {name for name in found if name.split(".")[0] != "tests"}


def top_level() -> list[str]:
    return sorted({name.split(".")[0] for name in packages_in_tree()})


# ------------------------------------------------------------------------------- what is tracked


def test_no_source_folder_is_ignored() -> None:
    folders = [*top_level(), "benchmarks", "configs", "deploy", "docs", "evaluation", "protos", "scripts", "tests/unit"]
    paths = [f"{folder}/{name}" for folder in folders for name in ("module.py", "file.json", "below/file.yaml", "x.md")]
    ignored = git("check-ignore", "--no-index", *paths)
    assert ignored.returncode == 1, f"git ignores {ignored.stdout.split()}"


def test_outputs_and_environments_are_ignored() -> None:
    paths = ["outputs/demo/report.json", ".venv/bin/python", "kvcore/__pycache__/plan.pyc"]
    assert git("check-ignore", "--no-index", *paths).stdout.splitlines() == paths


def test_no_file_is_too_long() -> None:
    lengths = {path: (ROOT / path).read_text(encoding="utf-8").count("\n") for path in tracked("*.py")}
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES and not is_generated(path)} == {}


def test_ci_runs_the_tests_from_any_directory() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    planned = subprocess.run(["make", "--dry-run", "test"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "scripts/run_checks.py" in planned.stdout
    assert "make test" in script.read_text(encoding="utf-8")


# ------------------------------------------------------------------------------- packaging


def test_every_package_except_benchmarks_is_packaged_with_its_subpackages() -> None:
    patterns = PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    packaged = [name for name in top_level() if name != "benchmarks"]
    assert sorted(patterns) == sorted(pattern for name in packaged for pattern in (name, f"{name}.*"))
    assert [*PACKAGES, "kvdistill"] == sorted(packaged, key=lambda name: (name == "kvdistill", name))


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {".".join(path.parent.parts) for name in top_level() for path in tracked(f"{name}/*.py")}
    assert folders == packages_in_tree()


def test_import_contracts_cover_every_package_and_every_configuration() -> None:
    settings = PYPROJECT["tool"]["importlinter"]
    assert sorted(settings["root_packages"]) == top_level()
    contracts = {contract["name"]: contract for contract in settings["contracts"]}
    layers = {name for layer in contracts["Imports go downward only"]["layers"] for name in re.findall(r"\w+", layer)}
    assert sorted(layers) == top_level()
    for name, contract in contracts.items():
        if name.startswith("Only "):
            assert sorted(contract["source_modules"]) == top_level()
    configurations = {".".join(path.with_suffix("").parts) for path in tracked("*/config.py")}
    assert configurations <= set(contracts["Configuration reaches no torch"]["source_modules"])


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def test_every_third_party_import_is_a_declared_dependency() -> None:
    declared = {canonicalize_name(requirement.name) for requirement in declared_requirements("train")}
    known = {*sys.stdlib_module_names, *top_level(), *OPTIONAL}
    undeclared = {
        (str(path), name)
        for package in top_level()
        for path in tracked(f"{package}/*.py")
        for name in imports_of(path)
        if name not in known and canonicalize_name(DISTRIBUTIONS.get(name, name)) not in declared
    }
    assert undeclared == set()


def declared_requirements(*extras: str) -> list[Requirement]:
    """Direct requirements of the project with these extras. Extras that refer to other extras are expanded."""
    project = PYPROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    requirements = list(map(Requirement, lines))
    own = [requirement for requirement in requirements if requirement.name == project["name"]]
    others = [requirement for requirement in requirements if requirement not in own]
    return others + [each for requirement in own for each in declared_requirements(*requirement.extras)]


def test_extras_list_the_packages_that_they_install() -> None:
    assert {canonicalize_name(name) for name in EXTRAS["train"]} == {
        canonicalize_name(Requirement(line).name) for line in PYPROJECT["project"]["optional-dependencies"]["train"]
    }
    assert EXTRAS.keys() < PYPROJECT["project"]["optional-dependencies"].keys()


def requirements_of(name: str) -> list[Requirement]:
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.fail(f"{name} is not installed; run: make setup")
    return [requirement for requirement in map(Requirement, lines) if applies(requirement)]


def applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def test_every_required_package_is_pinned_at_the_installed_version() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    pins = {str(canonicalize_name(name)): version for name, version in pairs}
    waiting = declared_requirements("dev")
    needed: dict[str, str] = {}
    while waiting:
        name = canonicalize_name(waiting.pop().name)
        # The CUDA build of torch pins its own libraries.
        if name in needed or name.startswith(("nvidia-", "cuda-", "triton")):
            continue
        waiting += requirements_of(name)
        needed[name] = importlib.metadata.version(name).partition("+")[0]
    assert needed == {name: pins.get(name) for name in needed}


def test_every_pinned_package_accepts_the_oldest_supported_python() -> None:
    oldest = f"{PYPROJECT['project']['requires-python'].removeprefix('>=')}.0"
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    needed = {pin.name: importlib.metadata.metadata(pin.name)["Requires-Python"] for pin in pins}
    too_new = {name: needs for name, needs in needed.items() if needs and oldest not in SpecifierSet(needs)}
    assert not too_new, f"Python {oldest} cannot install {too_new}"


# ------------------------------------------------------------------------------- documentation


def test_configuration_reference_is_up_to_date() -> None:
    command = [sys.executable, "-m", "scripts.make_config_reference", "--check"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_citation_names_this_version_and_license() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = PYPROJECT["project"]
    assert [cited["version"], cited["license"]] == [project["version"], project["license"]]
    assert [author["name"] for author in cited["authors"]] == [author["name"] for author in project["authors"]]


def test_links_between_documents_resolve() -> None:
    broken = [
        (str(page), target)
        for page in tracked("*.md")
        for target in re.findall(r"\]\(([^)\s#]+)", (ROOT / page).read_text(encoding="utf-8"))
        if "://" not in target and target not in PICTURES and not (ROOT / page.parent / target).exists()
    ]
    assert broken == []


# ------------------------------------------------------------------------------- linters catch violations


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("import pickle", "TID251"),
        ("import torch\n\nMODEL = torch.load('model.pt')", "TID251"),
        ("from torch import save", "TID251"),
        ("import sys\n\nsys.path.insert(0, '.')", "TID251"),
        ("print('loaded')", "T201"),
        ("try:\n    VALUE = 1\nexcept Exception:\n    VALUE = 2", "BLE001"),
        ("def half(x):\n    return x / 2", "ANN001"),
    ],
)
def test_ruff_rejects_in_library_code(line: str, rule: str) -> None:
    command = [str(BIN / "ruff"), "check", "--output-format=concise", "--stdin-filename", "kvcore/example.py", "-"]
    checked = subprocess.run(
        command, cwd=ROOT, input=f'"""Example."""\n\n{line}\n', capture_output=True, text=True, check=False
    )
    assert f" {rule} " in checked.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("kvcore/errors.py", "import teacher_server.config", "Imports go downward only"),
        ("student_trainer/model/losses.py", "import teacher_server.config", "Imports go downward only"),
        ("align/layer_map.py", "import fuse", "Imports go downward only"),
        (
            "student_trainer/model/losses.py",
            "import deepspeed",
            "Only student_trainer.loop.ds_engine imports deepspeed",
        ),
        ("teacher_server/app.py", "import vllm", "Only the vLLM engine and its connector import vllm"),
        ("kvcore/plan.py", "import kvcore.types", "Configuration reaches no torch"),
    ],
)
def test_import_contracts_reject(module: str, line: str, contract: str, tmp_path: Path) -> None:
    for package in top_level():
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    command = [str(BIN / "lint-imports"), "--no-cache"]
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert checked.returncode == 1
    assert f"{contract} BROKEN" in checked.stdout
