"""Lets transformers read the backbone in the folder of a latent student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kvcore.models.files import CONFIG
from kvcore.models.latent_folder import LATENT_PREFIX, backbone_tree, is_latent

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def read_config(directory: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a causal language model, or of a latent student's backbone.

    Args:
        directory: of the model; or a hub id, if it is no latent student.
        trust_remote_code: whether to run Python code that comes with the model.

    Raises:
        OSError, ValueError: it cannot be read, or needs code that comes with the model.
    """
    from transformers import CONFIG_MAPPING, AutoConfig  # noqa: PLC0415 - slow to import

    tree = _tree(directory)
    if not is_latent(tree):
        return cast("Any", AutoConfig).from_pretrained(directory, trust_remote_code=trust_remote_code)
    backbone = backbone_tree(tree)
    return cast("Any", CONFIG_MAPPING[backbone["model_type"]]).from_dict(backbone)


def read_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory or of a hub id. No code that comes with it is run, and nobody is asked whether to.

    Raises:
        OSError, ValueError: it cannot be read, or needs code that comes with it.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import

    # Without the configuration of the backbone, transformers would guess one and warn.
    options = {"config": read_config(directory)} if is_latent(_tree(directory)) else {}
    return cast("Any", AutoTokenizer).from_pretrained(directory, trust_remote_code=False, **options)


def _tree(directory: str | Path) -> dict[str, Any]:
    file = Path(directory) / CONFIG
    return cast("dict[str, Any]", json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def ignore_latents(config: PreTrainedConfig) -> None:
    """Lets transformers load backbones of this kind from the folder of a latent student without a warning."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING  # noqa: PLC0415 - slow to import

    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    kind._keys_to_ignore_on_load_unexpected = {  # noqa: SLF001 - transformers' own setting
        *(kind._keys_to_ignore_on_load_unexpected or ()),  # noqa: SLF001
        rf"^{LATENT_PREFIX}",
    }
