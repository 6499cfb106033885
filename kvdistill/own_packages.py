"""Detects user folders that hide kvdistill's packages. Uses only the standard library."""

from __future__ import annotations

import importlib.util
from pathlib import Path

# The directory of this installation: site-packages or a checkout.
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "align",
    "data",
    "evaluation",
    "experiments",
    "extraction",
    "fuse",
    "kvcore",
    "protos",
    "student_trainer",
    "teacher_server",
)


def shadowed() -> str | None:
    """A message with the next step if another package or folder hides one of kvdistill's packages, else None."""
    for name in PACKAGES:
        found = _location(name)
        if found is None:
            return f"package '{name}' is missing from {ROOT}; next: install kvdistill again"
        if found != ROOT / name:
            return (
                f"{found} hides the package '{name}' of kvdistill in {ROOT}; next: rename it, run from another"
                " directory, set PYTHONSAFEPATH=1, or unset PYTHONPATH if that names its folder"
            )
    return None


def _location(name: str) -> Path | None:
    """The folder or file from which Python would import a top-level package or module."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or ())
    location = folders[0] if folders else spec.origin
    return Path(location).resolve() if location else None
