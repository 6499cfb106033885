"""Memory of a rank, as metrics of a logged step."""

from __future__ import annotations

import psutil
import torch


def memory_figures() -> dict[str, float]:
    """The process's resident memory now and, with a GPU, the most that its tensors have taken there so far, in MiB."""
    figures = {"memory/host_mib": psutil.Process().memory_info().rss / 2**20}
    if torch.cuda.is_available():
        figures["memory/gpu_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return figures
