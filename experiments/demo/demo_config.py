"""How much of everything the demo takes, and the training configurations it runs. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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
# What the demo expects to see; the report says so when it does not.
LEAST_KV_ACCURACY = 0.95
MOST_CONTROL_ACCURACY = 0.25

# Lines of a training process that begin so are shown.
PROGRESS = "demo: "

LATENTS = 3
_BATCH = 64
PRETRAIN_STEPS: dict[ModelName, int] = {"teacher_a": 700, "teacher_b": 400, "student": 850}


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes of one demo. `record`: how many training records make the epoch that is recorded and replayed.

    `pretrain_*`: of teachers and student on written reasoning. The rates and steps of the arms were chosen on
    validation items. `fillers`: words in each reasoning that say nothing, see `ChainTask`. `ranks`: training processes.
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
    pretrain_steps: Mapping[ModelName, int] = field(default_factory=lambda: PRETRAIN_STEPS)
    pretrain_lr: float = 1e-3
    ranks: int = 2

    @property
    def micro_batch(self) -> int:
        """How many samples a rank takes at a time: its share of a step."""
        return _BATCH // self.ranks


FULL = Settings()
QUICK = Settings(test=500, record=512, arm_steps=180, arm_lr=4e-3, evaluations=3)


@dataclass(frozen=True, slots=True)
class DemoPaths:
    """Where the demo keeps what."""

    output: Path

    def split(self, name: str) -> Path:
        """The records of train, val, test or record."""
        return self.output / "data" / f"{name}.jsonl"

    def run(self, name: str) -> Path:
        """The output directory of one training run."""
        return self.output / "runs" / name

    @property
    def cache(self) -> Path:
        """Models by the digest of what determines them."""
        return self.output / "cache"

    @property
    def logs(self) -> Path:
        """Output of the child processes."""
        return self.output / "logs"


def pretrain_config(name: ModelName, model: Path, settings: Settings, layout: DemoPaths, output_dir: Path) -> Config:
    """Plain supervised training on text, without teachers: from scratch, with the reasoning written out."""
    return {
        "student": {"path": str(model), "mode": "token"},
        "data": {
            "train": str(layout.split("train")),
            "val": str(layout.split("val")),
            "max_tokens": 64,
            "answer_tokens": 5 + settings.fillers,
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
    arm: ArmName, seed: int, settings: Settings, layout: DemoPaths, student: Path, ports: dict[str, int]
) -> Config:
    """One arm: the student thinks in latents; arms differ in nothing but the teachers and the control."""
    chosen = {name: ports[name] for name in TEACHERS_OF_ARM[arm]}
    config = run_config(f"{arm}-seed{seed}", seed, settings, layout, student, chosen)
    if arm == "shuffled_kv":
        config["kv"]["control"] = "shuffled"
    return config


def run_config(
    name: str, seed: int, settings: Settings, layout: DemoPaths, student: Path, ports: dict[str, int]
) -> Config:
    """A student that thinks in latents, on the training data, with the teachers that `ports` names."""
    config = _latent_config(layout.run(name), seed, layout.split("train"), student, settings.micro_batch)
    config["data"]["val"] = str(layout.split("val"))
    config["optim"]["lr"] = settings.arm_lr
    config["run"] |= {"steps": settings.arm_steps, "eval_every": settings.arm_steps // settings.evaluations}
    config["teachers"] = _teachers(tuple(ports), ports)
    return config


def epoch_config(
    mode: Literal["record", "offline"], settings: Settings, layout: DemoPaths, student: Path, ports: dict[str, int]
) -> Config:
    """One epoch over a part of the training data that records, or replays, both teachers' K/V; logs every step.

    The replay is given no endpoints, so it cannot ask a server.
    """
    config = _latent_config(layout.run(mode), 0, layout.split("record"), student, settings.micro_batch)
    config["run"] |= {"epochs": 1, "log_every": 1}
    config["kv"] |= {"mode": mode, "store": str(layout.run("store"))}
    config["teachers"] = _teachers(TEACHERS, ports if mode == "record" else {})
    return config


def _teachers(names: tuple[str, ...], ports: dict[str, int]) -> list[Config]:
    return [{"name": name, "endpoints": [f"127.0.0.1:{ports[name]}"] if ports else []} for name in names]


def _latent_config(output_dir: Path, seed: int, train: Path, student: Path, micro_batch: int) -> Config:
    return {
        "student": {"path": str(student), "mode": "latent", "latents": LATENTS, "passes": 3},
        "kv": {
            "selection": {"selector": "r_kv", "budget": LATENTS, "span": "reasoning", "scope": "sample"},
            "codec": {"name": "int8"},
        },
        "loss": {"kv_weight": 10.0, "kv_loss": "smooth_l1"},
        "data": {"train": str(train), "max_tokens": 64, "answer_tokens": 2},
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
