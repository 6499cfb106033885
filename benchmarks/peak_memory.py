"""Peak memory of one function in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from kvcore.monitoring.process_memory import peak_memory_mib


def peak_mib(prepare: Callable[..., Callable[[], object]], *arguments: object) -> float | None:
    """Growth of a new process's resident memory, in MiB, while it runs what `prepare(*arguments)` returned.

    None if the process was killed, as the kernel does when memory is exhausted.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, prepare, arguments))
    process.start()
    sender.close()
    try:
        return float(receiver.recv())
    except EOFError:
        return None
    finally:
        process.join()


def _measure(sender: Connection, prepare: Callable[..., Callable[[], object]], arguments: tuple[object, ...]) -> None:
    run = prepare(*arguments)
    # Sets the peak to the current size; otherwise it includes that of the preparation.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = peak_memory_mib()
    run()
    sender.send(peak_memory_mib() - before)
