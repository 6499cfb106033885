"""Fuzzes what reads bytes of others, guided by coverage: requests, frames and stores (`make fuzz`).

Each target runs in a process of its own. The first input that makes kvdistill fail with a foreign error ends the run.
It is kept in outputs/fuzz, and `--repeat FILE --target NAME` runs it again.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts.run_checks import print_line

FOLDER = Path("outputs/fuzz")
# The targets, and their parts of the inputs: reading a store takes much longer than the others.
PARTS = {"requests": 0.3, "prompts": 0.3, "frames": 0.35, "store": 0.05}
# A target may take this long for one input.
TIMEOUT_SECONDS = 10


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="inputs in total (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the random changes (default: %(default)s)")
    parser.add_argument("--target", choices=list(PARTS), action="append", help="fuzz only this one; may be repeated")
    parser.add_argument("--repeat", type=Path, help="run one kept input instead")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    targets = arguments.target or list(PARTS)
    if arguments.in_this_process:
        return _fuzz(targets[0], arguments.inputs, arguments.seed, arguments.repeat)
    together = sum(PARTS[name] for name in targets)
    for name in targets:
        print_line(f"\n=== {name}")
        inputs = round(arguments.inputs * PARTS[name] / together)
        share = ["--inputs", str(inputs), "--seed", str(arguments.seed)]
        repeat = ["--repeat", str(arguments.repeat)] if arguments.repeat else []
        command = [sys.executable, "-m", "tests.fuzz", "--in-this-process", "--target", name, *share, *repeat]
        if subprocess.run(command, check=False).returncode:
            print_line(f"{name}: failed; the input is in {FOLDER / name}, its traceback above")
            return 1
    return 0


def _fuzz(name: str, inputs: int, seed: int, repeat: Path | None) -> int:
    # Its type stubs lack some functions.
    atheris: Any = importlib.import_module("atheris")

    with atheris.instrument_imports(include=["kvcore.wire", "kvcore.store", "kvcore.plan", "teacher_server.requests"]):
        from tests.fuzz.targets import TARGETS  # noqa: PLC0415  its imports are instrumented
    # Warnings of damaged journals would fill the terminal.
    logging.getLogger("kvcore.store").setLevel(logging.ERROR)
    target = TARGETS[name]
    corpus, kept = FOLDER / name / "corpus", FOLDER / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(content)
    longest = 4 * max(map(len, target.seeds))
    flags = [f"-runs={inputs}", f"-seed={seed}", f"-max_len={longest}", f"-timeout={TIMEOUT_SECONDS}", "-verbosity=0"]
    where = [str(repeat)] if repeat else [f"-artifact_prefix={kept}/", "-print_final_stats=1", str(corpus)]
    atheris.Setup([sys.argv[0], *flags, *where], target)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
