r"""Reads `\boxed{...}` results in LaTeX text."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
# Some texts have \boxed 7.
_BARE = re.compile(r"[^\s$.,{}]+")


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete, non-empty `\boxed{...}` or `\fbox{...}`, with matched braces, or None."""
    for box in reversed(list(_BOX.finditer(text))):
        rest = text[box.end() :]
        bare = _BARE.match(rest) if box[0][-1].isspace() else None
        if content := _in_braces(rest) if rest.startswith("{") else bare and bare[0]:
            return content
    return None


def _in_braces(text: str) -> str | None:
    """The stripped text between a leading brace and its match; None if it is not closed."""
    depth = 0
    for index, character in enumerate(text):
        if character in "{}" and (index == 0 or text[index - 1] != "\\"):
            depth += 1 if character == "{" else -1
        if depth == 0:
            return text[1:index].strip()
    return None
