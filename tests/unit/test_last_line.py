"""Tests of the end of a training command: its last log line, and the log in a file."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from kvcore.config import parse
from kvcore.errors import ConfigError, FieldError
from student_trainer.config import TrainConfig
from student_trainer.monitoring.last_line import last_line
from student_trainer.monitoring.log_file import kept_log
from tests.support.training_parts import train_config

SUMMARY = {"steps": 1500, "best_step": 1200, "val_task_metrics": {"accuracy": 0.935}, "val_ce_loss": 0.35}


def test_last_line_has_the_best_validation_the_model_and_the_next_command() -> None:
    config = train_config(run={"output_dir": "outputs/my run"})
    assert last_line(config, SUMMARY) == (
        "done: best validation: accuracy 93.5%, cross-entropy 0.3500 at step 1,200 of 1,500; model: "
        "'outputs/my run/best_model'; next: kvdistill generate 'outputs/my run/best_model' \"QUESTION\""
    )


def test_last_line_of_several_stages_is_about_the_last_one() -> None:
    tree = train_config(run={"output_dir": "outputs/run"}).model_dump(mode="json")
    config = parse(tree | {"stages": [{"name": "one"}, {"name": "two"}]}, TrainConfig)
    assert "model: outputs/run/two/best_model;" in last_line(config, SUMMARY)


def test_last_line_without_validation_says_so() -> None:
    line = last_line(train_config(), SUMMARY | {"val_task_metrics": {}, "val_ce_loss": None})
    assert line.startswith("done: 1,500 steps without validation; model: ")


def test_log_file_continues_and_ends_with_the_error(tmp_path: Path) -> None:
    logger = logging.getLogger("test")
    with kept_log(tmp_path / "logs"):
        logger.warning("first")
    with pytest.raises(ConfigError), kept_log(tmp_path / "logs"):
        raise ConfigError("data.train: missing")
    logger.warning("after")
    lines = (tmp_path / "logs" / "train.log").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["first", "ConfigError: data.train: missing"]


def test_log_file_that_cannot_be_written_is_an_error_about_the_output_directory(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file", encoding="utf-8")
    with pytest.raises(FieldError, match=r"run.output_dir: cannot write .*logs/train.log"), kept_log(tmp_path / "logs"):
        pytest.fail("it went on")
