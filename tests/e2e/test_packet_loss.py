"""A network that drops packets at random: the K/V are those of a network that drops none.

The test runs server and client in a network namespace of their own, whose firewall drops packets.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.support.servers import REPOSITORY

pytestmark = pytest.mark.slow

DROPPED_PERCENT = (0, 1, 5)
SCRIPT = """
import json, sys, tempfile
from pathlib import Path
from kvdistill import TeacherClient
from tests.support.servers import running_teacher

texts = [f"Start at {number}. " + "one and two is three, " * (number % 40 + 5) for number in range(160)]
with running_teacher("fake:layers=3,heads=2,dim=32", Path(tempfile.mkdtemp()) / "log", engine="fake") as teacher:
    with TeacherClient(teacher.endpoint, timeout_s=60.0, patience_s=60.0) as client:
        parts = [client.fetch(texts[at : at + 8], codec="raw") for at in range(0, len(texts), 8)]
print(json.dumps([float((kv.k_BLHMD.double() * kv.v_BLHMD.double()).sum()) for kv in parts]))
"""
NETWORK = """
set -e
ip link set lo up
nft add table inet loss
nft add chain inet loss input '{{ type filter hook input priority 0; }}'
nft add rule inet loss input numgen random mod 100 '<' {percent} counter drop
status=0
"$@" || status=$?
nft list table inet loss >&2
exit $status
"""


def in_namespace(script: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["unshare", "--net", "bash", "-c", script, "network", *command],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def why_impossible() -> str | None:
    missing = [tool for tool in ("unshare", "ip", "nft") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} missing; as root: apt-get install util-linux iproute2 nftables"
    if in_namespace(NETWORK.format(percent=1), "true").returncode != 0:
        return "this system does not let the user make a network namespace with a firewall"
    return None


@pytest.mark.timeout(900)
def test_dropped_packets_change_no_kv() -> None:
    if (reason := why_impossible()) is not None:
        pytest.skip(reason)
    found: dict[int, list[float]] = {}
    for percent in DROPPED_PERCENT:
        done = in_namespace(NETWORK.format(percent=percent), sys.executable, "-c", SCRIPT)
        assert done.returncode == 0, done.stderr[-3000:]
        dropped = int(done.stderr.rsplit("packets ", 1)[1].split()[0])
        assert (dropped > 0) == (percent > 0), done.stderr[-500:]
        found[percent] = json.loads(done.stdout.splitlines()[-1])
    assert found[0] == found[1] == found[5]
    assert len(set(found[0])) > 1
