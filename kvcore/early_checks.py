"""Checks inputs within a second and without torch. A model that passes may still fail when it is loaded.

Commands call these checks before they import torch or start servers.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import tempfile
from pathlib import Path

from kvcore.errors import FieldError
from kvcore.extras import missing, needs
from kvcore.models.files import check_files, model_config
from kvcore.models.latent_folder import check_not_latent

# As much as a file takes on most disks, so that a full one is noticed.
_BLOCK_BYTES = 4096
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def why_no_gpu() -> str | None:
    """Why torch cannot use a GPU here; None if it may."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides all GPUs"
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if version.endswith("+cpu"):
        return f"this build of torch ({version}) has no CUDA"
    if "+rocm" not in version:
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            return "this machine has no NVIDIA driver (libcuda.so.1)"
    return None


def check_device(device: str, field: str) -> None:
    """Refuses a GPU where torch cannot use one.

    Raises:
        FieldError: names `field`.
    """
    if device.startswith("cuda") and (reason := why_no_gpu()):
        raise FieldError(field, f"got '{device}'; torch sees 0 GPUs here: {reason}; use cpu")


def check_quantised(device: str, field: str) -> None:
    """Refuses quantised weights without a GPU or without bitsandbytes.

    Raises:
        FieldError: names `field`.
    """
    reason = f"the device is '{device}'" if device == "cpu" else why_no_gpu()
    if reason:
        raise FieldError(field, f"needs a GPU, and {reason}; leave it out to load whole weights")
    if "bitsandbytes" in missing("gpu"):
        raise FieldError(field, needs("gpu", "bitsandbytes"))


def check_model(path: str, field: str, *, teacher: bool = False) -> None:
    """Refuses a directory that transformers cannot load, and a path that is neither a directory nor a hub id.

    Args:
        path: the directory or hub id.
        field: the field of `path` in errors.
        teacher: refuse a latent student, which cannot be a teacher.

    Raises:
        FieldError: names `field` and the path.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        if directory.exists() or not _HUB_ID.fullmatch(path):
            raise FieldError(field, f"there is no directory '{path}', and it is not a hub id")
        return
    tree = model_config(directory, path, field)
    if teacher:
        check_not_latent(tree, path, field)
    check_files(directory, field)


def check_output(path: Path, field: str) -> None:
    """Refuses a directory that cannot be created or written to. Leaves no file.

    Raises:
        FieldError: names `field` and the path.
    """
    above = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not above.is_dir():
        what = "is a file" if above == path.absolute() else f"cannot be created, because {above} is a file"
        raise FieldError(field, f"{path} {what}; choose another directory")
    try:
        with tempfile.TemporaryFile(dir=above) as file:
            file.write(bytes(_BLOCK_BYTES))
    except OSError as error:
        raise FieldError(field, f"cannot write to {above}: {error.strerror}; choose another directory") from error


def check_data(path: Path, field: str) -> None:
    """Refuses a data file or directory that does not exist.

    Raises:
        FieldError: names `field` and the path.
    """
    if not path.exists():
        raise FieldError(field, f"{path}: no such data file or directory; docs/data.md describes how to create it")
