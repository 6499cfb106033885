"""Write configs/papers/*.yaml: the settings of papers on latent reasoning, as far as kvdistill has them.

Examples:
  python -m scripts.make_paper_presets
  python -m scripts.make_paper_presets --check
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent.parent / "configs" / "papers"
WIDTH = 118
HUB = {
    "qwen0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "llama1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3b": "meta-llama/Llama-3.2-3B-Instruct",
}
NAMES = {"kava": "KaVa", "codi": "CODI", "pccot": "PCCoT", "lotus": "LOTUS"}
PAPERS = {"kava": "2510.02312", "codi": "2502.21074", "pccot": "2506.18582", "lotus": "2606.31779"}
SETS = {"aug": "GSM8K-Aug", "nl": "GSM8K-Aug-NL"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of KaVa's table of hyperparameters (arXiv 2510.02312, read in a secondary source).

    `codi`, `kv`: the weights a1 and a2. `deviation`: whether K/V are divided by the layer's deviation. `importance`:
    R-KV's lambda.
    """

    codi: float
    kv: float
    kv_loss: str
    deviation: bool
    importance: float
    projection: bool
    lr: float
    weight_decay: float
    epochs: int


ROWS = {
    ("llama1b", "aug"): Row(10.0, 1.0, "smooth_l1", True, 0.1, True, 8e-4, 0.1, 10),
    ("llama1b", "nl"): Row(10.0, 1.0, "mse", True, 0.1, True, 8e-4, 0.1, 10),
    ("llama3b", "aug"): Row(20.0, 2.0, "smooth_l1", False, 0.1, True, 2e-4, 0.1, 5),
    ("llama3b", "nl"): Row(20.0, 2.0, "smooth_l1", False, 0.0, False, 2e-4, 0.1, 5),
    ("qwen0.5b", "aug"): Row(10.0, 1.0, "mse", False, 0.1, True, 5e-4, 0.01, 10),
    ("qwen0.5b", "nl"): Row(10.0, 1.0, "mse", True, 0.1, True, 8e-4, 0.1, 10),
}
# GSM8K accuracy in percent, on (GSM8K-Aug, GSM8K-Aug-NL). LOTUS: its own paper; the others: KaVa's table, from a
# secondary source.
REPORTED: dict[tuple[str, str], tuple[float, float]] = {
    ("kava", "qwen0.5b"): (46.9, 44.4),
    ("kava", "llama1b"): (56.5, 55.7),
    ("kava", "llama3b"): (65.7, 60.0),
    ("codi", "qwen0.5b"): (37.5, 20.2),
    ("codi", "llama1b"): (53.9, 50.1),
    ("codi", "llama3b"): (61.0, 55.9),
    ("pccot", "qwen0.5b"): (20.5, 19.1),
    ("pccot", "llama1b"): (54.2, 51.1),
    ("pccot", "llama3b"): (54.7, 47.6),
    ("lotus", "llama3b"): (70.0, 68.1),
}
_COMMON = (
    "prompts are those of kvdistill (Question: ... Answer:); there are no marker tokens around the latents; the "
    "validation set is drawn from the training rows"
)
_UNKNOWN = "the share of warm-up steps, and whether the model is the instruct variant, are not in our sources"
_OF_KAVA = "optimiser, epochs, LoRA, batch and gradient clipping are those of KaVa for this model and data set"


def preset(method: str, model: str, data: str) -> str:
    """The text of one file: a comment and the settings."""
    name = f"{method}_{model}_{data}"
    settings = _lotus(data) if method == "lotus" else _by_kava(method, ROWS[model, data], data)
    settings["student"] = {"path": HUB[model], "dtype": "bf16", **settings["student"]}
    settings["run"] = {
        "output_dir": f"outputs/papers/{name}",
        **settings["run"],
        "micro_batch": 4 if model == "llama3b" or method == "lotus" else 16,
        "eval_every": 1000,
        "save_every": 1000,
    }
    written = yaml.safe_dump(settings, sort_keys=False, default_flow_style=False)
    return f"{_comment(method, model, data)}\n{written}"


def _by_kava(method: str, row: Row, data: str) -> dict[str, Any]:
    """KaVa's settings; for CODI and PCCoT their own latents and losses, and KaVa's optimiser."""
    latents, passes = (6, 6) if method == "codi" else (24, 3)
    student: dict[str, Any] = {"mode": "latent", "latents": latents, "passes": passes}
    student |= {"projection": row.projection if method == "kava" else True}
    student |= {"lora": {"r": 128, "alpha": 32, "dropout": 0.1}}
    taught: dict[str, Any] = {}
    loss: dict[str, Any] = {"reasoning_ce_weight": 1.0, "codi_weight": row.codi}
    if method == "kava":
        selection: dict[str, Any] = {"selector": "r_kv", "budget": latents, "span": "reasoning", "scope": "head"}
        selection |= {"importance_weight": row.importance, "importance_pool": "max"}
        taught = {"self_teacher": True, "kv": {"selection": selection}}
        scale = "layer" if row.deviation else "none"
        loss = {"kv_weight": row.kv, "kv_loss": row.kv_loss, "kv_scale": scale, **loss}
    optim = {"lr": row.lr, "weight_decay": row.weight_decay, "warmup_ratio": 0.03, "schedule": "cosine"}
    return {
        "student": student,
        **taught,
        "loss": loss,
        "data": {**_data(data), "drop_last_step": True},
        "optim": {**optim, "max_grad_norm": 2.0},
        "run": {"epochs": row.epochs, "global_batch": 128},
    }


def _lotus(data: str) -> dict[str, Any]:
    student = {"mode": "latent", "latents": 150, "passes": 6, "projection": False, "latents_per_step": 25}
    optim = {"lr": 5e-5, "weight_decay": 0.01, "warmup_ratio": 0.0, "schedule": "constant", "max_grad_norm": 1.0}
    return {
        "student": {**student, "gradient_checkpointing": True},
        "loss": {"reasoning_ce_weight": 0.0, "step_ce_weight": 0.05},
        "data": _data(data),
        "optim": optim,
        "run": {"epochs": 30, "curriculum_epochs": 1.0, "global_batch": 128},
    }


def _data(data: str) -> dict[str, Any]:
    folder = f"data/{_family(data)}"
    steps = "equations" if data == "aug" else "lines"
    return {"train": f"{folder}/train", "val": f"{folder}/val", "val_samples": 500, "steps": steps}


def _family(data: str) -> str:
    return "gsm8k_aug" if data == "aug" else "gsm8k_aug_nl"


def _comment(method: str, model: str, data: str) -> str:
    title = f"{NAMES[method]} (arXiv {PAPERS[method]}), {HUB[model].partition('/')[2]} on {SETS[data]}."
    paragraphs = [
        title,
        f"Source: {_SOURCE[method]}",
        _accuracy(method, model, data),
        f"Differs here: {_DIFFERS[method]}; {_COMMON}.",
        *([] if method == "lotus" else [f"Unknown: {_UNKNOWN}."]),
    ]
    lines = [line for text in paragraphs for line in textwrap.wrap(text, WIDTH - 2, break_on_hyphens=False)]
    lines += ["Data:", *_data_command(data), *_commands(method, model, data)]
    lines += ["Written by scripts/make_paper_presets.py."]
    return "\n".join(f"# {line}" for line in lines)


_SOURCE = {
    "kava": "KaVa's table of hyperparameters, from a secondary source: the paper's full text was not at hand, and "
    "there is no official code.",
    "codi": f"latents, projection, losses and the dropped last step from CODI's code; {_OF_KAVA} (secondary source); "
    "codi_weight is KaVa's a1. CODI's own values are not in our sources.",
    "pccot": f"latents and passes from PCCoT's code; {_OF_KAVA} (secondary source); that PCCoT trains with CODI's loss "
    "is from memory, and codi_weight is KaVa's a1. PCCoT's own values are not in our sources.",
    "lotus": "LOTUS's paper and code: loop, blocks, curriculum, loss and optimiser. That the loop has no projection is "
    "inferred.",
}
_DIFFERS = {
    "kava": "the KV loss is a mean over elements, where the paper divides by 2M only, so kv_weight may need another "
    "value",
    "codi": "six passes over six latents give the latents that CODI generates one after the other",
    "pccot": "the first inputs of the latents are embeddings of their own",
    "lotus": "a step's tokens are predicted from the state before each latent instead of its own; steps "
    "that are still text have a mean of their own in the loss; the training on written reasoning that comes first is "
    "the first command below",
}


def _accuracy(method: str, model: str, data: str) -> str:
    found = REPORTED.get((method, model))
    if found is None:
        return f"No row in the paper for this model; taken from its {HUB['llama3b'].partition('/')[2]}. Not run here."
    percent, where = found[data == "nl"], "its paper" if method == "lotus" else "KaVa's table, a secondary source"
    return f"Reported accuracy on GSM8K: {percent} % ({where}). Not reproduced here."


def _data_command(data: str) -> list[str]:
    name = _family(data)
    return [
        f"  python -m data.multi_task_dataset --output data/{name} --base {name} --no-extended --math23k-ratio 0 \\",
        "      --style cot --train-samples 385000 --val-samples 500 --allow-fewer",
    ]


def _commands(method: str, model: str, data: str) -> list[str]:
    name = f"{method}_{model}_{data}"
    train = f"  kvdistill train --config configs/papers/{name}.yaml"
    if method != "lotus":
        return ["Train:", train]
    written = f"outputs/papers/{name}_written"
    changes = [f"--set {key}={value}" for key, value in written_reasoning(written).items()]
    *lines, last = [" ".join(changes[start : start + 3]) for start in range(0, len(changes), 3)]
    return [
        "Train:",
        f"{train} \\",
        *(f"      {line} \\" for line in lines),
        f"      {last}",
        f"{train} \\",
        f"      --set student.path={written}/best_model",
    ]


def written_reasoning(output: str) -> Mapping[str, str]:
    """The settings that turn a preset of LOTUS into the training on written reasoning that comes before."""
    return {
        "student.mode": "token",
        "student.projection": "true",
        "student.latents_per_step": "null",
        "loss.step_ce_weight": "0",
        "run.curriculum_epochs": "null",
        "run.epochs": "10",
        "run.output_dir": output,
    }


def presets() -> dict[str, str]:
    """The text of every file, by name."""
    return {
        f"{method}_{model}_{data}.yaml": preset(method, model, data)
        for method in NAMES
        for model in HUB
        for data in SETS
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the files, or with --check reports whether they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Do not write; fail if a file is not up to date.")
    check = parser.parse_args(arguments).check
    wanted = presets()
    if check:
        found = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.yaml")}
        stale = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
        if stale:
            print(f"{', '.join(stale)}: not up to date; run python -m scripts.make_paper_presets", file=sys.stderr)
        return 1 if stale else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
