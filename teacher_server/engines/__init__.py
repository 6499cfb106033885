"""Teacher engines by name. A new engine is one module with `load(config)` and one entry in `ENGINES`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

from kvcore.errors import FieldError
from kvcore.extras import needs
from teacher_server.config import ServeConfig
from teacher_server.engines.base import TeacherEngine

# Module names: an engine's libraries are imported only when that engine is loaded.
ENGINES: dict[str, str] = {
    "hf": "teacher_server.engines.hf.hf_engine",
    "vllm": "teacher_server.engines.vllm.vllm_engine",
    "fake": "teacher_server.engines.fake",
}


def load_engine(config: ServeConfig) -> TeacherEngine:
    """Load the teacher that the configuration names, ready to serve.

    Raises:
        FieldError: a model, device or option is not available on this host; names the field.
        UnsupportedModelError: the keys and values of the model's attention cannot be read exactly.
    """
    try:
        module = importlib.import_module(ENGINES[config.engine])
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise FieldError("engine", f"{needs('vllm', 'vllm')} (docs/teachers.md)") from error
    return cast("Callable[[ServeConfig], TeacherEngine]", module.load)(config)
