"""What an alignment came to, for people: as JSON, and as one page with pictures that loads nothing from outside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.head_dim_adapter import TENSORS, KVGeometry
from kvcore.files import finite_or_null, replace_file, write_json

if TYPE_CHECKING:
    from align.aligner import Aligner
    from kvcore.types import Tensor


def describe(aligner: Aligner) -> dict[str, Any]:
    """One alignment, ready for JSON: None where nothing was measured."""
    fit, held_out = aligner.rows_2.tolist()
    shuffled_LK = aligner.shuffled_LK if aligner.fits_adapter else aligner.shuffled_LK[:0]
    return {
        "direction": aligner.direction,
        "head_adapter": aligner.head_adapter,
        "layer_strategy": aligner.mapper.strategy,
        "tokens": aligner.tokens,
        "sink_tokens": aligner.sink_tokens,
        "teacher": _geometry(aligner.teacher),
        "student": _geometry(aligner.student),
        "layer_map": _mapping(aligner),
        "cka": _by_tensor(aligner.cka_KST) if aligner.mapper.strategy == "cka" else None,
        "rows": {"fit": fit, "held_out": held_out},
        "coverage": _coverage(aligner.coverage_4),
        "explained_variance": {
            tensor: finite_or_null(aligner.adapter.explained_variance(tensor)) for tensor in TENSORS
        },
        "explained_variance_shuffled": _by_tensor(shuffled_LK.T),
        "min_explained_variance": aligner.min_explained_variance,
        "alpha": {tensor: finite_or_null(aligner.adapter.alpha(tensor)) for tensor in TENSORS},
        "scale": {tensor: finite_or_null(aligner.scale(tensor).tolist()) for tensor in TENSORS},
        "variance": {tensor: finite_or_null(aligner.variance(tensor).tolist()) for tensor in TENSORS},
    }


def _geometry(geometry: KVGeometry) -> dict[str, int]:
    return {"layers": geometry.layers, "heads": geometry.heads, "head_dim": geometry.head_dim}


def _mapping(aligner: Aligner) -> dict[str, list[list[float]]] | None:
    if aligner.needs_layer_pass:
        return None
    if aligner.learned_map is None:
        rows = aligner.mapper.get_mapping()
    else:
        rows = {s: list(enumerate(row)) for s, row in enumerate(aligner.learned_map.weights().tolist())}
    return {str(s): [[t, round(weight, 6)] for t, weight in row if round(weight, 6) > 0] for s, row in rows.items()}


def _coverage(counts_4: Tensor) -> dict[str, dict[str, int]] | None:
    tokens, tokens_paired, slots, slots_paired = counts_4.tolist()
    if tokens == 0:
        return None
    return {
        "student_tokens": {"seen": tokens, "paired": tokens_paired},
        "teacher_slots": {"seen": slots, "paired": slots_paired},
    }


def _by_tensor(x_K: Tensor) -> dict[str, Any]:
    return {tensor: finite_or_null(x.tolist()) for tensor, x in zip(TENSORS, x_K, strict=True)}


@dataclass(frozen=True, slots=True)
class AlignmentReport:
    """The alignments of a run: `Aligner.report()` by the teachers' names."""

    teachers: Mapping[str, Mapping[str, Any]]

    def write(self, directory: Path) -> list[Path]:
        """Writes alignment.json and alignment.html, replacing them, and returns the paths."""
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / "alignment.json", directory / "alignment.html"]
        write_json(paths[0], {"teachers": self.teachers})
        replace_file(paths[1], self._page())
        return paths

    def _page(self) -> str:
        # Slow to import, and needed once in a run.
        from align.report_page import render_page  # noqa: PLC0415

        return render_page(self.teachers)
