"""The guide's training command: turns flags into the trainer's configuration and runs the trainer."""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.recipe.flags import read_flags
from kvcore.errors import ConfigError, KVDistillError
from kvcore.extras import require

EXIT_FAILED = 1
EXIT_USAGE = 2


def main(arguments: list[str] | None = None) -> int:
    """Entry point; `--help` shows every flag with examples."""
    program = Path(__file__).name
    try:
        settings = read_flags(sys.argv[1:] if arguments is None else arguments, program)
        require("train", program)
        # Imported late, so that --help and wrong flags answer at once.
        from experiments.recipe.run_recipe import run  # noqa: PLC0415

        run(settings)
    except KVDistillError as error:
        print(f"{program}: {error.line()}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
