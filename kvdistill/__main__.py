"""The command `kvdistill`, and `python -m kvdistill`, which launchers such as torchrun start."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from kvdistill.own_packages import ROOT, shadowed


def main() -> None:
    """Checks that no other folder hides kvdistill's packages, then runs the command line."""
    if problem := shadowed():
        sys.stderr.write(f"kvdistill: {problem}\n")
        sys.exit(2)
    # Child processes start with `python -m`, which searches the current directory first. That is only wanted if this
    # process found kvdistill there.
    if Path(sys.path[0]).resolve() != ROOT:  # noqa: TID251 - only read
        os.environ.setdefault("PYTHONSAFEPATH", "1")
    from kvdistill.cli import main as run  # noqa: PLC0415 - imports packages that may be hidden

    run()


if __name__ == "__main__":
    main()
