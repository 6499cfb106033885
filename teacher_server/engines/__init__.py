"""Teacher engines by name; an engine's libraries are imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from kvcore.errors import FieldError
from kvcore.extras import needs
from teacher_server.config import ServeConfig
from teacher_server.engines.base import TeacherEngine

ENGINES: dict[str, str] = {
    "hf": "teacher_server.engines.hf.hf_engine",
    "vllm": "teacher_server.engines.vllm.vllm_engine",
    "fake": "teacher_server.engines.fake",
}


class EngineModule(Protocol):
    """What the module of an engine offers."""

    def load(self, config: ServeConfig) -> TeacherEngine:
        """Builds the engine, ready to serve."""
        ...


def load_engine(config: ServeConfig) -> TeacherEngine:
    """Loads the teacher that the configuration names.

    Raises:
        FieldError: a field names a model, device or option that cannot be had here.
        UnsupportedModelError: the model's attention is not one whose keys and values can be read exactly.
    """
    if config.engine not in ENGINES:
        raise FieldError("engine", f"unknown engine '{config.engine}'; known: {', '.join(ENGINES)}")
    try:
        module = cast("EngineModule", importlib.import_module(ENGINES[config.engine]))
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise FieldError("engine", f"{needs('vllm', 'vllm')} (docs/teachers.md)") from error
    return module.load(config)
