"""`kvdistill doctor`: checks whether this machine can serve and train, and whether teachers answer.

Packages are imported in separate processes, since a broken package may crash its process. This module imports no torch.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from kvcore.errors import FieldError, ProtocolError, TeacherError
from kvcore.extras import EXTRAS, install_command, missing
from kvdistill.columns import ENDPOINT, in_columns

GIB = 2**30
# Enough for a checkpoint of a small student and logs.
MIN_FREE_BYTES = 2 * GIB
IMPORT_SECONDS = 120
# A program per package that imports it and prints its version.
PACKAGES = {
    "torch": "import torch; print(torch.__version__)",
    "transformers": "import transformers; print(transformers.__version__)",
    "deepspeed": "import deepspeed; print(deepspeed.__version__)",
    "grpc": "import grpc; print(grpc.__version__)",
}
GPUS = """import torch
for index in range(torch.cuda.device_count()):
    about = torch.cuda.get_device_properties(index)
    print(f"{index}: {about.name}, {about.total_memory / 2**30:.0f} GiB")
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report. `next_step` says how to fix a problem."""

    name: str
    state: Literal["ok", "note", "problem"]
    found: str
    next_step: str = ""


def checks(teachers: Sequence[str], disk: Path) -> list[Check]:
    """Runs all checks in parallel.

    Raises:
        FieldError: a teacher is not given as HOST:PORT.
    """
    for endpoint in teachers:
        if not ENDPOINT.fullmatch(endpoint):
            raise FieldError("--teacher", f"expected HOST:PORT, got '{endpoint}'")
    needed = [name for name in PACKAGES if name not in missing("train")]
    probes: list[Callable[[], Check]] = [lambda name=name: _package(name) for name in needed]
    probes += [_gpus, _memory, lambda: _disk(disk), _port]
    probes += [lambda name=name: _extra(name) for name in EXTRAS]
    probes += [lambda endpoint=endpoint: _teacher(endpoint) for endpoint in teachers]
    with ThreadPoolExecutor(max_workers=4) as pool:
        return [_python(), *pool.map(lambda probe: probe(), probes)]


def report(found: Sequence[Check]) -> str:
    """Formats the checks as text: one line each, followed by the next step if there is one."""
    lines = in_columns([(check.state, check.name, check.found) for check in found]).splitlines()
    return "\n".join(_with_next_steps(lines, found))


def _with_next_steps(lines: Sequence[str], found: Sequence[Check]) -> Iterator[str]:
    for line, check in zip(lines, found, strict=True):
        yield line
        if check.next_step:
            yield f"         next: {check.next_step}"


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("python", "ok", f"{version} in {sys.prefix}")


def _run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=IMPORT_SECONDS
    )


def _package(name: str) -> Check:
    try:
        done = _run(PACKAGES[name])
    except subprocess.TimeoutExpired:
        return Check(
            name, "problem", f"import took over {IMPORT_SECONDS} s", f"check whether the disk of {sys.prefix} is slow"
        )
    if done.returncode == 0:
        return Check(name, "ok", done.stdout.split()[-1])
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    step = "in a checkout, run make setup; elsewhere, reinstall kvdistill"
    return Check(name, "problem", f"cannot be imported: {reason}", step)


def _gpus() -> Check:
    try:
        done = _run(GPUS)
    except subprocess.TimeoutExpired:
        return Check(
            "GPUs", "problem", f"no answer in {IMPORT_SECONDS} s", "check with nvidia-smi whether the driver hangs"
        )
    if done.returncode == 0 and done.stdout.strip():
        return Check("GPUs", "ok", "; ".join(done.stdout.split("\n")[:-1]))
    if shutil.which("nvidia-smi"):
        step = "install a CUDA build of torch that the driver supports; nvidia-smi shows the driver version"
        return Check("GPUs", "problem", "torch finds no GPU, although nvidia-smi is installed", step)
    return Check("GPUs", "note", "none; models run on the CPU, which is only suitable for small models")


def _memory() -> Check:
    memory = psutil.virtual_memory()
    return Check("memory", "ok", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available")


def _disk(path: Path) -> Check:
    path = path.absolute()
    above = next(folder for folder in (path, *path.parents) if folder.is_dir())
    free = shutil.disk_usage(above).free
    found = f"{free / GIB:.1f} GiB free for {path}"
    if not os.access(above, os.W_OK):
        return Check("disk", "problem", f"{above} is not writable", "choose another folder with --output")
    if free < MIN_FREE_BYTES:
        step = f"a run needs at least {MIN_FREE_BYTES / GIB:.0f} GiB: choose another folder with --output"
        return Check("disk", "problem", found, step)
    return Check("disk", "ok", found)


def _port() -> Check:
    try:
        with closing(socket.socket()) as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            return Check("ports", "ok", "servers can listen on 127.0.0.1")
    except OSError as error:
        return Check(
            "ports",
            "problem",
            f"cannot listen on 127.0.0.1: {error}",
            "ask the administrator of this machine or container",
        )


def _extra(name: str) -> Check:
    if lacking := missing(name):
        found = f"not installed: {', '.join(lacking)}; to install: {install_command(name)}"
        return Check(f"extra {name}", "note", found)
    return Check(f"extra {name}", "ok", ", ".join(EXTRAS[name]))


def _teacher(endpoint: str) -> Check:
    from kvdistill.describe import describe  # noqa: PLC0415 - imports torch, which only this check needs

    name = f"teacher {endpoint}"
    try:
        info = describe(endpoint)
    except TeacherError as error:
        step = (
            "check that kvdistill serve runs there (with --grpc-host 0.0.0.0 for other machines) and the port is open"
        )
        return Check(name, "problem", error.problem, step)
    except ProtocolError as error:
        return Check(name, "problem", str(error), error.next_step)
    found = f"{info.model}: {info.layers} layers, {info.kv_heads} KV heads of {info.head_dim}, {info.dtype}"
    return Check(name, "ok", found)
