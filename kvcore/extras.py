"""The optional packages, the extras of pyproject.toml that install them, and messages about missing ones."""

from __future__ import annotations

import importlib.util

from kvcore.errors import ConfigError

# Import names by extra. A plain install can serve teachers and read from them; `train` adds everything for training.
EXTRAS: dict[str, tuple[str, ...]] = {
    "train": (
        "accelerate",
        "datasets",
        "deepspeed",
        "lm_eval",
        "matplotlib",
        "pandas",
        "peft",
        "pyarrow",
        "scipy",
        "tabulate",
        "tensorboard",
    ),
    "gpu": ("accelerate", "bitsandbytes"),
    "vllm": ("vllm",),
    "otel": ("opentelemetry.sdk",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}


def missing(extra: str) -> list[str]:
    """The packages of an extra that are not installed."""
    return [package for package in EXTRAS[extra] if importlib.util.find_spec(package) is None]


def require(extra: str, command: str) -> None:
    """Checks that the packages a command needs are installed.

    Raises:
        ConfigError: packages of the extra are not installed.
    """
    if lacking := missing(extra):
        raise ConfigError(f"{command} {needs(extra, *lacking)}")


def needs(extra: str, *packages: str) -> str:
    """Returns the end of an error message: which packages are missing and how to install them."""
    return f"needs {', '.join(packages)}, not installed here: {install_command(extra)}"


def install_command(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'kvdistill[{extra}]'"
