"""`python -m kvdistill`: what launchers such as torchrun start."""

from __future__ import annotations

from kvdistill.cli import main

if __name__ == "__main__":
    main()
