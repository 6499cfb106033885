"""Tests of the pictures in the documentation: pages reference all of them with alt text, and files are small."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.draw_pictures import pictures

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
_SHOWN = re.compile(r"!\[([^\]]*)\]\(([\w./]+)\)")


@pytest.fixture(scope="module")
def generated() -> dict[str, bytes]:
    return pictures()


def committed() -> list[Path]:
    return [path for path in DOCS.rglob("*") if path.suffix in {".svg", ".png"}]


def references() -> list[tuple[str, str]]:
    """Alt text and path below docs/ of every picture reference in the pages of docs/."""
    return [found for page in DOCS.glob("*.md") for found in _SHOWN.findall(page.read_text(encoding="utf-8"))]


def test_pages_and_readme_reference_every_picture_and_no_missing_one(generated: dict[str, bytes]) -> None:
    kept = {path.relative_to(DOCS).as_posix() for path in committed()}
    readme = set(re.findall(r"docs/([\w./]+\.(?:svg|png))", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert readme <= kept
    assert {path for _, path in references()} | readme == kept | generated.keys()
    assert kept.isdisjoint(generated)


def test_committed_pictures_are_small() -> None:
    for path in committed():
        if path.suffix == ".svg":
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 110, path.name
        assert path.stat().st_size <= 150 * 1024, path.name


def test_every_picture_has_alt_text() -> None:
    assert [name for words, name in references() if len(words.split()) < 5] == []


def test_generated_pictures_are_white_640_pixels_wide_and_undated(generated: dict[str, bytes]) -> None:
    for name, content in generated.items():
        text = content.decode()
        width = re.search(r'<svg[^>]* width="([\d.]+)pt"', text)
        assert width is not None
        assert float(width[1]) * 96 / 72 == pytest.approx(640), name
        assert "fill: #ffffff" in text, name
        assert "<dc:date>" not in text, name
