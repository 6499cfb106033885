"""Tests of text from other programs: nothing in it can steer a terminal or break a line."""

from __future__ import annotations

import pytest

from kvcore.printable import LONGEST, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plan.layers: 9 is above 2", "plan.layers: 9 is above 2"),
        ("\x1b[2J\x1b[31mred", "\\x1b[2J\\x1b[31mred"),
        ("a\r\nERROR b\x00\x9b", "a\\r\\nERROR b\\x00\\x9b"),
        ("\u202eevil", "\\u202eevil"),
        ("老师 é", "老师 é"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(text).isprintable()


def test_the_end_of_a_long_text_is_cut_off() -> None:
    assert printable("x" * 5000) == "x" * LONGEST + "... (5000 characters)"
