"""Flags of the recipe: one for each field of `RecipeSettings`, with its default and what it means. Free of torch."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from experiments.recipe.settings import MIX, TRAIN_SAMPLES, VAL_SAMPLES, RecipeSettings
from kvcore.config import apply_override, parse, read_yaml
from kvcore.errors import ConfigError, FieldError

ALIASES = {"student_model_name_or_path": ("--student_model",)}

EXAMPLES = """examples:
  Two teachers, fixed weights; starts a server for each teacher on this machine:
    python experiments/train_multi_teacher_kv.py --student_model Qwen/Qwen2.5-1.5B \\
        --teacher_models Qwen/Qwen2.5-7B Qwen/Qwen2.5-14B --fusion_strategy fixed --fixed_weights 0.5,0.5 \\
        --output_dir outputs/two_teachers
  All three stages of a scenario, under 8 ranks, with servers that run elsewhere:
    torchrun --standalone --nproc_per_node 8 experiments/train_multi_teacher_kv.py \\
        --config configs/experiments/one_family_qwen.yaml \\
        --teacher_endpoints Qwen2.5-7B=node1:50051 Qwen2.5-14B=node2:50051
  Teachers in 8 bits:
    python experiments/train_multi_teacher_kv.py --config configs/experiments/one_family_llama.yaml \\
        --load_in_8bit true --bnb_4bit_compute_dtype bfloat16
  Datasets on local disks, and only made ready:
    python experiments/train_multi_teacher_kv.py --config configs/experiments/one_family_qwen.yaml \\
        --data_dir copies --prepare_only true
The same command after an interruption goes on from the newest checkpoint."""

# Headings of --help, in order; under each its fields and what to say about them.
GROUPS: Mapping[str, Mapping[str, str]] = {
    "student": {
        "student_model_name_or_path": "directory or hub id, or the best_model of an earlier run",
        "student_mode": "latent: reasons in latents; token: reads and writes its reasoning as text",
        "num_latents": "latent positions, and how many tokens right and r-kv keep",
        "latent_passes": "Jacobi passes that refine the latents",
        "bf16": "the student's weights in bfloat16; false: float32",
        "gradient_checkpointing": "compute activations again in the backward pass",
    },
    "teachers": {
        "teacher_models": "directories or hub ids",
        "num_teachers": "use the first so many of --teacher_models; all by default",
        "teacher_endpoints": "NAME=HOST:PORT[,HOST:PORT] of servers that run, NAME the model's last part; @FILE with "
        "one a line. Without it a server for each model is started here, and ended afterwards",
        "teacher_device": "of servers started here: auto, cpu, cuda or cuda:N",
        "load_in_8bit": "servers started here read their weights in 8 bits (bitsandbytes, needs a GPU)",
        "load_in_4bit": "the same in 4 bits",
        "bnb_4bit_compute_dtype": "what quantised weights are computed in",
    },
    "data": {
        "dataset_name": f"{MIX} (the guide's mix), names of datasets, or a directory with train and val",
        "train_samples": f"training records; {TRAIN_SAMPLES} of datasets by default, and all of a directory",
        "val_samples": f"validation records; {VAL_SAMPLES} of datasets by default, and all of a directory",
        "use_extended_datasets": f"{MIX} has math, arc_challenge and hotpotqa too",
        "math23k_ratio": f"share of Chinese questions in {MIX}",
        "data_dir": "local copies of the datasets; $KVDISTILL_DATA_DIR by default, else the hub",
        "max_length": "longest sample in the student's tokens",
        "prepare_only": "write the data and end",
    },
    "fusion": {
        "train_phase": "stage of three-stage routing: 1 fixed, 2 similarity, 3 learnable; all: one after another, each "
        "from the best model of the one before, in folders of their own",
        "fusion_strategy": "how teachers are fused; fixed by default, or as --train_phase says",
        "fixed_weights": "one for each teacher, as 0.5,0.5 or 0.5 0.5; equal by default",
        "similarity_metric": "what similarity compares K/V by",
        "temperature": "of the softmax over teachers; 0.2 for similarity, 1.0 falling to 0.5 for learnable, by default",
        "router_type": "router of learnable",
        "router_hidden_dim": "its hidden size",
        "entropy_reg_weight": "how much it is rewarded for an even distribution",
    },
    "keys and values": {
        "kv_mode": "online: from the teachers; record: that, and write a store; offline: from the store alone",
        "kv_store": "directory of the store; OUTPUT_DIR/kv_store by default",
        "kv_compression": "tokens of the reasoning that leave a teacher: full (resampled to the latents), right, r-kv",
        "kv_loss_type": "distance between the student's K/V and the fused ones",
        "kv_loss_weight": "a number, or auto: as strong a gradient as the cross-entropy's",
        "layer_map_strategy": "which teacher layers a student layer learns from; learned starts from ratio, and trains "
        "in a learnable stage",
        "head_adapt_strategy": "how heads and dims are mapped; linear starts from ridge, trains in a learnable stage",
        "rope_scaling": "always true: keys are compared without their rotation, whatever the models' rope parameters",
        "calibration_samples": "samples that the maps are fitted on before the first step",
    },
    "optimisation": {
        "learning_rate": "peak, after warm-up",
        "warmup_ratio": "share of the steps",
        "max_grad_norm": "gradients are clipped at this norm",
        "per_device_train_batch_size": "samples at a time on each rank",
        "gradient_accumulation_steps": "a step takes batch size x this x ranks samples",
        "num_train_epochs": "passes over the training records",
        "max_steps": "optimiser steps, instead of epochs",
        "zero_stage": "how much DeepSpeed shares out among ranks",
        "seed": "of data order, latents and dropout",
    },
    "output": {
        "output_dir": "checkpoints, best_model, metrics, TensorBoard; on a disk that all ranks see",
        "eval_steps": "steps between validations; 0: only at the end",
        "save_steps": "steps between checkpoints; 0: only at the end",
        "logging_steps": "steps between lines of the log",
        "answer_tokens": "most tokens of an answer in validation",
        "metric_for_best_model": "what best_model is best by, on the validation records",
    },
}


def parser(program: str) -> argparse.ArgumentParser:
    """The parser; a flag that is not given leaves no trace in what it returns."""
    made = argparse.ArgumentParser(
        prog=program,
        description="Train a student on the keys and values of one or several teachers. Booleans are true or false.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    made.add_argument("--config", type=Path, help="YAML file of these flags without dashes; flags given here win")
    for heading, fields in GROUPS.items():
        group = made.add_argument_group(heading)
        for name, text in fields.items():
            options = (f"--{name}", *ALIASES.get(name, ()))
            nargs = "+" if _is_list(name) else None
            group.add_argument(*options, dest=name, nargs=nargs, metavar=_metavar(name), help=_help(name, text))
    return made


def read_flags(arguments: Sequence[str], program: str) -> RecipeSettings:
    """Settings from the command line, over those of `--config`.

    Raises:
        ConfigError: a flag is unknown (with the nearest one), or two do not go together.
        FieldError: a value is wrong; named as the flag.
    """
    made = parser(program)
    given, rest = made.parse_known_args(arguments)
    for extra in rest:
        raise ConfigError(_unknown(extra, made))
    flags = vars(given)
    path: Path | None = flags.pop("config", None)
    tree = read_yaml(path) if path else {}
    for name, text in flags.items():
        _set(tree, name, text)
    try:
        return parse(tree, RecipeSettings)
    except FieldError as error:
        raise _as_flag(error) from error


def _set(tree: dict[str, Any], name: str, text: str | list[str]) -> None:
    """Puts a flag's text into the tree as the type of its field."""
    kinds = _kinds(name)
    if name == "fixed_weights":
        tree[name] = [_number(part) for part in re.split(r"[\s,;]+", " ".join(text)) if part]
    elif bool in kinds:
        if text not in ("true", "false"):
            raise FieldError(f"--{name}", f"expected true or false, got '{text}'")
        tree[name] = text == "true"
    elif {int, float} & kinds:
        apply_override(tree, f"{name}={text}")
    else:
        tree[name] = text


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise FieldError("--fixed_weights", f"expected numbers, got '{text}'") from error


def _kinds(name: str) -> set[Any]:
    """The plain types in a field's annotation, those of a Literal's choices too."""
    found: set[Any] = set()
    waiting: list[Any] = [RecipeSettings.model_fields[name].annotation]
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, type):
            found.add(kind)
        elif isinstance(kind, str | int) and not isinstance(kind, bool):
            found.add(type(kind))
        else:
            waiting += get_args(kind)
    return found


def _is_list(name: str) -> bool:
    return get_origin(RecipeSettings.model_fields[name].annotation) is tuple


def _choices(name: str) -> list[str]:
    annotation = RecipeSettings.model_fields[name].annotation
    kinds = [annotation, *get_args(annotation)]
    return [str(choice) for kind in kinds for choice in get_args(kind) if isinstance(choice, str | int)] or (
        [str(kind) for kind in get_args(annotation) if isinstance(kind, str)]
    )


def _metavar(name: str) -> str:
    kinds = _kinds(name) - {NoneType}
    if bool in kinds:
        return "true|false"
    if choices := list(dict.fromkeys(_choices(name))):
        return ("NUMBER|" if float in kinds else "") + "|".join(choices)
    if Path in kinds:
        return "PATH"
    return "NUMBER" if {int, float} & kinds else "TEXT"


def _help(name: str, text: str) -> str:
    field = RecipeSettings.model_fields[name]
    default = field.get_default()
    if field.is_required():
        return f"{text} (required)".replace("%", "%%")
    if default in (None, ()):
        return text.replace("%", "%%")
    shown = str(default).lower() if isinstance(default, bool) else default
    shown = " ".join(shown) if isinstance(shown, tuple) else shown
    return f"{text} (default: {shown})".replace("%", "%%")


def _unknown(extra: str, made: argparse.ArgumentParser) -> str:
    flag = extra.partition("=")[0]
    if not flag.startswith("-"):
        return f"'{extra}': no flag stands before it; --help lists them"
    known = [option for action in made._actions for option in action.option_strings]  # noqa: SLF001 - no public way
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.0)
    return f"{flag}: unknown flag; did you mean {near[0]}?"


def _as_flag(error: FieldError) -> ConfigError:
    name = error.field.partition(".")[0]
    if name not in RecipeSettings.model_fields:
        # Two fields that do not go together: the message names the first of them. Or an unknown key of the file.
        return ConfigError(f"--{error.problem}" if name == RecipeSettings.__name__ else str(error))
    return FieldError(f"--{name}", "is required" if error.problem.startswith("Field required") else error.problem)
