"""Prepares the demo's data and models for servers and a trainer elsewhere: `python -m experiments.demo.prepare FOLDER`.

The folder then has `teacher_a`, `teacher_b` and `student`, which transformers loads, and the records in
`data/{train,val,test}.jsonl`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.demo.demo_config import QUICK
from experiments.demo.run_demo import Demo
from student_trainer.launching.processes import ended_by_sigterm


def main(output: Path) -> None:
    """Writes the data and models. Keeps models that the folder already has from the same sources and settings.

    Raises:
        DemoError: a training failed; with the end of its log.
    """
    demo = Demo(output, QUICK, seeds=1)
    with ended_by_sigterm():
        models = demo.models()
    for name, model in models.items():
        _link(output / name, model.path.relative_to(output))


def _link(link: Path, target: Path) -> None:
    """Makes a link to a model, or replaces it in one step."""
    fresh = link.with_name(f".{link.name}.link")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
