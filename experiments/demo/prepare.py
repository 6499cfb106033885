"""The demo's data and models alone, for servers and a trainer elsewhere: `python -m experiments.demo.prepare FOLDER`.

The folder then holds `teacher_a`, `teacher_b` and `student`, which transformers loads, and the questions in
`data/{train,val,test}.jsonl`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.demo.demo_config import QUICK
from experiments.demo.run_demo import Demo
from student_trainer.launching.processes import ended_by_sigterm


def main(output: Path) -> None:
    """Makes what is missing; models that the folder has already, of the same sources and settings, stay.

    Raises:
        DemoError: a training failed; with the end of its log.
    """
    demo = Demo(output, QUICK, seeds=1)
    with ended_by_sigterm():
        models = demo.models()
    for name, model in models.items():
        _link(output / name, model.path.relative_to(output))


def _link(link: Path, target: Path) -> None:
    """Points a name at a model in one step, so that it never names none."""
    fresh = link.with_name(f".{link.name}.link")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
