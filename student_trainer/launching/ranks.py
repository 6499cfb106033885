"""Runs the ranks of a training on this machine: `python -m student_trainer.launching.ranks COUNT train --config FILE`.

Like torchrun on one node. But if SIGTERM or SIGINT stops it and every rank saved a checkpoint, it exits with 0, as
container engines expect of a clean stop. Does not import torch.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence

from student_trainer.launching.hosts import TRAINER, LocalHost
from student_trainer.launching.placement import Placement
from student_trainer.launching.processes import end
from student_trainer.launching.teacher_servers import POLL_SECONDS

# Of a rank that a signal ended, after it saved a checkpoint or before there was anything to save.
_STOPPED = {128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT}


def run_ranks(count: int, command: Sequence[str]) -> int:
    """Runs `command` as `count` ranks; the first that fails ends the others. Returns the exit status."""
    host = LocalHost()
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: received.append(number))
    ranks = host.start_ranks(command, Placement(host.nodes, count))
    asked = False
    while None in (codes := [rank.poll() for rank in ranks]) and (asked or not any(codes)):
        if received and not asked:
            asked = True
            # The ranks may have got the same signal, and a second one of the same kind ends them at once.
            other = signal.SIGTERM if received[0] == signal.SIGINT else signal.SIGINT
            host.send_signal(TRAINER, ranks, other)
        time.sleep(POLL_SECONDS)
    end(*ranks)
    failed = [code for code in codes if code and not (asked and code in _STOPPED)]
    return (failed[0] if failed[0] > 0 else 1) if failed else 0


if __name__ == "__main__":
    sys.exit(run_ranks(int(sys.argv[1]), [sys.executable, "-m", "kvdistill", *sys.argv[2:]]))
