"""Extracts the final answer from generated text, and compares answers.

An answer is looked for in the last box, then after the last "the answer is", then in the whole text. A text with no
answer or with two answers is wrong; no answer is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lm_eval.tasks.hendrycks_math.utils import is_equiv

from data.latex import last_boxed
from evaluation.number_text import find_numbers, number_text, parse_number, plain, spelt_number
from kvcore.errors import FieldError

_PHRASE = re.compile(
    r"""
    \#{4}
    | \b answers? \b (?:\s+to\b[^.\n:]{0,80}?)? \s*
      (?: (?:is|was|are|equals|(?:would|should|must|will)\s+be)\b | [:=] ){1,2}
    | (?:答案|答) \s* (?:应该?|应当)? \s* (?:是|为|等于|选|[:=]){1,2}
    """,
    re.VERBOSE | re.IGNORECASE,
)
_CHOICE_PHRASE = re.compile(
    _PHRASE.pattern
    + r"""
    | \b(?:choose|pick|select|go\s+with|option|choice)\b \s*:?
    | (?:正确)?(?:选项|选择) \s* (?:是|为|应为|[:])* | (?:故|应|应该|因此|所以|我)?选 \s* :?
    """,
    re.VERBOSE | re.IGNORECASE,
)
# A full stop ends a sentence; a decimal point does not.
_SENTENCE_END = re.compile(r"[.!?;](?=\s|$)|。")
_NEGATED = re.compile(
    r"\b(?:not|isn't|rather\s+than)\s+(?:option\s+|choice\s+)?\S+(?:\s+but\b)?|不是\S?|而非\S?", re.IGNORECASE
)
# H_{2} equals H_2.
_ONE_IN_BRACES = re.compile(r"([_^])\{(\w)\}")
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|rm)\s*\{([^{}]*)\}")
_UNITS = re.compile(r"(?<=[\d}])\s+[A-Za-z]{2,}(?:[\s/][A-Za-z]+)*\.?$")
_OPENERS = r"\s:*_\"'(\[【{{<$"
# A number with its sign and decimals is one word: -1 is not 1, and 1.5 is not 5.
_WORD = re.compile(r"(?:(?<![\w)\]])-(?=\d))?[^\W_]+(?:(?<=\d)[.,]\d+)*|[-+*/^<>=](?=\s?[\d(\\])")
_CHINESE_CHARACTER = re.compile(r"[\u4e00-\u9fff]")
_INLINE_MATH = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


def extract_number(text: str) -> str | None:
    """The number that a text gives as its answer, in its shortest form (`1234`, `-3.5`, `1/3`), or None."""
    text = plain(text)
    for candidate in _candidates(text, _PHRASE):
        tail = candidate.rpartition("=")[2] if "=" in candidate else candidate
        for part in (tail, candidate):
            found = find_numbers(part)
            if found:
                return number_text(found[0].value)
            spelt = spelt_number(part)
            if spelt is not None:
                return number_text(spelt)
    found = find_numbers(text)
    if found:
        return number_text(found[-1].value)
    spelt = spelt_number(text) if _is_brief(text) else None
    return None if spelt is None else number_text(spelt)


def extract_choice(text: str, letters: str = "ABCD", choices: Sequence[str] = ()) -> str | None:
    """The letter of the choice that a text gives as its answer, or None if it names none or several.

    Args:
        text: the generated text.
        letters: the letters of the choices, in upper case.
        choices: the text of each choice, for answers that repeat a choice instead of its letter.
    """
    text = plain(text)
    for candidate in _candidates(text, _CHOICE_PHRASE):
        if _names_several(candidate, letters):
            return None
        letter = _leading_letter(candidate, letters) or _one_choice(candidate, letters, choices)
        letter = letter or _letter_within(candidate, letters)
        if letter:
            return letter
    right = re.findall(rf"\(?\b([{letters}])\b\)?\s+is\s+(?:the\s+)?(?:correct|right|best|true)\b", text)
    if right:
        return right[-1]
    if _names_several(text, letters):
        return None
    opening = _leading_letter(text, letters) if re.match(r"[^A-Za-z]*[A-Za-z]\s+(?:is|was)\b", text) is None else None
    return opening or _one_choice(text, letters, choices) or _last_letter(text, letters)


def extract_label(text: str, labels: Sequence[str]) -> str | None:
    """The label (such as Yes or No) that a text gives as its answer, spelt as in `labels`, or None."""
    text = plain(text)
    pattern = re.compile(r"\b(?:" + "|".join(map(re.escape, labels)) + r")\b", re.IGNORECASE)
    spelt = {label.lower(): label for label in labels}
    candidates = list(_candidates(text, _PHRASE))
    text = re.sub(rf"\bnot\s+(?:\w+ly\s+)?(?:{pattern.pattern})", " ", text, flags=re.IGNORECASE)
    for candidate in (*candidates, text):
        leading = pattern.match(re.sub(rf"^[{_OPENERS}]+", "", candidate))
        label = leading or (None if candidate is text else pattern.search(candidate))
        if label:
            return spelt[label[0].lower()]
    found = pattern.findall(text)
    return spelt[found[-1].lower()] if found else None


def extract_math(text: str) -> str | None:
    """The expression that a text gives as its answer, unchanged, or None."""
    text = plain(text)
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip() or None
    for candidate in _after(text, _PHRASE):
        inline = _INLINE_MATH.search(candidate)
        if inline:
            return next(group for group in inline.groups() if group).strip()
        if candidate.strip(" $"):
            return candidate.strip(" $:")
    inline = list(_INLINE_MATH.finditer(text))
    if inline:
        return next(group for group in inline[-1].groups() if group).strip()
    lines = [line.strip(" .。") for line in text.splitlines() if line.strip(" .。")]
    if len(lines) == 1 and len(lines[0].split()) <= 6:
        return lines[0]
    return extract_number(text)


def extract_words(text: str) -> str | None:
    """The list of words at the end of a text, separated by single spaces, or None."""
    text = plain(text)
    lines = [line for line in text.splitlines() if line.strip()]
    found = next(_candidates(text, _PHRASE), lines[-1] if lines else "")
    return " ".join(re.findall(r"[^\s,;、]+", found.rstrip(" ."))) or None


def extract_brackets(text: str) -> str | None:
    """The brackets at the end of a text, separated by single spaces, or None."""
    text = plain(text)
    runs = re.findall(r"[\[\](){}<>](?:\s*[\[\](){}<>])*", next(_after(text, _PHRASE), text))
    return " ".join(re.sub(r"\s", "", runs[-1])) if runs else None


def same_number(answer: str, target: str) -> bool:
    """Whether two texts denote the same number.

    Raises:
        FieldError: the target is not a number.
    """
    wanted = parse_number(target)
    if wanted is None:
        raise FieldError("answer", f"the reference '{target}' is not a number")
    return parse_number(answer) == wanted


def same_math(answer: str, target: str) -> bool:
    """Whether two expressions are equal: as numbers without units, or as text by lm-eval's rules for MATH."""
    unwrapped, wanted = (
        _ONE_IN_BRACES.sub(r"\1\2", _WRAPPED.sub(r"\1", plain(text))).strip() for text in (answer, target)
    )
    values = [parse_number(_UNITS.sub("", text)) for text in (unwrapped, wanted)]
    if None not in values:
        return values[0] == values[1]
    return bool(is_equiv(unwrapped.rstrip("."), wanted.rstrip(".")))


def _is_brief(text: str) -> bool:
    """Whether a text is so short that a spelt-out number in it is its answer."""
    return len(text.split()) <= 3 and len(_CHINESE_CHARACTER.findall(text)) <= 10


def _candidates(text: str, phrase: re.Pattern[str]) -> Iterator[str]:
    """Parts of the text that may hold the answer: the last box, then the text after each phrase, last phrase first."""
    boxed = last_boxed(text)
    if boxed is not None:
        yield _WRAPPED.sub(r"\1", boxed)
    yield from _after(text, phrase)


def _after(text: str, phrase: re.Pattern[str]) -> Iterator[str]:
    """The text after each phrase up to the end of its sentence, last phrase first, without negated answers."""
    for match in reversed(list(phrase.finditer(text))):
        following = text[match.end() :].lstrip(" \t:*_\n")
        line = following.partition("\n")[0]
        end = _SENTENCE_END.search(line)
        sentence = line[: end.start()] if end and end.start() > 0 else line
        kept = _NEGATED.sub(" ", sentence)
        yield _WRAPPED.sub(r"\1", kept) if phrase is not _PHRASE else kept


def _leading_letter(text: str, letters: str) -> str | None:
    """The letter at the start of a text."""
    opened = re.match(rf"[{_OPENERS}]*(?:(?:option|choice|letter|选项|选)[{_OPENERS}]*)?", text, re.IGNORECASE)
    rest = text[opened.end() if opened else 0 :]
    small = re.match(rf"([{letters.lower()}])\s*[).\]}}]*\s*$", rest)
    if small:
        return small[1].upper()
    match = re.match(rf"([{letters}])(?![A-Za-z0-9'])", rest)
    if not match or (match[1] in "AI" and _is_article(rest[1:])):
        return None
    return match[1]


def _is_article(rest: str) -> bool:
    """Whether A or I starts a sentence ("A dog") instead of naming a choice ("A because ...")."""
    word = re.match(r"\s+([a-z]+)", rest)
    return bool(word) and word[1] not in ("because", "since", "as", "and", "or", "which", "due", "based")


def _letter_within(text: str, letters: str) -> str | None:
    """The first letter in brackets, or else the only isolated one."""
    bracketed = re.findall(rf"[(\[]([{letters}])[)\]]", text)
    return bracketed[0] if bracketed else _single(_isolated(text, letters))


def _last_letter(text: str, letters: str) -> str | None:
    """The last letter in brackets, or else the only isolated one in the last line."""
    bracketed = re.findall(rf"[(\[]([{letters}])[)\]]", text)
    if bracketed:
        return bracketed[-1]
    lines = [line for line in text.splitlines() if line.strip()]
    concluded = (
        re.split(r"\b(?:so|therefore|thus|hence)\b|因此|所以", lines[-1], flags=re.IGNORECASE) if lines else [""]
    )
    return _single(_isolated(concluded[-1], letters))


def _isolated(text: str, letters: str) -> list[str]:
    """All isolated letters, except articles and pronouns."""
    matches = re.finditer(rf"(?<![A-Za-z0-9'])([{letters}])(?![A-Za-z0-9'])", text)
    return [match[1] for match in matches if not (match[1] in "AI" and _is_article(text[match.end() :]))]


def _single(letters: list[str]) -> str | None:
    return letters[0] if len(set(letters)) == 1 else None


def _names_several(text: str, letters: str) -> bool:
    """Whether a text starts with two letters: "A or B", "both (A) and (C)"."""
    one = rf"[(\[]?([{letters}])[)\]]?"
    match = re.match(
        rf"[{_OPENERS}]*(?:both\s+|either\s+)?{one}\s*(?:or|and|/|,|&|或|和|与|、)\s*{one}(?![A-Za-z0-9])", text
    )
    return bool(match) and match[1] != match[2]


def _one_choice(text: str, letters: str, choices: Sequence[str]) -> str | None:
    """The letter of the only choice whose words are in the text. Choices within another such choice are ignored."""
    words = _folded(text)
    held = [index for index, choice in enumerate(choices) if _folded(choice).strip() and _folded(choice) in words]
    outer = [
        index
        for index in held
        if not any(other != index and _folded(choices[index]) in _folded(choices[other]) for other in held)
    ]
    return letters[outer[0]] if len(outer) == 1 else None


def _folded(text: str) -> str:
    words = _WORD.findall(plain(text).casefold())
    return f" {' '.join(words)} "
