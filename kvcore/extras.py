"""The optional packages: which extra of pyproject.toml installs them, and the message where one is missing."""

from __future__ import annotations

import importlib.util

from kvcore.errors import ConfigError

# Import names by extra. A plain install serves teachers and reads from them; the extra `train` adds the rest.
EXTRAS: dict[str, tuple[str, ...]] = {
    "train": ("datasets", "deepspeed", "lm_eval", "matplotlib", "scipy", "tensorboard"),
    "gpu": ("accelerate", "bitsandbytes"),
    "vllm": ("vllm",),
    "otel": ("opentelemetry.sdk",),
}


def missing(extra: str) -> list[str]:
    """The packages of an extra that are not installed."""
    return [package for package in EXTRAS[extra] if importlib.util.find_spec(package) is None]


def require(extra: str, command: str) -> None:
    """Checks that a command can import what it needs, before it starts.

    Raises:
        ConfigError: packages of the extra are not installed.
    """
    if lacking := missing(extra):
        raise ConfigError(f"{command} {needs(extra, *lacking)}")


def needs(extra: str, *packages: str) -> str:
    """The end of a message about missing packages: which ones, and how to install them."""
    return f"needs {', '.join(packages)}, not installed here: {install_command(extra)}"


def install_command(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'kvdistill[{extra}]'"
