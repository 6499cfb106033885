"""The arms that compare maps between teacher and student on a real model. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.demo.demo_config import Config
from experiments.real import real_config
from experiments.real.real_config import ArmName, RealPaths, Settings, arm_config
from student_trainer.config import BEST_MODEL

# Fewer and shorter records, and fewer calibration samples, than in `make real`: there are more than twice as many runs.
FULL = replace(real_config.FULL, train=500, max_tokens=96, calibration=32)
QUICK = real_config.QUICK
# Steps on cross-entropy alone that give the arms a student that works.
HEALING_STEPS = 60
# The healing reads the records in another order than the arms that follow.
HEALING_SEED = 1000


@dataclass(frozen=True, slots=True)
class MapArm:
    """One arm.

    Attributes:
        name: of the arm, also in the names of its runs.
        shown: what the table calls it.
        base: the arm of `make real` from which it differs only in `align` and the codec.
        align: changes of the section `align`.
        codec: name of the codec.
        quality: of the codec `pca`.
    """

    name: str
    shown: str
    base: ArmName = "kv"
    align: dict[str, Any] = field(default_factory=dict)
    codec: str = "int8"
    quality: float | None = None


# Other arms are compared with this one.
REFERENCE = "heads"
ARMS: tuple[MapArm, ...] = (
    MapArm("ce", "cross-entropy alone", "ce"),
    MapArm(REFERENCE, "`to_teacher`, all heads"),
    MapArm("basis16", "`to_teacher`, basis of rank 16", align={"basis_rank": 16}),
    MapArm("shuffled16", "the same, K/V of other samples", "shuffled", {"basis_rank": 16}),
    MapArm("basis64", "`to_teacher`, basis of rank 64", align={"basis_rank": 64}),
    MapArm("to_student", "`to_student`, frozen ridge", align={"direction": "to_student", "head_adapter": "ridge"}),
    MapArm(
        "reduced16",
        "`to_student`, frozen ridge of rank 16",
        align={"direction": "to_student", "head_adapter": "ridge", "ridge_rank": 16},
    ),
    MapArm("basis4", "`to_teacher`, basis of rank 4", align={"basis_rank": 4}),
    MapArm("raw", "`to_teacher`, all heads, `raw`", codec="raw"),
    MapArm("int6", "`to_teacher`, all heads, `int6`", codec="int6"),
    MapArm("int4", "`to_teacher`, all heads, `int4`", codec="int4"),
    MapArm("basis16_int4", "`to_teacher`, basis of rank 16, `int4`", align={"basis_rank": 16}, codec="int4"),
    MapArm("pca10", "`to_teacher`, all heads, `pca` of quality 0.1", codec="pca", quality=0.1),
    MapArm("pca20", "`to_teacher`, all heads, `pca` of quality 0.2", codec="pca", quality=0.2),
    MapArm("pca40", "`to_teacher`, all heads, `pca` of quality 0.4", codec="pca", quality=0.4),
    MapArm("pca60", "`to_teacher`, all heads, `pca` of quality 0.6", codec="pca", quality=0.6),
    MapArm("shuffled_pca40", "quality 0.4, K/V of other samples", "shuffled", codec="pca", quality=0.4),
    MapArm(
        "basis16_pca20",
        "`to_teacher`, basis of rank 16, `pca` of quality 0.2",
        align={"basis_rank": 16},
        codec="pca",
        quality=0.2,
    ),
)


def map_config(arm: MapArm, seed: int, settings: Settings, paths: RealPaths, port: int, healing: int = 0) -> Config:
    """The configuration of one run. Arms with K/V differ only in the section `align`, the codec and the control.

    Args:
        arm: the arm.
        seed: of the order of the data.
        settings: sizes.
        paths: the folders.
        port: of the teacher's server.
        healing: if above 0, the run starts from the student that `healing_config` trains for this many steps.
    """
    config = arm_config(arm.base, seed, settings, paths, port)
    config["run"]["output_dir"] = str(paths.runs.run(run_name(arm, seed, healing)))
    if healing:
        config["student"]["path"] = str(paths.runs.run(healing_name(seed, healing)) / BEST_MODEL)
    if arm.align:
        config["align"] |= arm.align
    if arm.codec != "int8":
        config["kv"]["codec"] = {"name": arm.codec} | ({} if arm.quality is None else {"quality": arm.quality})
    return config


def planned(arms: Sequence[MapArm], seeds: Sequence[int]) -> Iterator[tuple[MapArm, int]]:
    """The runs in their order: all arms of a seed before the next seed, so that an early end leaves whole seeds."""
    return ((arm, seed) for seed in seeds for arm in arms)


def run_name(arm: MapArm, seed: int, healing: int = 0) -> str:
    """The name of one run."""
    return f"{arm.name}-healed{healing}-seed{seed}" if healing else f"{arm.name}-seed{seed}"


def healing_config(seed: int, steps: int, settings: Settings, paths: RealPaths) -> Config:
    """The configuration that trains the student of a seed's healed arms: cross-entropy alone."""
    config = arm_config("ce", HEALING_SEED + seed, settings, paths, port=0)
    config["run"] |= {"output_dir": str(paths.runs.run(healing_name(seed, steps))), "steps": steps}
    return config


def healing_name(seed: int, steps: int) -> str:
    """The name of the run that trains the student of a seed's healed arms."""
    return f"healing{steps}-seed{seed}"
