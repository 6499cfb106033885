"""Pages that stand on their own."""

from __future__ import annotations

import base64

from kvcore.monitoring.html_page import charts, figure, heading, page, paragraphs, table

PNG = b"\x89PNG\r\n\x1a\nlight"
SVG = b"<svg>dark</svg>"


def test_text_is_escaped_wherever_it_stands() -> None:
    wicked = '<b>&"'
    parts = (heading(wicked), paragraphs([wicked]), table((wicked,), [(wicked,)]), figure(wicked, PNG, caption=wicked))
    assert "<b>" not in page(wicked, parts)
    assert page(wicked, parts).count("&lt;b&gt;&amp;") == 7


def test_pictures_are_part_of_the_page_in_their_own_format() -> None:
    shown = figure("curve", PNG, SVG)
    assert f'<img src="data:image/png;base64,{base64.b64encode(PNG).decode()}" alt="curve">' in shown
    assert f'dark)" srcset="data:image/svg+xml;base64,{base64.b64encode(SVG).decode()}">' in shown
    assert "<picture>" not in figure("curve", PNG)


def test_a_page_has_its_title_its_parts_in_order_and_fits_phones_and_dark_screens() -> None:
    text = page(
        "Title", [heading("One", 1), charts([figure("a", SVG), figure("b", SVG)]), paragraphs(["bad"], "missed")]
    )
    assert "<title>Title</title>" in text
    assert text.index("<h1>One</h1>") < text.index('alt="a"') < text.index('alt="b"') < text.index('class="missed"')
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert "url(" not in text
