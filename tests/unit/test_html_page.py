"""Tests of the self-contained HTML pages: escaping, inlined images and layout."""

from __future__ import annotations

import base64

from kvcore.monitoring.html_page import charts, figure, heading, page, paragraphs, table

PNG = b"\x89PNG\r\n\x1a\nlight"
SVG = b"<svg>dark</svg>"


def test_text_is_escaped_in_every_part() -> None:
    special = '<b>&"'
    parts = (
        heading(special),
        paragraphs([special]),
        table((special,), [(special,)]),
        figure(special, PNG, caption=special),
    )
    assert "<b>" not in page(special, parts)
    assert page(special, parts).count("&lt;b&gt;&amp;") == 7


def test_images_are_inlined_as_data_urls() -> None:
    shown = figure("curve", PNG, SVG)
    assert f'<img src="data:image/png;base64,{base64.b64encode(PNG).decode()}" alt="curve">' in shown
    assert f'dark)" srcset="data:image/svg+xml;base64,{base64.b64encode(SVG).decode()}">' in shown
    assert "<picture>" not in figure("curve", PNG)


def test_page_has_title_ordered_parts_viewport_and_dark_mode() -> None:
    text = page(
        "Title", [heading("One", 1), charts([figure("a", SVG), figure("b", SVG)]), paragraphs(["bad"], "missed")]
    )
    assert "<title>Title</title>" in text
    assert text.index("<h1>One</h1>") < text.index('alt="a"') < text.index('alt="b"') < text.index('class="missed"')
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert "url(" not in text
