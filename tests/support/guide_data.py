"""Synthetic questions for the guide's datasets, each in the real schema of its dataset."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write_guide_datasets(directory: Path, per_dataset: int) -> dict[str, Path]:
    """Write `directory`/NAME.jsonl (math23k: .json, concatenated objects) for every dataset, and return the files.

    All questions are different, within a dataset and across datasets.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    for name, make in MAKERS.items():
        indent, ending = (2, ".json") if name == "math23k" else (None, ".jsonl")
        objects = [json.dumps(make(index), ensure_ascii=False, indent=indent) for index in range(per_dataset)]
        paths[name] = directory / (name + ending)
        paths[name].write_text("".join(text + "\n" for text in objects), encoding="utf-8")
    return paths


def gsm8k(index: int) -> Row:
    boxes, pens = index + 3, index % 7 + 4
    packed = boxes * pens
    return {
        "question": f"Ada packs {boxes} boxes with {pens} pens each and gives 2 pens away. How many pens are left?",
        "answer": f"The boxes hold {boxes}*{pens}=<<{boxes}*{pens}={packed}>>{packed} pens.\n"
        f"After giving 2 away {packed}-2=<<{packed}-2={packed - 2}>>{packed - 2} are left.\n#### {packed - 2:,}",
    }


def gsm8k_aug(index: int) -> Row:
    return {
        "question": f"Cid stacks {index + 2} shelves with 6 jars each and breaks 1. How many jars are whole?",
        "steps": [f"<<{index + 2}*6={6 * index + 12}>>", f"<<{6 * index + 12}-1={6 * index + 11}>>"],
        "answer": f"{6 * index + 11:,}",
    }


def gsm8k_aug_nl(index: int) -> Row:
    return {
        "question": f"Dot fills {index + 2} boxes with 8 eggs each and eats 1. How many eggs are left?",
        "steps": [f"The boxes hold {8 * index + 16} eggs.", f"After eating 1, {8 * index + 15} are left."],
        "answer": str(8 * index + 15),
    }


def svamp(index: int) -> Row:
    apples, eaten = index + 9, index % 5 + 2
    body = f"Ben had {apples} apples. He ate {eaten} of them."
    question = "How many apples does Ben have now?"
    return {
        "ID": f"chal-{index + 1}",
        "Body": body,
        "Question": question,
        "Equation": f"( {apples}.0 - {eaten}.0 )",
        "Answer": str(apples - eaten),
        "Type": "Subtraction",
        "question_concat": f"{body} {question}",
    }


def strategyqa(index: int) -> Row:
    year = 1500 + index
    return {
        "qid": f"{index:020x}",
        "term": f"Tower {year}",
        "description": "Building in a made-up town",
        "question": f"Was the tower that was begun in {year} finished before 1600?",
        "answer": year + 20 < 1600,
        "facts": f"The tower was begun in {year}. Building it took 20 years.",
    }


def math23k(index: int) -> Row:
    girls, more = index + 12, index % 6 + 1
    text = f"学校有{girls}名女生，男生比女生多{more}名，一共有多少名学生？"
    return {
        "id": str(index + 1),
        "original_text": text,
        "segmented_text": " ".join(text),
        "equation": f"x={girls}+({girls}+{more})",
        "ans": str(2 * girls + more),
    }


def math(index: int) -> Row:
    value = index + 5
    return {
        "problem": f"What is the value of $\\frac{{{value}}}{{2}} + {value}$?",
        "level": f"Level {index % 5 + 1}",
        "type": "Algebra",
        "solution": f"We have $\\frac{{{value}}}{{2}} + {value} = \\frac{{{value} + {2 * value}}}{{2}}$, "
        f"which is $\\boxed{{\\frac{{{3 * value}}}{{2}}}}$.",
    }


def arc_challenge(index: int) -> Row:
    labels = ["A", "B", "C", "D"]
    right = index % len(labels)
    wrong = ["a wooden spoon", "a glass rod", "a wool sock"]
    return {
        "id": f"Mercury_{7000000 + index}",
        "question": f"In experiment {index + 1}, which object closes the electric circuit?",
        "choices": {"text": [*wrong[:right], "a copper wire", *wrong[right:]], "label": labels},
        "answerKey": labels[right],
    }


def hotpotqa(index: int) -> Row:
    town, river = f"Oldham{index}", f"Arrow{index}"
    titles = [f"Museum of {town}", town, "Windmill"]
    sentences = [
        [f"The Museum of {town} shows clocks.", f" It stands in {town}."],
        [f"{town} is a town.", f" {town} lies on the river {river}."],
        ["A windmill turns wind into motion."],
    ]
    return {
        "id": f"{index:024x}",
        "question": f"On which river lies the town of the Museum of {town}?",
        "answer": river,
        "type": "bridge",
        "level": "easy",
        "supporting_facts": {"title": titles[:2], "sent_id": [1, 1]},
        "context": {"title": titles, "sentences": sentences},
    }


MAKERS: dict[str, Callable[[int], Row]] = {
    "gsm8k": gsm8k,
    "gsm8k_aug": gsm8k_aug,
    "gsm8k_aug_nl": gsm8k_aug_nl,
    "svamp": svamp,
    "strategyqa": strategyqa,
    "math23k": math23k,
    "math": math,
    "arc_challenge": arc_challenge,
    "hotpotqa": hotpotqa,
}
