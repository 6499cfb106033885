"""Where teachers listen: `NAME=HOST:PORT`, on the command line or one a line in a file. Free of torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kvcore.errors import FieldError
from kvcore.files import replace_file
from student_trainer.launching.local_teachers import teacher_names

FLAG = "--teacher_endpoints"


def read_endpoints(given: Sequence[str], models: Sequence[str]) -> dict[str, list[str]]:
    """Endpoints of each model by its teacher's name, in the order of `models`.

    Args:
        given: `NAME=HOST:PORT[,HOST:PORT]` or `@FILE`; a name given again adds replicas.
        models: the teachers. A name is the last part of the model, or the model as it was given.

    Raises:
        FieldError: a line is not of that form, a name is none of the teachers', or a teacher has no endpoint.
    """
    names = teacher_names(models)
    known = {**{name: name for name in names}, **{model: name for name, model in names.items()}}
    found: dict[str, list[str]] = {name: [] for name in names}
    for item, where in _items(given):
        name, separator, addresses = item.partition("=")
        if not separator or not addresses:
            raise FieldError(where, f"expected NAME=HOST:PORT, got '{item}'")
        if name not in known:
            near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
            raise FieldError(where, f"no teacher is named '{name}'; did you mean '{near[0]}'?")
        found[known[name]] += [_address(address.strip(), where) for address in addresses.split(",")]
    for name, addresses in found.items():
        if not addresses:
            raise FieldError(FLAG, f"teacher '{name}' has no endpoint; add {name}=HOST:PORT")
    return found


def write_endpoints(path: Path, endpoints: Mapping[str, Sequence[str]]) -> None:
    """Writes the file that `@FILE` reads; it appears under its name only when complete."""
    lines = [f"{name}={','.join(addresses)}\n" for name, addresses in endpoints.items()]
    replace_file(path, "".join(lines))


def _address(text: str, where: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise FieldError(where, f"expected HOST:PORT, got '{text}'")
    return text


def _items(given: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every NAME=ADDRESSES with where it stands."""
    for item in given:
        if not item.startswith("@"):
            yield item, FLAG
            continue
        path = Path(item[1:])
        if not path.is_file():
            raise FieldError(FLAG, f"{path}: no such file")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip() and not line.startswith("#"):
                yield line.strip(), f"{path}:{number}"
