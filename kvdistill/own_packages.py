"""Whether Python finds kvdistill's packages, or a user's folders of the same names. Standard library only."""

from __future__ import annotations

import importlib.util
from pathlib import Path

# Where this installation is: site-packages, or a checkout.
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
    """The problem in one line, with the next step, if another package or folder hides one of ours."""
    for name in PACKAGES:
        found = _place(name)
        if found is None:
            return f"package '{name}' is missing from {ROOT}; next: install kvdistill again"
        if found != ROOT / name:
            return (
                f"{found} hides the package '{name}' that kvdistill has in {ROOT}; next: rename it, run from another"
                " directory, set PYTHONSAFEPATH=1, or unset PYTHONPATH if that names its folder"
            )
    return None


def _place(name: str) -> Path | None:
    """Where Python would import a top-level package from: its folder, or the file of a module."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    places = list(spec.submodule_search_locations or ())
    place = places[0] if places else spec.origin
    return Path(place).resolve() if place else None
