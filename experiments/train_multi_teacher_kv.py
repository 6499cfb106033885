"""The guide's training command: translates its flags to the trainer's configuration, and trains."""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.recipe.config import FLAGS
from kvcore.command_line import run_command
from kvcore.extras import require


def main(arguments: list[str] | None = None) -> int:
    """Entry point; `--help` shows every flag with examples."""
    program = Path(__file__).name

    def command() -> None:
        settings = FLAGS.read(sys.argv[1:] if arguments is None else arguments, program)
        require("train", program)
        from experiments.recipe.run_recipe import run  # noqa: PLC0415 - slow to import

        run(settings)

    return run_command(program, command)


if __name__ == "__main__":
    sys.exit(main())
