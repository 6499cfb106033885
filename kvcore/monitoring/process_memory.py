"""Peak memory of a process."""

from __future__ import annotations

from pathlib import Path


def peak_memory_mib(pid: int | str = "self") -> float:
    """A process's peak resident memory in MiB; 0 if it has ended and its status has not been read yet.

    `ru_maxrss` of getrusage does not serve: a new process inherits it from the one that started it.
    """
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)
