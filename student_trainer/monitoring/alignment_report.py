"""The report of a run's alignments: JSON, and a self-contained page with pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcore.files import replace_file, write_json


@dataclass(frozen=True, slots=True)
class AlignmentReport:
    """The alignments of a run: `Aligner.report()` by teacher name, and the steps before they were fitted."""

    teachers: Mapping[str, Mapping[str, Any]]
    step: int = 0

    def write(self, directory: Path) -> list[Path]:
        """Writes alignment.json and alignment.html and returns their paths."""
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / "alignment.json", directory / "alignment.html"]
        write_json(paths[0], {"step": self.step, "teachers": self.teachers})
        replace_file(paths[1], self._page())
        return paths

    def _page(self) -> str:
        # Imported late, because it is slow and needed once per run.
        from student_trainer.monitoring.alignment_page import render_page  # noqa: PLC0415

        return render_page(self.teachers, self.step)
