"""The version of this installation."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path


def _version() -> str:
    try:
        return importlib.metadata.version("kvdistill")
    except importlib.metadata.PackageNotFoundError:
        # Run from a checkout, or from an image that has only the sources.
        import tomllib  # noqa: PLC0415 - rarely needed

        pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
        return tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"]


__version__ = _version()
