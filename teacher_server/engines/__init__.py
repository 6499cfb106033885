"""Loads the teacher engine that a configuration names. The engines are listed in `teacher_server.config.ENGINES`."""

from __future__ import annotations

from types import FunctionType
from typing import cast

from kvcore.errors import FieldError
from kvcore.extras import needs
from teacher_server.config import ENGINES, ServeConfig
from teacher_server.engines.base import TeacherEngine


def load_engine(config: ServeConfig) -> TeacherEngine:
    """Load the teacher that the configuration names, ready to serve. Imports only the libraries of its engine.

    Raises:
        FieldError: a model, device or option is not available on this host; names the field.
        UnsupportedModelError: the keys and values of the model's attention cannot be read exactly.
    """
    try:
        load = ENGINES.load(config.engine, FunctionType)
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise FieldError("engine", f"{needs('vllm', 'vllm')} (docs/teachers.md)") from error
    return cast("TeacherEngine", load(config))
