"""Name tables: built-in names, names of installed packages, and invalid names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import pytest

from kvcore.config import StrictModel, parse
from kvcore.errors import ConfigError, FieldError
from kvcore.flags import FlagSet
from kvcore.plugins import NameTable

GROUP = "kvdistill.test_shapes"
BUILTIN = {"path": "pathlib:Path", "odd": "fractions:Fraction"}
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a package with entry points on the path, as pip does."""

    def put(package: str, entries: str, module: str = "") -> None:
        metadata = tmp_path / f"{package}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[{GROUP}]\n{entries}\n")
        (tmp_path / f"{package}.py").write_text(module)
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(str(tmp_path))
    yield put
    for name in ("shapes_one", "shapes_two"):
        sys.modules.pop(name, None)


def table() -> NameTable:
    return NameTable("shape", GROUP, BUILTIN)


def test_installed_package_adds_a_name_that_is_imported_by_load(install: Install) -> None:
    install("shapes_one", "mine = shapes_one:MINE", "from pathlib import Path\nMINE = Path('here')")
    names = table()
    assert list(names) == ["path", "odd", "mine"]
    assert names.check("mine") == "mine"
    assert "shapes_one" not in sys.modules
    assert names.load("mine", Path) == Path("here")


def test_error_for_unknown_name_lists_known_names_and_suggests_the_nearest(install: Install) -> None:
    install("shapes_one", "mine = shapes_one:MINE")
    with pytest.raises(ConfigError, match=r"^expected one of path, odd, mine; got 'mein'; did you mean 'mine'\?$"):
        table().check("mein")
    with pytest.raises(ConfigError, match=r"^expected one of path, odd, mine; got 'zzz'$"):
        table().check("zzz")


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        (
            "path = shapes_one:MINE",
            r"the shape 'path' of the package shapes_one \(shapes_one:MINE\) has a built-in name",
        ),
        ("mine = shapes_one:NONE", r"cannot import the shape 'mine' of the package shapes_one"),
        ("mine = shapes_three:MINE", r"cannot import the shape 'mine' .*No module named 'shapes_three'"),
        ("mine = shapes_one:MINE", r"the shape 'mine' .* must be a Path, but is a int"),
    ],
)
def test_error_for_invalid_entry_point_names_its_package(install: Install, entries: str, problem: str) -> None:
    install("shapes_one", entries, "MINE = 3")
    with pytest.raises(ConfigError, match=problem):
        table().load(entries.partition(" ")[0], Path)


def test_two_packages_cannot_add_the_same_name(install: Install) -> None:
    install("shapes_one", "mine = shapes_one:MINE")
    install("shapes_two", "mine = shapes_two:MINE")
    with pytest.raises(ConfigError, match="has the name of another package's; rename the entry point"):
        table().load("mine", Path)


def test_field_accepts_the_names_and_errors_name_the_field(install: Install) -> None:
    install("shapes_one", "mine = shapes_one:MINE")
    names = table()

    class Settings(StrictModel):
        shape: Annotated[str, names] = "path"

    assert parse({"shape": "mine"}, Settings).shape == "mine"
    with pytest.raises(
        FieldError, match=r"^shape: expected one of path, odd, mine; got 'paht'; did you mean 'path'\?$"
    ):
        parse({"shape": "paht"}, Settings)
    with pytest.raises(FieldError, match=r"^shape: Input should be a valid string"):
        parse({"shape": 3}, Settings)


def test_flags_and_help_list_the_names_and_accept_dashes(install: Install) -> None:
    install("shapes_one", "my_own = shapes_one:MINE")
    names = table()

    class Settings(StrictModel):
        shape: Annotated[str, names] = "path"
        other: Annotated[str, names] | None = None

    flags = FlagSet(Settings, "Draw.", "")
    assert flags.help("kvdistill draw").count("path|odd|my_own") == 2
    assert [choices for _, _, choices in flags.completions()][1:] == [["path", "odd", "my_own"]] * 2
    assert flags.read(["--shape", "my-own", "--other", "my-own"], "draw") == Settings(shape="my_own", other="my_own")
    with pytest.raises(
        FieldError, match=r"^--other: expected one of path, odd, my_own; got 'od'; did you mean 'odd'\?$"
    ):
        flags.read(["--other", "od"], "draw")
