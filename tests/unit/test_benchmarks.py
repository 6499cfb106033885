"""Tests of the benchmarks: prompts, scores, references, local copies and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from lm_eval.tasks import TaskManager

from data.families.base import Question
from data.prompts import prompt_of
from evaluation import scoring, suite
from evaluation.config import BENCHMARKS, WORD_PROBLEMS
from evaluation.scoring import NO_ANSWER
from evaluation.suite import Benchmark, load_benchmarks
from kvcore.errors import ConfigError, FieldError
from tests.support import benchmark_data
from tests.support.benchmark_data import BBH_TARGETS, write_benchmarks

QUESTIONS = 3


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("copies")
    write_benchmarks(directory, QUESTIONS)
    return directory


@pytest.fixture(scope="module")
def benchmarks(copies: Path) -> dict[str, Benchmark]:
    return {each.name: each for each in load_benchmarks((*BENCHMARKS, *WORD_PROBLEMS), copies)}


def ask(benchmark: Benchmark, task: str | None = None) -> tuple[Any, dict[str, Any], str]:
    """Returns a task, its second question and the prompt."""
    chosen = benchmark.tasks[task] if task else next(iter(benchmark.tasks.values()))
    doc = chosen.eval_docs[1]
    return chosen, doc, str(chosen.fewshot_context(doc, 0))


def score(task: Any, doc: dict[str, Any], text: str) -> float:
    """Scores a text with the filters and metric of lm-eval."""
    (pipeline,) = task._filters
    texts = [[text]]
    for step in pipeline.filters:
        texts = step().apply(texts, [doc])
    return task.process_results(doc, list(texts))["exact_match"]


def test_all_benchmarks_and_subjects_are_loaded(benchmarks: dict[str, Benchmark]) -> None:
    assert tuple(benchmarks) == (*BENCHMARKS, *WORD_PROBLEMS)
    counts = {name: len(benchmark.tasks) for name, benchmark in benchmarks.items()}
    several = {"bbh": 27, "cmmlu_subset": 12, "ceval_subset": 12}
    assert counts == dict.fromkeys(benchmarks, 1) | several
    assert benchmarks["bbh"].count(None) == 27 * QUESTIONS
    assert benchmarks["bbh"].count(2) == 27 * 2
    assert {name for name, benchmark in benchmarks.items() if benchmark.metric == "acc"} == {
        "truthfulqa",
        "cmmlu_subset",
        "ceval_subset",
    }


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("gsm8k_test", "1200 + 36 = 1236. The answer is 1,236.", "The answer is 1."),
        ("gsm8k_test", " 1200+35 is 1235, and one more.\n#### 1236", "#### 1235"),
        ("math500", "so we get $\\boxed{1.5}$", "\\boxed{\\frac{2}{3}}"),
        ("math500", " \\dfrac{3}{2}", "3"),
        ("gsm_hard", "The answer is -4000001.5", "The answer is 4000001.5"),
        ("multiarith", "It is 7 - 2 = 5", "7"),
    ],
)
def test_score_depends_on_the_extracted_answer(
    benchmarks: dict[str, Benchmark], name: str, right: str, wrong: str
) -> None:
    task, doc, _ = ask(benchmarks[name])
    assert score(task, doc, right) == 1.0
    assert score(task, doc, wrong) == 0.0
    assert score(task, doc, "I cannot say.") == 0.0


def test_answers_of_every_bbh_subject_are_extracted(benchmarks: dict[str, Benchmark]) -> None:
    for name in benchmarks["bbh"].tasks:
        task, doc, _ = ask(benchmarks["bbh"], name)
        target = BBH_TARGETS.get(name.removeprefix("bbh::"), "(B)")
        for text in (f" {target}", f"Let us see. So the answer is {target}.", target.replace("(B)", "B")):
            assert score(task, doc, text) == 1.0, (name, text)
        assert score(task, doc, "So the answer is nothing") == 0.0, name


def test_gpqa_option_order_is_deterministic(benchmarks: dict[str, Benchmark], copies: Path) -> None:
    (again,) = load_benchmarks(["gpqa"], copies)
    task, doc, prompt = ask(benchmarks["gpqa"])
    assert ask(again)[2] == prompt
    assert doc["choices"]["ABCD".index(doc["gold"])] == "1 joules"
    assert score(task, doc, f"The answer is ({doc['gold']})") == 1.0
    assert score(task, doc, "I think it is 1 joules") == 1.0
    assert score(task, doc, "The answer is A or B.") == 0.0


def test_prompts_equal_training_prompts(benchmarks: dict[str, Benchmark]) -> None:
    def training_prompt(stem: str, language: str, options: str = "", *, direct: bool = False) -> str:
        question = Question(stem, "", "x", options=options)
        return prompt_of(question, "direct" if direct else "cot", language)

    _, doc, prompt = ask(benchmarks["gsm8k_test"])
    assert prompt == training_prompt(doc["question"], "en")
    _, doc, prompt = ask(benchmarks["math500"])
    assert prompt == training_prompt(doc["problem"], "en")
    for name, column in (("gsm_hard", "input"), ("multiarith", "question")):
        _, doc, prompt = ask(benchmarks[name])
        assert prompt == training_prompt(doc[column].strip(), "en")
    _, doc, prompt = ask(benchmarks["bbh"], "bbh::navigate")
    assert prompt == training_prompt(doc["input"], "en")
    _, doc, prompt = ask(benchmarks["gpqa"])
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", doc["choices"], strict=True))
    assert prompt == training_prompt(doc["question"], "en", options)
    for name, column in (("cmmlu_subset", "Question"), ("ceval_subset", "question")):
        task, doc, prompt = ask(benchmarks[name])
        options = "\n".join(f"{letter}. {doc[letter]}" for letter in "ABCD")
        # Choices are scored by the likelihood of their letter, so the prompt asks for the result only.
        assert prompt == training_prompt(doc[column], "zh", options, direct=True)
        assert task.doc_to_choice(doc) == list("ABCD")
        assert task.doc_to_target(doc) == 1


def test_truthfulqa_keeps_its_few_shot_questions(benchmarks: dict[str, Benchmark]) -> None:
    task, doc, prompt = ask(benchmarks["truthfulqa"])
    assert prompt.count("Q: ") == 7
    assert prompt.endswith(f"Q: {doc['question']}\nA:")
    assert task.doc_to_target(doc) == 0


@pytest.mark.parametrize("form", ["json", "parquet", "directory of a split", "parquet in a directory", "saved"])
def test_local_copy_may_have_any_supported_format(form: str, copies: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (copies / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()]
    table = Dataset.from_list(rows)
    place = tmp_path / "gsm8k_test"
    match form:
        case "json":
            (tmp_path / "gsm8k_test.json").write_text(json.dumps(rows), encoding="utf-8")
        case "parquet":
            table.to_parquet(tmp_path / "gsm8k_test.parquet")
        case "directory of a split":
            place.mkdir()
            shutil.copy(copies / "gsm8k_test.jsonl", place / "test.jsonl")
            (place / "train.jsonl").write_text('{"question": "other", "answer": "#### 1"}\n', encoding="utf-8")
        case "parquet in a directory":
            place.mkdir()
            table.to_parquet(place / "test-00000-of-00001.parquet")
        case _:
            table.save_to_disk(place)
    (benchmark,) = load_benchmarks(["gsm8k_test"], tmp_path)
    docs: Any = benchmark.tasks["gsm8k_test"].eval_docs
    assert [doc["question"] for doc in docs] == [row["question"] for row in rows]


def test_all_missing_datasets_are_listed_together(copies: Path, tmp_path: Path) -> None:
    for name in ("gsm8k_test.jsonl", "truthfulqa.jsonl"):
        shutil.copy(copies / name, tmp_path)
    (tmp_path / "math500.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n', encoding="utf-8")
    (tmp_path / "bbh").mkdir()
    with pytest.raises(ConfigError) as caught:
        load_benchmarks(["gsm8k_test", "math500", "gpqa", "bbh"], tmp_path)
    message = str(caught.value)
    assert "3 of 4 datasets cannot be evaluated, so none was" in message
    assert "math500: " in message
    assert "has no column problem; it has question, answer" in message
    assert "gpqa: " in message
    assert "Idavidrein/gpqa" in message
    assert "--data_dir" in message
    assert "bbh/boolean_expressions: " in message
    assert "gsm8k_test: " not in message


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("gsm_hard", {"input": "How many?", "code": "", "target": "none"}, "the answer of .* is not a number: 'none'"),
        ("gsm_hard", {"input": "How many?", "code": "", "answer": 4}, "has no column target; it has input, code, ans"),
        ("multiarith", {"question": "How many?", "final_ans": "a"}, "the answer of 'How many.' is not a number: 'a'"),
        ("multiarith", {"question": "How many?", "answer": "4"}, "has no column final_ans; it has question, answer"),
    ],
)
def test_word_problems_with_other_columns_or_answers_are_refused(
    name: str, row: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{name}: .*{problem}"):
        load_benchmarks([name], tmp_path)


def test_non_numeric_reference_fails_at_load(tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "Two and two make four."}
    (tmp_path / "gsm8k_test.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"gsm8k_test: the answer of 'How many\?' is not a number: 'Two and"):
        load_benchmarks(["gsm8k_test"], tmp_path)


def test_empty_copy_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gsm8k_test.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match="gsm8k_test"):
        load_benchmarks(["gsm8k_test"], tmp_path)


def test_names_are_checked_before_datasets_are_read(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="is given twice"):
        load_benchmarks(["gpqa", "gpqa"])
    with pytest.raises(FieldError, match="there is no directory"):
        load_benchmarks(["gpqa"], tmp_path / "missing")


def test_unknown_benchmark_error_suggests_nearest_name(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Listing lm-eval's own tasks takes half a minute.
    monkeypatch.setattr(suite, "TaskManager", lambda **given: TaskManager(**{**given, "include_defaults": False}))
    with pytest.raises(FieldError, match="unknown dataset 'gsm8k_tset'; did you mean 'gsm8k_test'"):
        load_benchmarks(["gpqa", "gsm8k_tset"], copies)


def test_user_tasks_are_loaded_from_tasks_dir(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(OWN_TASK.format(path=tmp_path / "own.jsonl"), encoding="utf-8")
    (tmp_path / "own.jsonl").write_text('{"q": "1+1=", "a": "2"}\n', encoding="utf-8")
    (benchmark,) = load_benchmarks(["own"], tasks_dir=tmp_path)
    assert (benchmark.metric, benchmark.filter) == ("exact_match", "none")
    assert benchmark.count(None) == 1


def test_metric_without_mean_is_refused(tmp_path: Path) -> None:
    text = OWN_TASK.replace("generate_until", "loglikelihood_rolling").replace("exact_match", "word_perplexity")
    text = text.replace("aggregation: mean", "aggregation: weighted_perplexity")
    (tmp_path / "own.yaml").write_text(text.format(path=tmp_path / "own.jsonl"), encoding="utf-8")
    (tmp_path / "own.jsonl").write_text('{"q": "1+1=", "a": "2"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="'word_perplexity' is not a mean"):
        load_benchmarks(["own"], tasks_dir=tmp_path)


def test_answer_length_is_limited_by_context(copies: Path) -> None:
    (benchmark,) = load_benchmarks(["gsm8k_test"], copies)

    class Short:
        max_length = 300

    task = benchmark.tasks["gsm8k_test"]
    with pytest.raises(FieldError, match="answers of up to 512 tokens, but the model's context has 300"):
        benchmark.limit_answers(None, Short())
    benchmark.limit_answers(20, Short())
    assert task.config.generation_kwargs["max_gen_toks"] == 20
    assert task.config.generation_kwargs["until"] == ["Question:"]


def test_missing_answer_never_scores() -> None:
    assert scoring.score({"gold": NO_ANSWER}, [NO_ANSWER]) == {"exact_match": 0.0}
    assert benchmark_data.MAKERS.keys() | benchmark_data.SUBJECT_MAKERS.keys() == {*BENCHMARKS, *WORD_PROBLEMS}


OWN_TASK = """
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
