"""Tests of the peak memory of processes."""

from __future__ import annotations

import subprocess
import sys

from kvcore.monitoring.process_memory import peak_memory_mib

CHILD = "from kvcore.monitoring.process_memory import peak_memory_mib; {}; print(peak_memory_mib())"
BLOCK_MIB = 300


def peak_of_child(statement: str) -> float:
    ended = subprocess.run([sys.executable, "-c", CHILD.format(statement)], capture_output=True, text=True, check=True)
    return float(ended.stdout)


def test_peak_includes_memory_that_was_freed() -> None:
    assert peak_of_child(f"bytearray({BLOCK_MIB} << 20)") - peak_of_child("pass") > 0.9 * BLOCK_MIB


def test_a_process_does_not_inherit_the_peak_of_its_parent() -> None:
    block = bytearray(BLOCK_MIB << 20)
    assert peak_memory_mib() > len(block) >> 20
    assert peak_of_child("pass") < BLOCK_MIB


def test_an_ended_process_has_no_peak() -> None:
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read()  # Until it ends; its status is not collected yet.
        while peak_memory_mib(process.pid) > 0:
            pass
