"""`kvdistill doctor`: checks whether this machine can serve and train, whether teachers answer, and a run's inputs.

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

from kvcore.early_checks import check_model
from kvcore.endpoints import check_endpoint
from kvcore.errors import ConfigError, FieldError, ProtocolError, TeacherError
from kvcore.extras import EXTRAS, install_command, missing
from kvcore.models.files import model_config, parameter_count
from kvdistill.columns import in_columns
from student_trainer.config import TrainConfig

GIB = 2**30
# Enough for a checkpoint of a small student and logs.
MIN_FREE_BYTES = 2 * GIB
# Of a checkpoint: fp32 weights and both moments.
CHECKPOINT_BYTES = 12
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


def checks(teachers: Sequence[str], output: Path | None = None, run: TrainConfig | None = None) -> list[Check]:
    """Runs all checks in parallel.

    Args:
        teachers: HOST:PORT of servers.
        output: the directory to which runs will write; by default that of `run`, or `outputs`.
        run: a run whose student, data and teachers are checked, too.

    Raises:
        FieldError: a teacher is not given as HOST:PORT.
    """
    teachers = [*teachers, *(endpoint for teacher in (run.teachers if run else ()) for endpoint in teacher.endpoints)]
    for endpoint in teachers:
        try:
            check_endpoint(endpoint)
        except ValueError as error:
            raise FieldError("--teacher", f"{error}, got '{endpoint}'") from error
    needed = [name for name in PACKAGES if name not in missing("train")]
    probes: list[Callable[[], Check]] = [lambda name=name: _package(name) for name in needed]
    probes += [_gpus, _memory, lambda: _disk(output, run), _port]
    probes += [lambda name=name: _extra(name) for name in EXTRAS]
    probes += [lambda endpoint=endpoint: _teacher(endpoint) for endpoint in teachers]
    if run is not None:
        probes += [lambda: _student(run.student.path)]
        probes += [lambda field=field, path=path: _data(field, path) for field, path in _data_of(run)]
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


def _disk(output: Path | None, run: TrainConfig | None) -> Check:
    path = (output or (run.run.output_dir if run else Path("outputs"))).absolute()
    other = "choose another folder with --output" if output or not run else "set run.output_dir to another folder"
    above = next(folder for folder in (path, *path.parents) if folder.is_dir())
    free = shutil.disk_usage(above).free
    found = f"{free / GIB:.1f} GiB free for {path}"
    if not os.access(above, os.W_OK):
        return Check("disk", "problem", f"{above} is not writable", other)
    if free < (needed := max(MIN_FREE_BYTES, _checkpoint_bytes(run) if run else 0)):
        return Check("disk", "problem", found, f"this needs at least {needed / GIB:.1f} GiB: {other}")
    return Check("disk", "ok", found)


def _checkpoint_bytes(run: TrainConfig) -> int:
    """Bytes of the checkpoints of all stages, while one more is being written; 0 if the student's size is unknown."""
    kept = sum(run.stage(index).run.keep_checkpoints for index in range(len(run.stages))) or run.run.keep_checkpoints
    try:
        return (kept + 1) * CHECKPOINT_BYTES * parameter_count(Path(run.student.path).expanduser(), "student.path")
    except FieldError:
        return 0  # The check of the student reports it.


def _student(path: str) -> Check:
    try:
        check_model(path, "student.path")
    except FieldError as error:
        return Check("student", "problem", error.problem, "set student.path to a model's directory or a hub id")
    directory = Path(path).expanduser()
    if not directory.is_dir():
        return Check("student", "note", f"'{path}' is a hub id, which is not checked; a run downloads it")
    kind = model_config(directory, path, "student.path").get("model_type", "unknown type")
    millions = parameter_count(directory, "student.path") / 1e6
    return Check("student", "ok", f"{path}: {kind}, {millions:,.1f} million parameters")


def _data_of(run: TrainConfig) -> Iterator[tuple[str, Path]]:
    """The data files of a run, or of its stages."""
    seen: set[Path] = set()
    for stage in [run.stage(index) for index in range(len(run.stages))] or [run]:
        for field, path in (("data.train", stage.data.train), ("data.val", stage.data.val)):
            if path is not None and path not in seen:
                seen.add(path)
                yield field, path


def _data(field: str, path: Path) -> Check:
    from data.records import load_records  # noqa: PLC0415 - imports torch, which only some checks need

    try:
        return Check(field, "ok", f"{path}: {len(load_records(path)):,} records")
    except ConfigError as error:
        return Check(field, "problem", str(error), "docs/data.md describes the records")


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
