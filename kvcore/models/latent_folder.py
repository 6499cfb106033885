"""The folder of a latent student: a model of a type of its own around its backbone, an ordinary causal language model.

transformers loads it with the code in the folder and with `trust_remote_code` only, and refuses it otherwise, so that
nobody uses it without its latents by mistake. The weights of the backbone and of the latents are in separate files,
under the names that they have alone, and one index lists both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open

from kvcore.errors import FieldError
from kvcore.files import write_json
from kvcore.models.files import CONFIG, INDEX, SINGLE

MODEL_TYPE = "kvdistill_latent"
# The module in the folder, and the classes in it.
CODE = "hub_student"
CONFIG_CLASS, MODEL_CLASS = "KVDistillLatentConfig", "KVDistillLatentForCausalLM"
BACKBONE_WEIGHTS, LATENT_WEIGHTS = "backbone.safetensors", "latent.safetensors"
# The start of the names of latent parameters.
LATENT_PREFIX = "reasoning."
_BACKBONE = "text_config"


@dataclass(frozen=True, slots=True)
class LatentSettings:
    """What a latent student was trained with.

    `latents`, `passes`: M and T. `projection`: whether the inputs of latents are projections of hidden states.
    """

    latents: int
    passes: int
    projection: bool


def latent_settings(tree: dict[str, Any]) -> LatentSettings:
    """The settings of a latent student. `tree`: of its config.json."""
    # Folders of versions in which every student had a projection do not say so.
    return LatentSettings(int(tree["latents"]), int(tree["passes"]), bool(tree.get("projection", True)))


def is_latent(tree: dict[str, Any]) -> bool:
    """Whether the content of a config.json is that of a latent student."""
    return tree.get("model_type") == MODEL_TYPE


def backbone_tree(tree: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a latent student's backbone; of any other model its own. `tree`: of its config.json."""
    return cast("dict[str, Any]", tree[_BACKBONE]) if is_latent(tree) else tree


def check_not_latent(tree: dict[str, Any], name: str, field: str) -> None:
    """Refuses a latent student where its latents would be left out. `tree`: of its config.json.

    Raises:
        FieldError: names `field` and the model's `name`.
    """
    if is_latent(tree):
        raise FieldError(
            field,
            f"'{name}' is a student that reasons in latents, which would be left out here; next: write its backbone "
            f"alone with 'kvdistill export {name} DIR --plain' and give DIR",
        )


def make_latent(directory: Path, latents: int, passes: int, *, projection: bool = True) -> None:
    """Turns the folder of a backbone into that of a latent student. `LATENT_WEIGHTS` and the code must be in it."""
    single, index_file = directory / SINGLE, directory / INDEX
    if single.is_file():
        # transformers would read this name alone and not the index.
        single.rename(directory / BACKBONE_WEIGHTS)
        index: dict[str, Any] = {"metadata": {}, "weight_map": _names(directory / BACKBONE_WEIGHTS)}
    else:
        index = json.loads(index_file.read_text(encoding="utf-8"))
    index["weight_map"] |= _names(directory / LATENT_WEIGHTS)
    files = {directory / name for name in index["weight_map"].values()}
    index["metadata"]["total_size"] = sum(file.stat().st_size for file in files)
    write_json(index_file, index)
    backbone = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    tree = {
        "architectures": [MODEL_CLASS],
        "auto_map": {"AutoConfig": f"{CODE}.{CONFIG_CLASS}", "AutoModelForCausalLM": f"{CODE}.{MODEL_CLASS}"},
        "model_type": MODEL_TYPE,
        "dtype": backbone.get("dtype"),
        "latents": latents,
        "passes": passes,
        "projection": projection,
        _BACKBONE: backbone,
        "transformers_version": backbone.get("transformers_version"),
    }
    write_json(directory / CONFIG, tree)


def _names(file: Path) -> dict[str, str]:
    opened: Any = safe_open(file, framework="np")
    with opened as stored:
        return dict.fromkeys(stored.keys(), file.name)
