"""The tables: their tasks, arms and steps.

Settings were chosen on validation items of seed 10, and the tables report seeds 0, 1 and 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.comparisons.bad_teacher import BAD, FUSIONS
from experiments.comparisons.base import Arm
from experiments.comparisons.selectors import SAME_MODEL
from experiments.comparisons.selectors import TEACHER as ITSELF
from experiments.demo.demo_config import EQUATION_TOKENS, FULL, TEACHERS, Config, ModelName, Settings

# As in the demo, but these questions need more steps until the models write their reasoning without mistakes.
_PRETRAIN_STEPS: Mapping[ModelName, int] = {"teacher_a": 800, "teacher_b": 800, "student": 1500}
# One latent for each token of the reasoning, and a block of latents for each equation.
HARDER = replace(
    FULL,
    operations=3,
    equations=True,
    arm_steps=300,
    evaluations=3,
    pretrain_steps=_PRETRAIN_STEPS,
    pretrain_lr=2e-3,
    ranks=1,
)
QUICK_TEST = 250
_LATENTS = HARDER.reasoning_tokens
_ONE, _OTHER = TEACHERS[:1], TEACHERS[1:]
_THREE = (*TEACHERS, BAD)
_STEP_CE: Config = {"step_ce_weight": 1.0}
_CODI: Config = {"codi_weight": 1.0}
_TO_STUDENT: Config = {"direction": "to_student"}
_TO_TEACHER: Config = {"direction": "to_teacher"}
# Of the table of selectors: a third of the reasoning's tokens.
_BUDGET = _LATENTS // 3


@dataclass(frozen=True, slots=True)
class Table:
    """One table.

    Attributes:
        title: what it compares.
        reference: the arm that the others are compared with, by seed.
        settings: task, sizes and steps.
        quick_steps: steps of each arm with --quick.
        arms: in the order of the rows.
    """

    title: str
    reference: str
    settings: Settings
    quick_steps: int
    arms: tuple[Arm, ...] = field(default_factory=tuple)


def _student(latents: int, passes: int) -> Config:
    return {"latents": latents, "passes": passes}


def _selection(selector: str, budget: int, **options: Any) -> Config:
    return {"selector": selector, "budget": budget, "span": "reasoning", "scope": "sample", **options}


def _method(name: str, passes: int, teachers: tuple[str, ...] = (), loss: Config | None = None, **kv: Any) -> Arm:
    """An arm whose student has a latent for each token of the reasoning, and whose teachers send all of them."""
    loss = loss or {}
    student = _student(_LATENTS, passes)
    if "step_ce_weight" in loss:
        student["latents_per_step"] = EQUATION_TOKENS
    changes: Config = {"student": student, "kv": {"selection": _selection("uniform", _LATENTS), **kv}, "loss": loss}
    return Arm(f"{name}, T={passes}", teachers, changes)


def _own_kv(name: str, passes: int, loss: Config | None = None) -> Arm:
    """An arm whose student is its own teacher."""
    return replace(_method(name, passes, (), loss), self_teacher=True)


_METHODS = (
    _method("CE", 6),
    _method("CODI", 6, loss=_CODI),
    _method("step CE", 6, loss=_STEP_CE),
    _method("KV", 6, _ONE),
    _method("KV + step CE", 6, _ONE, _STEP_CE),
    _own_kv("own KV", 6),
    _own_kv("own KV + CODI", 6, _CODI),
    _own_kv("own KV + step CE", 6, _STEP_CE),
    _method("shuffled KV", 6, _ONE, control="shuffled"),
    _method("shuffled KV + step CE", 6, _ONE, _STEP_CE, control="shuffled"),
    _method("KV", 3, _ONE),
    _method("KV + step CE", 3, _ONE, _STEP_CE),
)


def _selector(name: str, selector: str, teachers: tuple[str, ...] = (ITSELF,), **options: Any) -> Arm:
    """An arm whose student has fewer latents than the reasoning has tokens. Every head keeps its own tokens."""
    control = {"control": options.pop("control")} if "control" in options else {}
    selection = _selection(selector, _BUDGET, **options) | {"scope": "head"}
    student = _student(_BUDGET, 3)
    return Arm(name, teachers, {"student": student, "kv": {"selection": selection, **control}, "align": SAME_MODEL})


def _teachers(name: str, teachers: tuple[str, ...], **sections: Config) -> Arm:
    """An arm of the table of teachers: KV and steps with three passes."""
    arm = _method(name, 3, teachers, _STEP_CE, **sections.pop("kv", {}))
    return Arm(name, teachers, arm.changes | sections)


TABLES: Mapping[str, Table] = {
    "methods": Table(
        "Losses on latents: chain arithmetic with equations",
        "KV, T=6",
        HARDER,
        quick_steps=40,
        arms=_METHODS,
    ),
    "selectors": Table(
        "Selectors that keep a third of the reasoning's tokens",
        "uniform",
        replace(HARDER, arm_steps=400, evaluations=4),
        quick_steps=40,
        arms=(
            *(_selector(name, name) for name in ("uniform", "random", "right", "keydiff")),
            *(_selector(f"r_kv, λ {weight}", "r_kv", importance_weight=weight) for weight in (0.0, 0.1, 0.5, 1.0)),
            _selector("r_kv_centred, λ 0.1", "r_kv_centred", importance_weight=0.1),
            _selector("no KV", "uniform", ()),
            _selector("shuffled KV of r_kv, λ 0.5", "r_kv", importance_weight=0.5, control="shuffled"),
        ),
    ),
    "teachers": Table(
        "Several teachers",
        "teacher A",
        # Too few steps for the best arm to solve the task.
        replace(HARDER, arm_steps=150, evaluations=3),
        quick_steps=40,
        arms=(
            _teachers("teacher A", _ONE, align=_TO_STUDENT),
            _teachers("teacher B", _OTHER, align=_TO_STUDENT),
            *(_teachers(f"A and B, {kind}", TEACHERS, fuse=fuse) for kind, fuse in FUSIONS.items()),
            *(_teachers(f"A, B and bad, {kind}", _THREE, fuse=fuse) for kind, fuse in FUSIONS.items()),
            _teachers("teacher A, to_teacher", _ONE, align=_TO_TEACHER),
            _teachers("teacher A, to_teacher, rank 8", _ONE, align=_TO_TEACHER | {"basis_rank": 8}),
            _teachers("A and B, to_teacher", TEACHERS, align=_TO_TEACHER),
            _teachers("no KV", ()),
            _teachers("shuffled KV of A and B", TEACHERS, kv={"control": "shuffled"}),
        ),
    ),
}
