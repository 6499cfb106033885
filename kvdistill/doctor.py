"""`kvdistill doctor`: whether this machine can serve and train, and whether teachers answer. Free of torch.

Packages are imported in processes of their own: a broken one may end its process, and all of them take their time.
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
# A checkpoint of a small student, and logs.
LEAST_FREE_BYTES = 2 * GIB
IMPORT_SECONDS = 120
# What each package is needed for, and a program that says what was found. The import alone can fail.
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
    """One line of the report. `next_step` says what to do where something is missing."""

    name: str
    state: Literal["ok", "note", "problem"]
    found: str
    next_step: str = ""


def checks(teachers: Sequence[str], disk: Path) -> list[Check]:
    """Looks at everything: what does not depend on one another at the same time.

    Raises:
        FieldError: a teacher is not given as host:port.
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
    """The checks as text: a line for each, and below it what to do next."""
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
            name, "problem", f"its import took over {IMPORT_SECONDS} s", f"see whether the disk of {sys.prefix} is slow"
        )
    if done.returncode == 0:
        return Check(name, "ok", done.stdout.split()[-1])
    reason = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
    step = "in a checkout: make setup, which builds .venv from the pinned files; elsewhere: install kvdistill again"
    return Check(name, "problem", f"cannot be imported: {reason}", step)


def _gpus() -> Check:
    try:
        done = _run(GPUS)
    except subprocess.TimeoutExpired:
        return Check(
            "GPUs", "problem", f"asking took over {IMPORT_SECONDS} s", "nvidia-smi says whether the driver hangs"
        )
    if done.returncode == 0 and done.stdout.strip():
        return Check("GPUs", "ok", "; ".join(done.stdout.split("\n")[:-1]))
    if shutil.which("nvidia-smi"):
        step = "install a CUDA build of torch whose CUDA the driver knows; nvidia-smi shows the driver"
        return Check("GPUs", "problem", "none that torch can use, though nvidia-smi is here", step)
    return Check("GPUs", "note", "none: models run on the CPU, which is for small ones")


def _memory() -> Check:
    memory = psutil.virtual_memory()
    return Check("memory", "ok", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available")


def _disk(path: Path) -> Check:
    path = path.absolute()
    above = next(folder for folder in (path, *path.parents) if folder.is_dir())
    free = shutil.disk_usage(above).free
    found = f"{free / GIB:.1f} GiB free for {path}"
    if not os.access(above, os.W_OK):
        return Check("disk", "problem", f"{above} cannot be written to", "name another folder with --output")
    if free < LEAST_FREE_BYTES:
        step = (
            f"a run needs {LEAST_FREE_BYTES / GIB:.0f} GiB and more for checkpoints: name another folder with --output"
        )
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
            "ports", "problem", f"cannot listen on 127.0.0.1: {error}", "ask who runs this machine or container"
        )


def _extra(name: str) -> Check:
    if lacking := missing(name):
        found = f"without {', '.join(lacking)}; where needed: {install_command(name)}"
        return Check(f"extra {name}", "note", found)
    return Check(f"extra {name}", "ok", ", ".join(EXTRAS[name]))


def _teacher(endpoint: str) -> Check:
    from kvdistill.describe import describe  # noqa: PLC0415 - brings torch, which only this check needs

    name = f"teacher {endpoint}"
    try:
        info = describe(endpoint)
    except TeacherError as error:
        step = "is kvdistill serve running there, with --grpc-host 0.0.0.0 for other machines, and this port open?"
        return Check(name, "problem", error.problem, step)
    except ProtocolError as error:
        return Check(name, "problem", str(error), error.next_step)
    found = f"{info.model}: {info.layers} layers, {info.kv_heads} KV heads of {info.head_dim}, {info.dtype}"
    return Check(name, "ok", found)
