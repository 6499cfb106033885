"""The documents' pictures: each is drawn by the script, kept in docs/pictures, and shown by a page of docs/."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.draw_pictures import OUTPUT, PICTURES

pytestmark = pytest.mark.unit

DOCS = Path(__file__).resolve().parents[2] / "docs"
_SHOWN = re.compile(r"!\[([^\]]*)\]\(pictures/([\w.]+)\)")


def shown() -> list[tuple[str, str]]:
    """What is said of each picture, and its file's name, in all pages."""
    return [found for page in DOCS.glob("*.md") for found in _SHOWN.findall(page.read_text(encoding="utf-8"))]


def test_pages_show_every_picture_once_and_no_other() -> None:
    assert sorted(name for _, name in shown()) == sorted(path.name for path in OUTPUT.iterdir())


def test_script_draws_the_pictures_that_are_kept() -> None:
    assert OUTPUT == DOCS / "pictures"
    assert sorted(f"{name}.svg" for name in PICTURES) == sorted(path.name for path in OUTPUT.glob("*.svg"))


def test_every_picture_is_described_for_those_who_cannot_see_it() -> None:
    assert [name for words, name in shown() if len(words.split()) < 5] == []


def test_pictures_are_white_640_pixels_wide_and_undated() -> None:
    for path in OUTPUT.glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        width = re.search(r'<svg[^>]* width="([\d.]+)pt"', text)
        assert width is not None
        assert float(width[1]) * 96 / 72 == pytest.approx(640), path.name
        assert "fill: #ffffff" in text, path.name
        assert "<dc:date>" not in text, path.name
