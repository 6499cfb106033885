"""Names and endpoints of teachers: `NAME=HOST:PORT`, as flags or as lines of a file. Does not import torch."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kvcore.endpoints import check_endpoint
from kvcore.errors import ConfigError, FieldError
from kvcore.files import replace_file

FLAG = "--teacher_endpoints"


def teacher_names(models: Sequence[str]) -> dict[str, str]:
    """Returns the models by teacher name, in order. The name is the last part of the path or hub id.

    Raises:
        ConfigError: no model is given.
        FieldError: a model has no name, or is given twice.
    """
    if not models:
        raise ConfigError("teacher_models: name at least one model")
    named: dict[str, str] = {}
    for model in models:
        if model in named.values():
            raise FieldError("teacher_models", f"'{model}' is given twice")
        base = re.sub(r"[^A-Za-z0-9_.-]+", "_", model.rstrip("/").rpartition("/")[2]).lstrip(".")[:60]
        if not base:
            raise FieldError("teacher_models", f"'{model}' is not a model directory or hub id")
        numbered = (f"{base}.{number}" for number in itertools.count(2))
        named[next(name for name in itertools.chain([base], numbered) if name not in named)] = model
    return named


def read_endpoints(given: Sequence[str], models: Sequence[str]) -> dict[str, list[str]]:
    """Returns the endpoints of each teacher by name, in the order of `models`.

    Args:
        given: `NAME=HOST:PORT[,HOST:PORT]` or `@FILE`; repeating a name adds replicas.
        models: the teachers' models. NAME is the teacher's name or the model as it was given.

    Raises:
        FieldError: an entry does not have that form, a name is unknown, or a teacher has no endpoint.
    """
    names = teacher_names(models)
    known = {**{name: name for name in names}, **{model: name for name, model in names.items()}}
    found: dict[str, list[str]] = {name: [] for name in names}
    for item, where in _entries(given):
        name, separator, addresses = item.partition("=")
        if not separator or not addresses:
            raise FieldError(where, f"expected NAME=HOST:PORT, got '{item}'")
        if name not in known:
            near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
            raise FieldError(where, f"no teacher is named '{name}'; did you mean '{near[0]}'?")
        for address in (_address(text.strip(), where) for text in addresses.split(",")):
            if address in found[known[name]]:
                raise FieldError(where, f"'{address}' is listed twice for teacher '{known[name]}'")
            found[known[name]].append(address)
    for name, addresses in found.items():
        if not addresses:
            raise FieldError(FLAG, f"teacher '{name}' has no endpoint; add {name}=HOST:PORT")
    return found


def write_endpoints(path: Path, endpoints: Mapping[str, Sequence[str]]) -> None:
    """Writes the file that `@FILE` reads, atomically."""
    lines = [f"{name}={','.join(addresses)}\n" for name, addresses in endpoints.items()]
    replace_file(path, "".join(lines))


def _address(text: str, where: str) -> str:
    try:
        return check_endpoint(text)
    except ValueError as error:
        raise FieldError(where, f"{error}, got '{text}'") from error


def _entries(given: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields every NAME=ADDRESSES with its flag, or its file and line."""
    for item in given:
        if not item.startswith("@"):
            yield item, FLAG
            continue
        path = Path(item[1:]).expanduser()
        if not path.is_file():
            raise FieldError(FLAG, f"{path}: no such file")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip() and not line.startswith("#"):
                yield line.strip(), f"{path}:{number}"
