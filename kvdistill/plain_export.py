"""`kvdistill export --plain`: the backbone of a latent student as an ordinary transformers model."""

from __future__ import annotations

import shutil
from pathlib import Path

from kvcore.errors import FieldError
from kvcore.models.files import model_config, model_directory
from kvcore.models.latent_folder import is_latent
from student_trainer.model.pretrained import load_pretrained


def export_plain(model: str, target: Path) -> str:
    """Writes the backbone and the tokenizer of a latent student, and returns what that leaves out.

    Args:
        model: the student's directory or hub id.
        target: a directory that does not exist yet.

    Raises:
        FieldError: the target exists, or the model is no latent student.
    """
    if target.exists():
        raise FieldError("OUT", f"{target} exists; give a directory that does not exist yet")
    tree = model_config(model_directory(model, "MODEL"), model, "MODEL")
    if not is_latent(tree):
        raise FieldError("MODEL", f"'{model}' has no latents: it is a plain model already, which any tool can load")
    lm, tokenizer = load_pretrained(model, "auto", "MODEL")
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    lm.save_pretrained(temporary)
    tokenizer.save_pretrained(str(temporary))
    temporary.rename(target)
    return (
        f"{target}: the backbone of {model}, as a plain transformers model. It lacks the {tree['latents']} latents, so "
        "it answers without thinking, and worse than the student."
    )
