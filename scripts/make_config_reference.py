"""Writes docs/configuration.md from the configuration models.

Examples:
  python -m scripts.make_config_reference
  python -m scripts.make_config_reference --check
"""

from __future__ import annotations

import argparse
import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic_core import PydanticUndefined

from kvcore.config import StrictModel
from kvcore.plugins import NameTable
from student_trainer.config import TrainConfig
from teacher_server.config import ServeConfig

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

INTRODUCTION = """# Configuration

<!-- GeneratedText by scripts/make_config_reference.py: run `make docs` after changing a model. -->

`kvdistill train --config FILE` reads YAML with the keys below; `--set key.path=value` sets one of them, and a number in
the path indexes a list (`--set teachers.0.weight=2`). `kvdistill serve` takes its keys as flags: `max_batch_tokens` is
`--max-batch-tokens`. Unknown keys, wrong types and values out of range are refused with the key's name before anything
is loaded.
"""


def reference() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## kvdistill train\n", *_sections(TrainConfig, "")]
    parts += ["## kvdistill serve\n", *_sections(ServeConfig, "")]
    return "\n".join(parts)


def _sections(model: type[StrictModel], path: str) -> Iterator[str]:
    """One section per model: what it is, its own keys, then the models that it holds."""
    if path:
        yield f"### `{path}`\n"
    yield inspect.cleandoc(model.__doc__ or "") + "\n"
    rows = ["| key | type | default |", "|---|---|---|"]
    nested: list[tuple[type[StrictModel], str]] = []
    for name, field in model.model_fields.items():
        below = f"{path}.{name}" if path else name
        held = _model_within(field.annotation)
        if held is not None:
            nested.append((held, below + (".N" if get_origin(field.annotation) is tuple else "")))
        # Constraints of the whole field stand beside its annotation, those inside a union within it.
        kind = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        rows.append(f"| `{name}` | {describe(kind)} | {_default(field.get_default(call_default_factory=True))} |")
    yield "\n".join(rows) + "\n"
    for held, below in nested:
        yield from _sections(held, below)


def describe(annotation: Any) -> str:
    """A type in words: choices, limits and what may be left out."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        tables = [part for part in arguments[1:] if isinstance(part, NameTable)]
        kind = f"{describe(Literal[*tables[0].builtin])}, or of a plug-in" if tables else describe(arguments[0])
        limits = [limit for metadata in arguments[1:] for limit in _limits(metadata)]
        return kind + (f", {', '.join(limits)}" if limits else "")
    if origin is Literal:
        return "one of " + ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is tuple:
        count = "" if Ellipsis in arguments else f"{len(arguments)} "
        return f"list of {count}({describe(arguments[0])})"
    if origin is dict:
        return "some keys of the section of that name"
    return {
        "NoneType": "none",
        "str": "text",
        "int": "integer",
        "float": "number",
        "bool": "true or false",
        "Path": "path",
    }.get(annotation.__name__, "mapping, below")


def _limits(metadata: Any) -> Iterator[str]:
    """The limits that one piece of pydantic's metadata sets."""
    for part in (metadata, *getattr(metadata, "metadata", ())):
        for attribute, sign in {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}.items():
            if getattr(part, attribute, None) is not None:
                yield f"{sign} {getattr(part, attribute)}"
        if getattr(part, "min_length", None):
            yield "not empty"
        if getattr(part, "pattern", None) is not None:
            yield "matching `" + part.pattern.replace("|", "\\|") + "`"


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "**required**"
    if value is None:
        return "none"
    if isinstance(value, StrictModel):
        changed = ", ".join(f"{key}: {item}" for key, item in value.model_dump(exclude_defaults=True).items())
        return f"`{{{changed}}}`" if changed else "its defaults"
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    if value == {}:
        return "nothing changed"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _model_within(annotation: Any) -> type[StrictModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, StrictModel):
        return annotation
    found = (_model_within(argument) for argument in get_args(annotation))
    return next((model for model in found if model is not None), None)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the file is fresh; status 1 if not")
    arguments = parser.parse_args()
    page = reference()
    if arguments.check:
        fresh = OUTPUT.is_file() and OUTPUT.read_text(encoding="utf-8") == page
        print(f"{OUTPUT.name}: {'fresh' if fresh else 'stale; run: make docs'}")
        return 0 if fresh else 1
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
