"""Finds a model's files, and refuses a directory that cannot be loaded before anything is read from it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import huggingface_hub
from safetensors import SafetensorError, safe_open

from kvcore.errors import FieldError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
# The model card, and the tag by which a student's is recognised.
CARD, CARD_TAG = "README.md", "kvdistill"
ADAPTER = "adapter_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")

_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_OTHER_COPIES = ["original/*", "consolidated*", "onnx/*"]
# Weights in formats that are not loaded: pickles run code, and GGUF is quantised.
_OTHER_FORMATS = ("*.bin", "*.pth", "*.pt", "*.gguf")
_LFS_POINTER = b"version https://git-lfs"
_MAX_LISTED = 5


def model_directory(model: str, field: str, *, revision: str | None = None, with_code: bool = False) -> Path:
    """The directory of a model: the given path, or the hub's files in the local cache, downloaded if missing.

    Args:
        model: a directory or hub id.
        field: the field that errors name.
        revision: of the hub's repository; None for its main branch.
        with_code: download the model's Python code, too.

    Raises:
        FieldError: neither a directory nor a hub id that can be downloaded.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise FieldError("revision", f"got '{revision}', but {model} is a directory, which has no revisions")
        return path
    patterns = [*_PATTERNS, "*.py"] if with_code else _PATTERNS
    hub: Any = huggingface_hub
    try:
        return Path(
            hub.snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=_OTHER_COPIES)
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FieldError(field, f"'{model}' is not a directory, and the hub cannot provide it: {reason}") from error


def weight_files(directory: Path, field: str = "model") -> list[Path]:
    """The safetensors files that make up the model, sorted.

    Raises:
        FieldError: there are none, or a file of the index is missing.
    """
    index = directory / INDEX
    if index.is_file():
        weight_map = cast("dict[str, str]", _read_json(index, field)["weight_map"])
        files = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        files = [directory / SINGLE]
    for file in files:
        if not file.is_file():
            others = sorted(found.name for pattern in _OTHER_FORMATS for found in directory.glob(pattern))
            step = f"convert {others[0]} with save_pretrained of transformers" if others else "copy or download it"
            raise FieldError(field, f"{file} is missing; kvdistill loads weights from safetensors files only: {step}")
    return files


def model_config(directory: Path, name: str, field: str) -> dict[str, Any]:
    """The content of a model's config.json.

    Args:
        directory: of the model.
        name: the directory or hub id, as the user wrote it.
        field: the field of `name` in errors.

    Raises:
        FieldError: the directory holds an adapter alone, or its config.json is missing, a Git LFS pointer or no object.
    """
    _check_no_adapter(directory, field)
    file = directory / CONFIG
    if not file.is_file():
        files = sorted(entry.name for entry in directory.iterdir())
        listed = ", ".join(files[:_MAX_LISTED]) + (", ..." if len(files) > _MAX_LISTED else "")
        raise FieldError(
            field,
            f"'{name}' has no {CONFIG}, so it is not a transformers model; it has {listed or 'no files'}; next: give "
            "the directory that save_pretrained wrote, or a hub id",
        )
    _check_no_pointers([file], field)
    step = "next: copy or download it again"
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FieldError(field, f"{file} is not valid JSON ({error}); {step}") from error
    if not isinstance(tree, dict):
        raise FieldError(field, f"{file} holds a {type(tree).__name__}, not a JSON object; {step}")
    return cast("dict[str, Any]", tree)


def check_files(directory: Path, field: str) -> None:
    """Checks that a directory with a configuration also has a whole tokenizer and whole weights.

    Raises:
        FieldError: names the file, what is wrong with it, and the next step.
    """
    # Without tokenizer files, transformers creates an empty tokenizer for some models.
    tokenizers = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not tokenizers:
        raise FieldError(
            field,
            f"'{directory}' has no tokenizer: none of {', '.join(TOKENIZER_FILES)}; copy these files from the model "
            "that it comes from",
        )
    weights = weight_files(directory, field)
    _check_no_pointers([*tokenizers, *weights], field)
    for file in weights:
        _check_complete(file, field)


def parameter_count(directory: Path, field: str) -> int:
    """The number of parameters in a model's safetensors files, from their headers.

    Raises:
        FieldError: there are none, or a file is damaged.
    """
    count = 0
    for file in weight_files(directory, field):
        _check_complete(file, field)
        opened: Any = safe_open(file, framework="np")
        with opened as stored:
            count += sum(math.prod(stored.get_slice(name).get_shape()) for name in stored.keys())  # noqa: SIM118
    return count


def _check_no_adapter(directory: Path, field: str) -> None:
    file = directory / ADAPTER
    if file.is_file():
        # transformers would load the base model of the adapter instead of the files in this directory.
        base = _read_json(file, field).get("base_model_name_or_path")
        raise FieldError(
            field,
            f"'{directory}' holds an adapter (LoRA) of '{base}', not a whole model; merge it with "
            "PeftModel.from_pretrained(base, adapter).merge_and_unload(), save_pretrained that, and give its directory",
        )


def _check_no_pointers(files: Iterable[Path], field: str) -> None:
    for file in files:
        with file.open("rb") as stream:
            start = stream.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise FieldError(
                field, f"{file} is a Git LFS pointer, not the file itself; run 'git lfs pull' in {file.parent}"
            )


def _check_complete(file: Path, field: str) -> None:
    try:
        # Reads the header and compares the file's size with it, but reads no weights.
        with safe_open(file, framework="np"):
            pass
    except SafetensorError as error:
        raise FieldError(field, f"{file} is damaged or cut off ({error}); copy or download it again") from error


def _read_json(file: Path, field: str) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise FieldError(field, f"{file} is not valid JSON ({error}); copy or download it again") from error
