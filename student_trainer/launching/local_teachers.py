"""Teacher servers on this machine: a `kvdistill serve` process per model, ended on leaving the block. Torch-free."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from kvcore.errors import ConfigError, FieldError, TeacherUnavailableError
from student_trainer.launching.processes import end, killed_with_parent, start_logged, tail
from student_trainer.launching.transport_variables import TLS_CA

logger = logging.getLogger(__name__)

# A 70B model from a shared disk takes most of this.
READY_SECONDS = 1800.0
_POLL_SECONDS = 0.2
_REPORT_SECONDS = 15.0


class LocalTeachers:
    """Servers on loopback ports that the system picks. Entering waits until all are ready and gives their endpoints.

    They end with the block, and with this process if it is killed. With several GPUs, `device` `cuda` or `auto` deals
    the models out to them in turn.

    Args:
        models: directories or hub ids that transformers loads, by the teacher's name; a list is named by
            `teacher_names`.
        log_dir: each server writes `serve_<name>.log` there.
        device: auto, cpu, cuda or cuda:N.
        dtype: of the weights: auto, fp32, bf16 or fp16.
        load_in_8bit: quantises the weights; needs a GPU.
        options: further flags of `kvdistill serve`, such as `{"threads": 1}`; None or False leaves a flag out.
        environment: of the servers, added to this process's own.
        ready_seconds: how long loading may take.
    """

    def __init__(
        self,
        models: Mapping[str, str] | Sequence[str],
        log_dir: Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        load_in_8bit: bool = False,
        options: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
        ready_seconds: float = READY_SECONDS,
    ) -> None:
        if os.environ.get(TLS_CA):
            raise FieldError(TLS_CA, "is set, and servers that are started here speak plain gRPC on loopback; unset it")
        named = models if isinstance(models, Mapping) else teacher_names(models)
        flags = {"dtype": dtype, "load_in_8bit": load_in_8bit, **(options or {})}
        self._servers = [
            _Server(name, model, log_dir / f"serve_{name}.log", {**flags, "device": place}, environment)
            for (name, model), place in zip(named.items(), _places(device, len(named)), strict=True)
        ]
        self._ready_seconds = ready_seconds
        self._running = ExitStack()

    def __enter__(self) -> dict[str, str]:
        """Starts all servers and returns `host:port` of each by name once all are ready.

        Raises:
            TeacherUnavailableError: a server ended or was not ready in time; with the end of its log.
        """
        with self._running as undo:
            for server in self._servers:
                undo.enter_context(server)
            self._wait_ready()
            self._running = undo.pop_all()
        return {server.name: server.endpoint for server in self._servers}

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def check_alive(self) -> None:
        """Raises a TeacherUnavailableError, with the end of its log, for a server that has died."""
        for server in self._servers:
            server.check_alive()

    @property
    def peak_memory_mb(self) -> dict[str, float]:
        """The most resident memory of each server in MiB, as last seen by `check_alive` or at the end."""
        return {server.name: server.peak_memory_mb for server in self._servers}

    def _wait_ready(self) -> None:
        started = reported = time.monotonic()
        while waiting := [server for server in self._servers if not server.ready()]:
            self.check_alive()
            now = time.monotonic()
            if now - started > self._ready_seconds:
                raise waiting[0].lost(f"was not ready after {self._ready_seconds:.0f} s")
            if now - reported > _REPORT_SECONDS:
                reported = now
                names = ", ".join(server.name for server in waiting)
                logger.info("waiting for %s to load (%.0f s)", names, now - started)
            time.sleep(_POLL_SECONDS)


class _Server:
    """One `kvdistill serve` process."""

    def __init__(
        self, name: str, model: str, log: Path, flags: Mapping[str, object], environment: Mapping[str, str] | None
    ) -> None:
        self.name = name
        self.endpoint = ""
        self.peak_memory_mb = 0.0
        self._log, self._environment = log, environment
        serve = [sys.executable, "-m", "kvdistill", "serve", "--model", model, "--name", name]
        self._command = [*serve, "--grpc-port", "0", "--http-port", "0", *as_arguments(flags)]
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._process = start_logged(killed_with_parent(self._command), self._log, self._environment)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._measure()
            end(self._process)

    def ready(self) -> bool:
        """Whether the log says that requests are taken, and where."""
        if not self.endpoint and (event := find_event(self._log, "ready")):
            self.endpoint = f"127.0.0.1:{event['grpc_port']}"
        return bool(self.endpoint)

    def check_alive(self) -> None:
        assert self._process is not None
        if self._process.poll() is not None:
            raise self.lost(f"its server ended with code {self._process.returncode}")
        self._measure()

    def lost(self, problem: str) -> TeacherUnavailableError:
        return TeacherUnavailableError(self.name, f"{problem}; the end of {self._log}:\n{tail(self._log)}")

    def _measure(self) -> None:
        assert self._process is not None
        if self._process.poll() is not None:
            return
        for line in Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                self.peak_memory_mb = int(line.split()[1]) / 1024


def teacher_names(models: Sequence[str]) -> dict[str, str]:
    """Names for models: the last part of the path or hub id, as a folder may be called; models by name, in order.

    Raises:
        ConfigError: none is given, or a model has no name.
        FieldError: a model is given twice, which would be one teacher counted twice.
    """
    if not models:
        raise ConfigError("teacher_models: name at least one model")
    named: dict[str, str] = {}
    for model in models:
        if model in named.values():
            raise FieldError("teacher_models", f"'{model}' is given twice")
        base = re.sub(r"[^A-Za-z0-9_.-]+", "_", model.rstrip("/").rpartition("/")[2]).lstrip(".")[:60]
        if not base:
            raise FieldError("teacher_models", f"'{model}' is no model's directory or hub id")
        named[next(name for name in _candidates(base) if name not in named)] = model
    return named


def _candidates(base: str) -> Iterator[str]:
    """base, base.2, base.3, ..."""
    yield base
    yield from (f"{base}.{number}" for number in itertools.count(2))


def as_arguments(flags: Mapping[str, object]) -> list[str]:
    """Flags as a command line takes them; None or False leaves one out, True gives it alone."""
    arguments: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        arguments.append(f"--{name.replace('_', '-')}")
        if value is not True:
            arguments.append(str(value))
    return arguments


def _places(device: str, count: int) -> list[str]:
    """The device of each server."""
    gpus = _gpus() if device in ("auto", "cuda") and count > 1 else 0
    return [f"cuda:{index % gpus}" if gpus > 1 else device for index in range(count)]


def _gpus() -> int:
    import torch  # noqa: PLC0415 - slow to import, and not needed on a CPU

    return torch.cuda.device_count()


def find_event(log: Path, name: str) -> dict[str, Any] | None:
    """The first line of a server's log that tells of an event; libraries may write other lines between."""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if f'"{name}"' not in line:
            continue
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            # Still being written.
            continue
        if isinstance(event, dict) and event.get("event") == name:
            return event
    return None
