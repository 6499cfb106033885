r"""Parses numbers in generated text: 1,234, -3.50, \frac{1}{2}, full-width digits, 四, twenty-one, 3 million."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

# Full-width ASCII and space, the minus sign, spaces within numbers, and curly quotes.
_PLAIN = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {
    0x3000: " ",
    0x2212: "-",
    0x00A0: " ",
    0x202F: " ",
    0x2009: " ",
    0xFFE5: "¥",
    0x2018: "'",
    0x2019: "'",
    0x201C: '"',
    0x201D: '"',
}
_LATEX_NOISE = (
    (re.compile(r"\{,\}|,\\!|\\,(?=\d{3})"), ","),
    (re.compile(r"\\!|\\left|\\right|\*\*|`"), ""),
    (re.compile(r"\\([$%#&_])"), r"\1"),
    (re.compile(r"(?<=\d)[\u2009\u202f\u00a0](?=\d{3}(?!\d))"), ","),
)

_FRACTION_SIGNS = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "万": 10**4, "亿": 10**8}
_NUMBER = re.compile(
    rf"""
    (?P<sign>-\s?|(?:minus|negative)\s+)? (?:US)?[$€£¥]?\s? (?P<sign2>-)?
    (?: (?P<whole>\d+)?\s?\\[dt]?frac\s?(?:\{{\s?(?P<top_sign>-?)(?P<top>\d+)\s?\}}|(?P<top1>\d))
                                 \s?(?:\{{\s?(?P<bottom>\d+)\s?\}}|(?P<bottom1>\d))
      | (?:(?P<whole2>\d+)\s+)?(?P<top2>\d+)\s?/\s?(?P<bottom2>\d+)(?![\d/])
      | (?P<before_sign>\d*)\s?(?P<fraction_sign>[{_FRACTION_SIGNS}])
      | (?P<european>\d{{1,3}}(?:\.\d{{3}})+,\d+)(?!\d)
      | (?P<grouped>\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?)(?![\d]|,\d)
      | (?P<decimal>\d+(?:\.\d+)?|\.\d+)
        (?: [eE](?P<exponent>[-+]?\d{{1,3}})(?!\w)
          | \s?(?:\\times|\u00d7|\*|x)\s?10\s?\^\s?\{{?(?P<power>[-+]?\d{{1,3}})\}}? )?
    )
    (?:\s?(?P<scale>thousand|million|billion|trillion|万|亿))?
    """,
    re.VERBOSE | re.IGNORECASE,
)

_DIGITS = dict(zip("零〇一二两三四五六七八九", (0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9), strict=True))
_UNITS = {"十": 10, "百": 100, "千": 1000}
_INTEGER = "[零〇一二两三四五六七八九十百千万亿]+"
# In words such as 一共 (in total), 一 is not a number.
_CHINESE = re.compile(f"(?!一[共起样般些定直旦切])负?(?:{_INTEGER}分之)?{_INTEGER}(?:点[零〇一二两三四五六七八九]+)?")

_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_WORD_VALUES = {word: value for value, word in enumerate(_ONES)} | {
    word: 10 * value for value, word in enumerate(_TENS, start=2)
}
_WORD = "|".join([*_WORD_VALUES, "hundred", "thousand", "million", "billion"])
_WORDS = re.compile(rf"\b(?:(?:minus|negative)\s+)?(?:{_WORD})(?:(?:\s+and\s+|[\s-]+)(?:{_WORD}))*\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class FoundNumber:
    """A number and its position in the text."""

    value: Fraction
    start: int
    end: int


def plain(text: str) -> str:
    """Converts full-width characters to ASCII and removes LaTeX and Markdown marks within numbers."""
    for pattern, instead in _LATEX_NOISE:
        text = pattern.sub(instead, text)
    return text.translate(_PLAIN)


def find_numbers(text: str) -> list[FoundNumber]:
    """All numbers written with digits, in order; `text` is `plain`. A minus after a number or word is subtraction."""
    found: list[FoundNumber] = []
    for match in _NUMBER.finditer(text):
        value = _value(match)
        if value is None:
            continue
        before = text[: match.start()].rstrip()
        subtracts = bool(before) and (before[-1].isalnum() or before[-1] in ")]}%$")
        signs = (match["sign"], match["sign2"], match["top_sign"])
        negative = sum(bool(sign) for sign in signs) % 2 == 1 and not (subtracts and (match["sign"] or "")[:1] == "-")
        found.append(FoundNumber(-value if negative else value, match.start(), match.end()))
    return found


def parse_number(text: str) -> Fraction | None:
    """The value of a text that is only a number, apart from spaces, a currency or a percent sign; otherwise None."""
    stripped = plain(text).strip().strip("$").rstrip("%.。 ").strip()
    numbers = find_numbers(stripped)
    if len(numbers) == 1 and (numbers[0].start, numbers[0].end) == (0, len(stripped)):
        return numbers[0].value
    return None


def spelt_number(text: str) -> Fraction | None:
    """The first number written in English or Chinese words, or None."""
    found = [(match.start(), value(match[0])) for pattern, value in _SPELT for match in pattern.finditer(text)]
    return min(found)[1] if found else None


def number_text(value: Fraction) -> str:
    """The shortest exact notation of a number: 1234, -3.5, 1/3."""
    denominator = value.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    if denominator != 1:
        return f"{value.numerator}/{value.denominator}"
    places = 0
    while value.denominator > 1 and (value * 10**places).denominator > 1:
        places += 1
    digits = str(abs(int(value * 10**places))).rjust(places + 1, "0")
    text = f"{digits[:-places]}.{digits[-places:]}" if places else digits
    return f"-{text}" if value < 0 else text


def _value(match: re.Match[str]) -> Fraction | None:
    """The unsigned value of a match; None for a division by zero."""
    top, bottom = (
        match["top"] or match["top1"] or match["top2"],
        match["bottom"] or match["bottom1"] or match["bottom2"],
    )
    if top is not None:
        if int(bottom) == 0:
            return None
        value = int(match["whole"] or match["whole2"] or 0) + Fraction(int(top), int(bottom))
    elif match["fraction_sign"]:
        part = Fraction(unicodedata.numeric(match["fraction_sign"])).limit_denominator(10)
        value = int(match["before_sign"] or 0) + part
    elif match["european"]:
        value = Fraction(match["european"].replace(".", "").replace(",", "."))
    elif match["grouped"]:
        value = Fraction(match["grouped"].replace(",", ""))
    else:
        value = Fraction(match["decimal"]) * Fraction(10) ** int(match["exponent"] or match["power"] or 0)
    return value * _SCALES.get((match["scale"] or "").lower(), 1)


def _chinese_value(text: str) -> Fraction:
    sign, text = (-1, text[1:]) if text.startswith("负") else (1, text)
    bottom, divided, top = text.partition("分之")
    if divided:
        # 百分之五十 (50 %) is 50, like 50 %.
        whole = Fraction(1) if bottom == "百" else Fraction(1, _chinese_integer(bottom) or 1)
        return sign * whole * _chinese_value(top)
    integer, _, decimals = text.partition("点")
    value = Fraction(_chinese_integer(integer))
    for place, digit in enumerate(decimals, start=1):
        value += Fraction(_DIGITS[digit], 10**place)
    return sign * value


def _chinese_integer(text: str) -> int:
    if not any(sign in text for sign in "十百千万亿"):
        return int("".join(str(_DIGITS[sign]) for sign in text) or 0)
    total = section = digit = 0
    for sign in text:
        if sign in _DIGITS:
            digit = _DIGITS[sign]
        elif sign in _UNITS:
            section += (digit or 1) * _UNITS[sign]
            digit = 0
        else:
            scale = _SCALES[sign]
            total = (total + section + digit) * scale if scale > 10**4 else total + (section + digit) * scale
            section = digit = 0
    return total + section + digit


def _english_value(text: str) -> Fraction:
    total = section = 0
    words = re.split(r"[\s-]+", text.lower())
    for word in words:
        if word in _WORD_VALUES:
            section += _WORD_VALUES[word]
        elif word == "hundred":
            section = (section or 1) * 100
        elif word in _SCALES:
            total += (section or 1) * _SCALES[word]
            section = 0
    return Fraction(total + section) * (-1 if words[0] in ("minus", "negative") else 1)


_SPELT = ((_CHINESE, _chinese_value), (_WORDS, _english_value))
