"""The file that marks a finished run. The same command recognises the run by it, even without a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvcore.files import write_json
from student_trainer.loop.checkpoint import Checkpoint, check_same_run

FINISHED, SUMMARY = "finished.json", "summary.json"


def finish(output_dir: Path, summary: dict[str, Any], identity: dict[str, Any]) -> None:
    """Writes the summary of a run, then the mark that it is finished, with its settings, teachers and data."""
    write_json(output_dir / SUMMARY, summary)
    write_json(output_dir / FINISHED, {"identity": identity})


def is_finished(output_dir: Path) -> bool:
    """Whether the directory holds a finished run."""
    return (output_dir / FINISHED).is_file()


def finished_summary(output_dir: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The summary of a finished run.

    Raises:
        ConfigError: the run had other settings, teachers or data.
    """
    mark = output_dir / FINISHED
    check_same_run(Checkpoint(mark, json.loads(mark.read_text(encoding="utf-8"))), identity)
    return json.loads((output_dir / SUMMARY).read_text(encoding="utf-8"))


def forget(output_dir: Path) -> None:
    """Removes the mark, for a run that starts over."""
    (output_dir / FINISHED).unlink(missing_ok=True)
