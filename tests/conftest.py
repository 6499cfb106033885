"""What every test shares: a quiet environment, markers by folder, and no process left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

# Before torch and transformers are imported, here and in every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A busy machine is no failure. Inputs are the same in every run, unless HYPOTHESIS_PROFILE is random.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

TESTS = Path(__file__).resolve().parent
FOLDERS = ("unit", "contract", "wheel", "integration", "e2e", "e2e_slurm", "vllm", "real")
E2E_TIMEOUT_S = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder not in FOLDERS:
            raise pytest.UsageError(f"{item.path}: tests live in one of {', '.join(FOLDERS)}")
        item.add_marker(folder)
        if folder.startswith(("e2e", "vllm", "wheel", "real")) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(E2E_TIMEOUT_S))


@pytest.fixture(scope="session", autouse=True)
def no_process_outlives_the_tests() -> Iterator[None]:
    """Whoever starts a process ends it: what is left is killed here, and fails the run by name."""
    before = set(psutil.Process().children(recursive=True))
    yield
    started = [child for child in psutil.Process().children(recursive=True) if child not in before]
    _, alive = psutil.wait_procs([child for child in started if not _is_resource_tracker(child)], timeout=5)
    for child in alive:
        child.kill()
    assert not alive, f"tests left processes running: {alive}"


def _is_resource_tracker(process: psutil.Process) -> bool:
    """multiprocessing keeps one of its own for as long as its parent lives."""
    try:
        return any("resource_tracker" in argument for argument in process.cmdline())
    except psutil.NoSuchProcess:
        return True
