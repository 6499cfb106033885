"""The public Python API: read keys and values from teachers, load and train students.

Names are imported at first use, so `import kvdistill` is fast and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from align.aligner import Aligner
    from align.head_dim_adapter import HeadDimAdapter, KVGeometry
    from align.layer_map import LayerMapper
    from align.rope_scale import RoPEScaler
    from align.time_align import TimeAligner
    from align.tokenizer_align import TokenizerAligner
    from fuse.fuse_kv import fuse
    from fuse.router import Router
    from kvcore.errors import (
        ConfigError,
        FieldError,
        KVDistillError,
        NonFiniteError,
        ProtocolError,
        StoreError,
        TeacherError,
        TeacherMismatchError,
        TeacherRefusedError,
        TeacherUnavailableError,
        UnsupportedModelError,
    )
    from kvcore.plan import CodecSpec, KVPlan, SamplingParams, Selection
    from kvcore.types import Sample, Span, TeacherInfo
    from kvcore.wire.completion import Completion
    from kvdistill.calibration import Calibration, calibrate
    from kvdistill.client import TeacherClient, TeacherKV
    from kvdistill.student import Student, load_student
    from kvdistill.training import TrainResult, load_config, train
    from student_trainer.config import TrainConfig

    __version__: str

__all__ = [
    "Aligner",
    "Calibration",
    "CodecSpec",
    "Completion",
    "ConfigError",
    "FieldError",
    "HeadDimAdapter",
    "KVDistillError",
    "KVGeometry",
    "KVPlan",
    "LayerMapper",
    "NonFiniteError",
    "ProtocolError",
    "RoPEScaler",
    "Router",
    "Sample",
    "SamplingParams",
    "Selection",
    "Span",
    "StoreError",
    "Student",
    "TeacherClient",
    "TeacherError",
    "TeacherInfo",
    "TeacherKV",
    "TeacherMismatchError",
    "TeacherRefusedError",
    "TeacherUnavailableError",
    "TimeAligner",
    "TokenizerAligner",
    "TrainConfig",
    "TrainResult",
    "UnsupportedModelError",
    "__version__",
    "calibrate",
    "fuse",
    "load_config",
    "load_student",
    "train",
]

_MODULES = {
    "align.aligner": ("Aligner",),
    "align.head_dim_adapter": ("HeadDimAdapter", "KVGeometry"),
    "align.layer_map": ("LayerMapper",),
    "align.rope_scale": ("RoPEScaler",),
    "align.time_align": ("TimeAligner",),
    "align.tokenizer_align": ("TokenizerAligner",),
    "fuse.fuse_kv": ("fuse",),
    "fuse.router": ("Router",),
    "kvcore.errors": tuple(name for name in __all__ if name.endswith("Error")),
    "kvcore.plan": ("CodecSpec", "KVPlan", "SamplingParams", "Selection"),
    "kvcore.types": ("Sample", "Span", "TeacherInfo"),
    "kvcore.wire.completion": ("Completion",),
    "kvdistill.calibration": ("Calibration", "calibrate"),
    "kvdistill.client": ("TeacherClient", "TeacherKV"),
    "kvdistill.student": ("Student", "load_student"),
    "kvdistill.training": ("TrainResult", "load_config", "train"),
    "kvdistill.version": ("__version__",),
    "student_trainer.config": ("TrainConfig",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


if not TYPE_CHECKING:  # With this function, type checkers would accept any name.

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'kvdistill' has no attribute '{name}'")
        from kvdistill.own_packages import shadowed  # noqa: PLC0415 - only needed here

        if problem := shadowed():
            raise ImportError(problem)
        found = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
