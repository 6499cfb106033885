"""The demo's sizes and training configurations. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from data.synthetic import ChainTask

ModelName = Literal["teacher_a", "teacher_b", "student"]
ArmName = Literal["kv_two_teachers", "kv_one_teacher", "no_kv", "shuffled_kv"]
Config = dict[str, Any]

ARMS: tuple[ArmName, ...] = ("kv_two_teachers", "kv_one_teacher", "no_kv", "shuffled_kv")
CONTROLS: frozenset[ArmName] = frozenset({"no_kv", "shuffled_kv"})
TEACHERS: tuple[ModelName, ...] = ("teacher_a", "teacher_b")
TEACHERS_OF_ARM: dict[ArmName, tuple[ModelName, ...]] = {
    "kv_two_teachers": TEACHERS,
    "kv_one_teacher": TEACHERS[:1],
    "no_kv": (),
    "shuffled_kv": TEACHERS,
}
# The report says when an accuracy is not within these limits.
LEAST_KV_ACCURACY = 0.95
MOST_CONTROL_ACCURACY = 0.25

# The demo shows lines of the training process that begin with this.
PROGRESS = "demo: "

LATENTS = 3
# As in ` 3 + 4 = 0` and the end of its line.
EQUATION_TOKENS = 6
_BATCH = 64
_MAX_TOKENS = 128
PRETRAIN_STEPS: dict[ModelName, int] = {"teacher_a": 700, "teacher_b": 400, "student": 850}


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes of one demo. The learning rate and steps of the arms were chosen on validation items.

    Attributes:
        train: training records.
        val: validation items.
        test: test items.
        record: training records of the epoch that is recorded and replayed.
        arm_steps: steps of each arm.
        arm_lr: its learning rate.
        evaluations: validations of each arm.
        data_seed: seed of the records.
        modulus: of the chain arithmetic, see `ChainTask`.
        operations: of each question.
        fillers: meaningless words in each reasoning.
        equations: whether the reasoning has equations instead of values alone.
        distractors: operations in each question that do not count.
        pretrain_steps: steps of teachers and student on reasoning text.
        pretrain_lr: their learning rate.
        ranks: training processes.
    """

    train: int = 32768
    val: int = 256
    test: int = 1000
    record: int = 4096
    arm_steps: int = 500
    arm_lr: float = 2e-3
    evaluations: int = 10
    data_seed: int = 0
    modulus: int = 7
    operations: int = 4
    fillers: int = 0
    equations: bool = False
    distractors: int = 0
    pretrain_steps: Mapping[ModelName, int] = field(default_factory=lambda: PRETRAIN_STEPS)
    pretrain_lr: float = 1e-3
    ranks: int = 2

    @property
    def task(self) -> ChainTask:
        """The task that these settings describe."""
        from data.synthetic import ChainTask  # noqa: PLC0415 - loads torch

        return ChainTask(self.modulus, self.operations, self.fillers, self.equations, self.distractors)

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of each reasoning, for all tokenizers of the demo."""
        return (EQUATION_TOKENS if self.equations else 1) * (self.operations - 1) + self.fillers

    @property
    def micro_batch(self) -> int:
        """Samples per rank and step."""
        return _BATCH // self.ranks


FULL = Settings()
QUICK = Settings(test=500, record=512, arm_steps=180, arm_lr=4e-3, evaluations=3)


@dataclass(frozen=True, slots=True)
class DemoPaths:
    """The folders and files of one demo."""

    output: Path

    def split(self, name: str) -> Path:
        """The records of train, val, test or record."""
        return self.output / "data" / f"{name}.jsonl"

    def run(self, name: str) -> Path:
        """The output directory of one training run."""
        return self.output / "runs" / name

    @property
    def cache(self) -> Path:
        """Trained models, named by a digest of everything that determines them."""
        return self.output / "cache"

    @property
    def logs(self) -> Path:
        """Output of the child processes."""
        return self.output / "logs"


def pretrain_config(name: ModelName, model: Path, settings: Settings, paths: DemoPaths, output_dir: Path) -> Config:
    """Supervised training from scratch on text with the reasoning, without teachers."""
    return {
        "student": {"path": str(model), "mode": "token"},
        "data": {
            "train": str(paths.split("train")),
            "val": str(paths.split("val")),
            "max_tokens": _MAX_TOKENS,
            # Reasoning, answer and end.
            "answer_tokens": settings.reasoning_tokens + 2,
        },
        "optim": {"lr": settings.pretrain_lr, "warmup_ratio": 0.05, "schedule": "linear"},
        "run": {
            "output_dir": str(output_dir),
            "steps": settings.pretrain_steps[name],
            "global_batch": _BATCH,
            "micro_batch": _BATCH,
            "zero_stage": 0,
            "log_every": 50,
        },
    }


def arm_config(
    arm: ArmName, seed: int, settings: Settings, paths: DemoPaths, student: Path, ports: dict[str, int]
) -> Config:
    """One arm: the student reasons in latents. Arms differ only in the teachers and the control."""
    chosen = {name: ports[name] for name in TEACHERS_OF_ARM[arm]}
    config = run_config(f"{arm}-seed{seed}", seed, settings, paths, student, chosen)
    if arm == "shuffled_kv":
        config["kv"]["control"] = "shuffled"
    return config


def run_config(
    name: str, seed: int, settings: Settings, paths: DemoPaths, student: Path, ports: dict[str, int]
) -> Config:
    """A student that reasons in latents, on the training data, with the teachers in `ports`."""
    config = _latent_config(paths.run(name), seed, paths.split("train"), student, settings.micro_batch)
    config["data"]["val"] = str(paths.split("val"))
    config["optim"]["lr"] = settings.arm_lr
    config["run"] |= {"steps": settings.arm_steps, "eval_every": settings.arm_steps // settings.evaluations}
    config["teachers"] = _teachers(tuple(ports), ports)
    return config


def epoch_config(
    mode: Literal["record", "offline"], settings: Settings, paths: DemoPaths, student: Path, ports: dict[str, int]
) -> Config:
    """One epoch over part of the training data that records or replays both teachers' K/V and logs every step.

    The replay gets no endpoints, so it cannot use a server.
    """
    config = _latent_config(paths.run(mode), 0, paths.split("record"), student, settings.micro_batch)
    config["run"] |= {"epochs": 1, "log_every": 1}
    config["kv"] |= {"mode": mode, "store": str(paths.run("store"))}
    config["teachers"] = _teachers(TEACHERS, ports if mode == "record" else {})
    return config


def _teachers(names: tuple[str, ...], ports: dict[str, int]) -> list[Config]:
    return [{"name": name, "endpoints": [f"127.0.0.1:{ports[name]}"] if ports else []} for name in names]


def _latent_config(output_dir: Path, seed: int, train: Path, student: Path, micro_batch: int) -> Config:
    return {
        "student": {"path": str(student), "mode": "latent", "latents": LATENTS, "passes": 3},
        "kv": {
            "selection": {
                "selector": "r_kv",
                "budget": LATENTS,
                "span": "reasoning",
                "scope": "sample",
                "importance_weight": 0.1,
            },
            "codec": {"name": "int8"},
        },
        "align": {"direction": "to_student", "settled_within": 0.0},
        "loss": {"kv_weight": 10.0, "kv_loss": "smooth_l1"},
        "data": {"train": str(train), "max_tokens": _MAX_TOKENS, "answer_tokens": 2},
        "optim": {"lr": 1e-3, "warmup_ratio": 0.05, "schedule": "linear"},
        "run": {
            "output_dir": str(output_dir),
            "seed": seed,
            "global_batch": _BATCH,
            "micro_batch": micro_batch,
            "zero_stage": 2,
            "log_every": 20,
            "resume": "never",
        },
    }
