"""`import kvdistill` imports nothing heavy, and every public name exists."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys

import pytest

import kvdistill
from kvcore.errors import KVDistillError
from tests.support.servers import REPOSITORY

# Packages that must not be imported before they are needed.
HEAVY = ("torch", "transformers", "grpc", "deepspeed", "lm_eval", "numpy", "pydantic")
LIGHT_USES = "import kvdistill\nkvdistill.__version__\ndir(kvdistill)\nkvdistill.__all__\nkvdistill.KVDistillError"


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    check = f"import sys\n{LIGHT_USES}\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_configuration_is_checked_without_torch() -> None:
    check = (
        "import sys, kvdistill\nkvdistill.KVPlan(layers=(0,))\n"
        "try: kvdistill.Selection(selector='uniforn', budget=1)\nexcept ValueError as error: print(error)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "did you mean 'uniform'" in done.stdout
    assert done.stdout.split()[-1] == "False"


@pytest.mark.parametrize("name", kvdistill.__all__)
def test_every_name_exists_and_is_listed_by_dir(name: str) -> None:
    assert getattr(kvdistill, name) is not None
    assert name in dir(kvdistill)


def test_type_checkers_see_the_same_names_from_the_same_modules() -> None:
    tree = ast.parse((REPOSITORY / "kvdistill" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {
        alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert {*declared, "__version__"} == set(kvdistill.__all__)
    for name, module in declared.items():
        assert module is not None
        assert getattr(importlib.import_module(module), name) is getattr(kvdistill, name)


def test_every_public_error_has_the_same_base_class() -> None:
    errors = [getattr(kvdistill, name) for name in kvdistill.__all__ if name.endswith("Error")]
    assert len(errors) > 5
    assert all(issubclass(error, KVDistillError) for error in errors)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'kvdistill' has no attribute 'TeacherClent'"):
        kvdistill.TeacherClent  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_error_names_a_folder_that_hides_a_package(tmp_path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").touch()
    check = f"import sys; sys.path.append({str(REPOSITORY)!r}); import kvdistill; kvdistill.load_student"
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path, env={"PYTHONPATH": ""}, capture_output=True, text=True, check=False
    )
    assert f"{tmp_path / 'data'} hides the package 'data'" in done.stderr
