"""`benchmarks.scale` and `benchmarks.transport` on small sizes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import scale
from benchmarks.scale import Arm, Sizes
from tests.support.servers import REPOSITORY


@pytest.mark.slow
def test_every_round_after_the_first_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "MOST_SERVERS", 2)
    sizes = Sizes(batches=2, samples=2, tokens=20, rounds=2)
    arms = [Arm(2, replicas=2), Arm(1, teachers=2)]
    found = scale.run(sizes, arms)
    assert {arm: len(rounds) for arm, rounds in found.items()} == {arms[0]: 2, arms[1]: 2}
    for arm, rounds in found.items():
        # A server never answers before its sleep has ended.
        assert 0 < scale.figures(arm, rounds, sizes)["forward_share"] <= 1
        assert 0 < min(one.least_share for one in rounds) <= 1


def test_every_transport_sends_every_byte() -> None:
    flags = ["--frame-bytes", "100000", "300000", "--megabytes", "5", "--rounds", "1"]
    command = [sys.executable, "-m", "benchmarks.transport", *flags]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    sizes = json.loads(ended.stdout.splitlines()[-1])["sizes"]
    arms = {"identity", "identity_unix", "protobuf", "shared_memory", "flight", "socket"}
    assert [found["frame_bytes"] for found in sizes] == [100_000, 300_000]
    for found in sizes:
        assert {name for name, value in found.items() if isinstance(value, dict)} == arms | {"ratios"}
        assert min(found[arm]["cpu_s_per_gb"] for arm in arms) > 0
