"""Tests of gRPC server and channel arguments. gRPC core ignores unknown names, so the names are checked here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from grpc._cython import cygrpc

from kvcore.wire.channel_arguments import DIRECT, client_arguments, server_arguments

ARGUMENTS = [*server_arguments(1, 1), *client_arguments(1, 1.0), DIRECT]


@pytest.mark.parametrize("name", sorted({name for name, _ in ARGUMENTS}))
def test_installed_grpc_core_supports_the_argument(name: str) -> None:
    # A string ends with a zero byte. It may be the end of a longer string, because linkers merge strings.
    whole_name = rb"(?<![a-z_.])" + re.escape(name.encode()) + rb"\0"
    assert re.search(whole_name, Path(cygrpc.__file__).read_bytes()) is not None, f"the core does not know {name}"


@pytest.mark.parametrize(
    ("timeout_s", "ping_interval_ms"), [(1.0, 5000), (32.0, 16_000), (120.0, 60_000), (600.0, 300_000), (1e6, 300_000)]
)
def test_client_ping_interval_is_half_the_timeout_within_server_limits(timeout_s: float, ping_interval_ms: int) -> None:
    assert dict(client_arguments(1, timeout_s))["grpc.keepalive_time_ms"] == ping_interval_ms


def test_only_one_module_names_grpc_core_arguments() -> None:
    root = Path(__file__).parents[2]
    folders = ("student_trainer", "teacher_server", "extraction", "evaluation", "experiments", "kvdistill", "kvcore")
    naming = {
        path.name
        for folder in folders
        for path in (root / folder).rglob("*.py")
        if '("grpc.' in path.read_text(encoding="utf-8")
    }
    assert naming == {"channel_arguments.py"}
