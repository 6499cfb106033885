"""Text of another program, made safe for logs, terminals and errors."""

from __future__ import annotations

LONGEST = 1000


def printable(text: str) -> str:
    r"""The text in one line: control characters become escapes such as \x1b, and the end of a long text is cut."""
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}... ({len(text)} characters)"
    return "".join(character if character.isprintable() else _escape(character) for character in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
