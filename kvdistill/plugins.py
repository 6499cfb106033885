"""The types for packages that add implementations through entry points, as docs/python.md describes."""

from __future__ import annotations

from data.families.base import Family, Question, RowDroppedError
from kvcore.tensors.codec import Codec
from kvcore.tensors.selectors.base import Candidates, TokenSelector
from student_trainer.model.losses import KVLoss, per_slot
from teacher_server.config import ServeConfig
from teacher_server.engines.base import TeacherEngine

__all__ = [
    "Candidates",
    "Codec",
    "Family",
    "KVLoss",
    "Question",
    "RowDroppedError",
    "ServeConfig",
    "TeacherEngine",
    "TokenSelector",
    "per_slot",
]
