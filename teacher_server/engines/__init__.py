"""Loading the teacher engine that a configuration names."""

from __future__ import annotations

from types import FunctionType
from typing import cast

from kvcore.errors import FieldError
from kvcore.extras import needs
from teacher_server.config import ENGINES, ServeConfig
from teacher_server.engines.base import TeacherEngine


def load_engine(config: ServeConfig) -> TeacherEngine:
    """Loads the teacher that the configuration names. An engine's libraries are imported only here.

    Raises:
        FieldError: a field names a model, device or option that cannot be had here.
        UnsupportedModelError: the model's attention is not one whose keys and values can be read exactly.
    """
    try:
        load = ENGINES.load(config.engine, FunctionType)
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise FieldError("engine", f"{needs('vllm', 'vllm')} (docs/vllm.md)") from error
    return cast("TeacherEngine", load(config))
