"""Teacher servers on this machine, one per model, ended on leaving the block. Does not import torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvcore.errors import FieldError
from kvcore.monitoring.process_memory import peak_memory_mib
from student_trainer.launching.endpoints import teacher_names
from student_trainer.launching.hosts import LocalHost
from student_trainer.launching.teacher_servers import READY_SECONDS, TeacherServers, as_arguments
from student_trainer.launching.transport_variables import TLS_CA


class LocalTeachers:
    """Servers on loopback ports that the system picks. Entering waits until all are ready and gives their endpoints.

    They end with the block, and with this process if it is killed. If there are several GPUs and several models,
    `device` `cuda` or `auto` assigns the models to the GPUs in turn.

    Args:
        models: directories or hub ids that transformers loads, by teacher name; `teacher_names` names those of a list.
        log_dir: each server writes `serve_<name>.log` there.
        device: auto, cpu, cuda or cuda:N.
        dtype: of the weights: auto, fp32, bf16 or fp16.
        load_in_8bit: quantises the weights; needs a GPU.
        options: further flags of `kvdistill serve`, such as `{"threads": 1}`; None or False omits a flag.
        environment: variables of the servers, added to this process's own.
        ready_seconds: how long loading may take.

    Raises:
        FieldError: KVDISTILL_TLS_CA is set, but these servers do not speak TLS.
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
            raise FieldError(TLS_CA, "is set, but servers started by this command use plain gRPC on loopback; unset it")
        self._models = dict(models) if isinstance(models, Mapping) else teacher_names(models)
        self._devices = _devices(device, len(self._models))
        self._flags = {"dtype": dtype, "load_in_8bit": load_in_8bit, **(options or {})}
        self._environment, self._ready_seconds = environment, ready_seconds
        self._host = LocalHost()
        self._servers = TeacherServers(self._host, log_dir)
        self.peak_memory_mb: dict[str, float] = {}
        """The peak resident memory of each server in MiB, as of the last `check_alive` or the end."""

    def __enter__(self) -> dict[str, str]:
        """Starts all servers and returns `host:port` of each by name once all are ready.

        Raises:
            TeacherUnavailableError: a server ended or was not ready in time; with the end of its log.
        """
        try:
            for (name, model), device in zip(self._models.items(), self._devices, strict=True):
                flags = as_arguments({"model": model, "device": device, **self._flags})
                self._servers.start(name, self._host.nodes[0], flags, self._environment)
            return {name: endpoint for name, (endpoint,) in self._servers.wait_ready(self._ready_seconds).items()}
        except BaseException:
            self._servers.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self._measure()
        self._servers.stop()

    def check_alive(self) -> None:
        """Raises a TeacherUnavailableError, with the end of the log, if a server has ended."""
        self._servers.check_alive()
        self._measure()

    def _measure(self) -> None:
        for name, process in self._servers.processes:
            if process.poll() is None:
                self.peak_memory_mb[name] = max(peak_memory_mib(process.pid), self.peak_memory_mb.get(name, 0.0))


def _devices(device: str, count: int) -> list[str]:
    """The device of each server."""
    gpus = _gpus() if device in ("auto", "cuda") and count > 1 else 0
    return [f"cuda:{index % gpus}" if gpus > 1 else device for index in range(count)]


def _gpus() -> int:
    import torch  # noqa: PLC0415 - slow to import, and not needed on a CPU

    return torch.cuda.device_count()
