"""`benchmarks.train_step --quick` with toy models: `python -m tests.support.toy_train_step`.

A program of its own, because multiprocessing keeps the server that forks the arms until the program ends.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from unittest import mock

from benchmarks import train_step
from benchmarks.train_step_arms import QUICK, Shape

TOY = replace(
    QUICK,
    student=Shape(2, 64, 96),
    teacher=Shape(3, 64, 96),
    vocabulary=512,
    fillers=4,
    records=64,
    steps=4,
    batch=2,
    supply_steps=4,
)

if __name__ == "__main__":
    sys.argv = ["train_step", "--quick"]
    with mock.patch.multiple(train_step, QUICK=TOY, MEMORY=replace(TOY, steps=3)):
        train_step.main()
