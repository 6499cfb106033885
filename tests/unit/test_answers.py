"""Tests of answer extraction from generated text, and of answer comparison."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.answers import (
    extract_brackets,
    extract_choice,
    extract_label,
    extract_math,
    extract_number,
    extract_words,
    same_math,
    same_number,
)
from evaluation.number_text import number_text, parse_number
from kvcore.errors import FieldError

NUMBERS = {
    "1,234": "1234",
    "-3.50": "-3.5",
    "72": "72",
    " 72 apples": "72",
    "#### 1,234": "1234",
    "#### -7": "-7",
    "\\boxed{\\frac{1}{2}}": "0.5",
    "so $\\boxed{-\\frac{3}{4}}$ of it, not 12": "-0.75",
    "\\boxed{12": "12",
    "\\boxed{1{,}234}": "1234",
    "\\boxed{3\\frac{1}{2}}": "3.5",
    "The answer is 18.": "18",
    "The answer is 18 (rounded from 17.6).": "18",
    "The answer is 5 + 3 = 8 apples.": "8",
    "The answer is $1,234.50 in total": "1234.5",
    "The answer is \\$18.": "18",
    "The answer is 10%": "10",
    "The answer is 1/3.": "1/3",
    "The answer is 1 1/2 cups.": "1.5",
    "The answer is ½.": "0.5",
    "The answer is −4": "-4",
    "The answer is -$3.50.": "-3.5",
    "The answer is $-3.50.": "-3.5",
    "The answer is 1.234,56": "1234.56",
    "The answer is 3.2 \\times 10^{4}": "32000",
    "The answer is 2.50e3": "2500",
    "The answer is 3 million": "3000000",
    "The answer is twenty-one.": "21",
    "The answer is one hundred and five.": "105",
    "the answer is: negative 4": "-4",
    "The answer to the question is 9.": "9",
    "The answer is not 5 but 7.": "7",
    "The answer is clear: since 5+3=8 we get 8": "8",
    "The answer is 5. Wait, that is wrong. The answer is 6.": "6",
    "Answer: \\(\\frac{3}{4}\\)": "0.75",
    "**Answer:** 42": "42",
    "**Final Answer**\n\n42": "42",
    "The total is 8. She gives half of it away, so 4 are left.": "4",
    "I think it is 12,345,678": "12345678",
    "x = -5": "-5",
    "10 - 3 = 7": "7",
    "She pays 10 - 3": "3",
    "5 km + 3 km = 8 km": "8",
    "答案是四": "4",
    "答案是四。共有12个": "4",
    "答案：１２３": "123",
    "答案为１，２３４。": "1234",
    "答案为十二个": "12",
    "答案是一百二十三": "123",
    "答案是三点五": "3.5",
    "答案是负三": "-3",
    "答案是三分之二": "2/3",
    "答案是百分之五十": "50",
    "答案是二〇二四": "2024",
    "答案：3.5万元": "35000",
    "答案不是5，而是7": "7",
    "一共是二十三个苹果": "23",
    "答：一共有三十六个": "36",
    "这道题目很难，我想了一个小时也不知道": None,
    "There is no number": None,
    "Nobody knows, not one of them.": None,
    "1/0": None,
    "": None,
}

CHOICES = {
    "The answer is C": "C",
    "The answer is (B).": "B",
    "The answer is B) 5": "B",
    "The answer is option (C): the third": "C",
    "The correct answer is **B**.": "B",
    "The best answer is “C”": "C",
    "Answer: D": "D",
    "C": "C",
    "c": "C",
    "(d)": "D",
    "B. Paris": "B",
    "\\boxed{C}": "C",
    "\\boxed{\\text{(A)}}": "A",
    "$\\boxed{\\mathrm{D}}$": "D",
    "The answer is A because it fits": "A",
    "The answer is not A, it is C": "C",
    "I would go with option D": "D",
    "I think A is a vowel. The answer is D": "D",
    "Based on vitamin C levels, the answer is B": "B",
    "(A) is wrong. (B) is correct. (C) is wrong": "B",
    "A is wrong, B is wrong, so C": "C",
    "Option A is incorrect. Option B is correct.": "B",
    "Let's see. A. No. B. No. The answer: C. 4": "C",
    "答案：C": "C",
    "答案是Ｂ": "B",
    "答案选 B": "B",
    "故选：A": "A",
    "选D": "D",
    "因此选C。": "C",
    "正确答案是D项": "D",
    "The answer is a dog": None,
    "A dog barks at a cat": None,
    "A or B": None,
    "The answer is A or B.": None,
    "Both A and C are right": None,
    "I don't know": None,
    "": None,
}

LABELS = {
    ("Yes, because no one", "Yes No"): "Yes",
    ("So the answer is No.", "Yes No"): "No",
    ("**no**", "Yes No"): "No",
    ("Not today. Yes", "Yes No"): "Yes",
    ("the argument is invalid", "valid invalid"): "invalid",
    ("valid", "valid invalid"): "valid",
    ("not ( True ) and False is False", "True False"): "False",
    ("Nobody knows", "Yes No"): None,
    ("The argument is not valid", "valid invalid"): None,
    ("It is not deductively valid: invalid", "valid invalid"): "invalid",
    ("not True", "True False"): None,
    ("not True is False", "True False"): "False",
}

EXPRESSIONS = {
    "so $\\boxed{\\frac{1}{2}}$.": "\\frac{1}{2}",
    "\\boxed{1} at first, then \\boxed{\\sqrt{2}}": "\\sqrt{2}",
    "thus we get \\boxed 5.": "5",
    "\\boxed{\\text{Monday}}": "\\text{Monday}",
    "The answer is $x^2+1$.": "x^2+1",
    "The answer is 1.5.": "1.5",
    "Final Answer: The final answer is $(1,2)$. I hope it is correct.": "(1,2)",
    "We find \\(x=1\\) and so \\(x+2\\)": "x+2",
    " \\frac{3}{4}": "\\frac{3}{4}",
    "I am lost": "I am lost",
    "": None,
}

EQUAL = [
    ("\\frac12", "\\frac{1}{2}"),
    ("0.5", "\\frac{1}{2}"),
    ("-\\frac{1}{2}", "-0.5"),
    ("\\dfrac{1}{3}", "1/3"),
    ("1,234", "1234"),
    ("(1, 2)", "(1,2)"),
    ("\\text{Monday}", "Monday"),
    ("50\\%", "50"),
    ("2\\sqrt3", "2\\sqrt{3}"),
    ("90^\\circ", "90"),
    ("10\\text{ cm}", "10"),
    ("12 apples", "12"),
    ("60 miles per hour", "60\\text{ mph}"),
    ("4210_5", "4210_{5}"),
    ("x^{2}+1", "x^2+1"),
    ("\\left(3,\\frac{\\pi}{2}\\right)", "(3, \\frac{\\pi}{2})"),
]
DIFFERENT = [
    ("3", "4"),
    ("5 x", "5"),
    ("5x", "5"),
    ("2 or 3", "2"),
    ("x+1", "x-1"),
    ("(1,2)", "(2,1)"),
    ("10", "10.5"),
    ("", "1"),
    ("1", "-1"),
]


def test_there_are_at_least_100_cases() -> None:
    assert len(NUMBERS) + len(CHOICES) + len(LABELS) + len(EXPRESSIONS) >= 100


@pytest.mark.parametrize(("text", "answer"), NUMBERS.items())
def test_number_is_extracted(text: str, answer: str | None) -> None:
    assert extract_number(text) == answer


@pytest.mark.parametrize(("text", "answer"), CHOICES.items())
def test_choice_is_extracted(text: str, answer: str | None) -> None:
    assert extract_choice(text) == answer


@pytest.mark.parametrize(
    ("text", "choices", "answer"),
    [
        ("The answer is Paris", ["Rome", "Paris", "Berlin", "Bonn"], "B"),
        ("Paris", ["Rome", "Paris", "Oslo", "Bonn"], "B"),
        ("It is New York City", ["York", "New York", "Boston", "Rome"], "B"),
        ("Rome or Paris", ["Rome", "Paris", "Oslo", "Bonn"], None),
        ("答案是北京", ["上海", "北京", "天津", "重庆"], "B"),
        ("The answer is -1.5 V", ["1.5 V", "-1.5 V", "3 V", "-3 V"], "B"),
        ("The answer is -1 V", ["1 V", "2 V", "3 V", "4 V"], None),
        ("The answer is 1 V", ["-1 V", "2 V", "3 V", "4 V"], None),
        ("The answer is 1.5", ["5", "10", "20", "40"], None),
        ("x^2+1", ["x^2-1", "2x^2", "x^3", "y"], None),
    ],
)
def test_choice_is_extracted_from_its_text(text: str, choices: list[str], answer: str | None) -> None:
    assert extract_choice(text, choices=choices) == answer


def test_only_letters_of_the_choices_are_extracted() -> None:
    assert extract_choice("The answer is F", "ABCD") is None
    assert extract_choice("The answer is F", "ABCDEF") == "F"


@pytest.mark.parametrize(("text_and_labels", "answer"), LABELS.items())
def test_label_is_extracted(text_and_labels: tuple[str, str], answer: str | None) -> None:
    assert extract_label(text_and_labels[0], text_and_labels[1].split()) == answer


@pytest.mark.parametrize(("text", "answer"), EXPRESSIONS.items())
def test_expression_is_extracted(text: str, answer: str | None) -> None:
    assert extract_math(text) == answer


def test_words_and_brackets_are_extracted() -> None:
    assert extract_words("Sorted.\nSo the answer is apple banana cherry.") == "apple banana cherry"
    assert extract_words("apple, banana") == "apple banana"
    assert extract_words("") is None
    assert extract_brackets("So the answer is ] ] )") == "] ] )"
    assert extract_brackets(" ]]") == "] ]"
    assert extract_brackets("none") is None


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equivalent_expressions_are_equal(one: str, other: str) -> None:
    assert same_math(one, other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_expressions_are_not_equal(one: str, other: str) -> None:
    assert not same_math(one, other)


def test_numbers_are_compared_by_value() -> None:
    assert same_number("18.00", "18")
    assert same_number("1/3", "1/3")
    assert not same_number("0.333", "1/3")
    assert not same_number("1", "1,234")
    with pytest.raises(FieldError, match="not a number"):
        same_number("1", "one")


@given(st.fractions(max_denominator=10**6))
def test_number_text_round_trips(value) -> None:
    text = number_text(value)
    assert parse_number(text) == value
    assert extract_number(f"The answer is {text}.") == text


@given(st.text())
def test_extraction_accepts_any_text(text: str) -> None:
    for read in (extract_number, extract_choice, extract_math, extract_words, extract_brackets):
        read(text)
    extract_label(text, ["Yes", "No"])
