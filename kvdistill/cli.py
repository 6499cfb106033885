"""The command line: arguments only. What a command needs is imported inside it, so that `--help` is instant."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcore.config import load_config
from kvcore.errors import ConfigError, KVDistillError
from kvcore.flags import FlagSet
from kvdistill.passed_on import SETTINGS, passed_on
from kvdistill.serve_flags import serve_config, with_serve_flags
from student_trainer.config import TrainConfig

EXIT_FAILED = 1
EXIT_USAGE = 2

SERVE_EXAMPLES = """**Examples**

`kvdistill serve --model meta-llama/Llama-3.1-8B-Instruct --grpc-port 50051 --http-port 8001`

`kvdistill serve --model /models/qwen --dtype bf16 --device cuda:1 --grpc-host 0.0.0.0 --grpc-port 50052`

`kvdistill serve --engine fake --model fake:layers=3,heads=2,dim=16`
"""

TRAIN_EXAMPLES = """**Examples**

`kvdistill train --config run.yaml`

`torchrun --standalone --nproc_per_node 2 -m kvdistill train --config run.yaml --set run.steps=500`

`deepspeed --num_gpus 8 --module kvdistill train --config run.yaml --set run.zero_stage=3`

`kvdistill train --config run.yaml --set kv.mode=offline --set teachers.0.weight=2.0`

`kvdistill train --config configs/train/three_stage.yaml --set stages.2.fuse.router=gate`
"""

DEMO_EXAMPLES = """**Examples**

`kvdistill demo`

`kvdistill demo --quick --output outputs/quick`

`kvdistill demo --seeds 3`
"""

REPORT_EXAMPLES = """**Examples**

`kvdistill report outputs/three_stage_routing`

`kvdistill report outputs/run_a outputs/run_b --output outputs/compared`
"""

SWEEP_EXAMPLES = """**Examples**

`kvdistill sweep configs/sweeps/compression.yaml --list`

`kvdistill sweep configs/sweeps/compression.yaml`

`kvdistill sweep configs/sweeps/compression.yaml --slurm --set slurm.partition=gpu`

`kvdistill sweep configs/sweeps/compression.yaml --table`
"""

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one key of the file; repeat for more.")
]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def _extract_flags() -> FlagSet[Any]:
    from extraction.flags import FLAGS

    return FLAGS


def _eval_flags() -> FlagSet[Any]:
    from evaluation.settings import FLAGS

    return FLAGS


def main() -> None:
    """Runs the command line. Errors that users meet end in one line on stderr, never in a traceback."""
    try:
        app()
    except KVDistillError as error:
        typer.echo(f"kvdistill: {_rank()}{error}", err=True)
        sys.exit(EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED)


def _rank() -> str:
    """Says which process of several speaks."""
    return f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


@app.callback()
def launched(
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    """Train a small student LLM to match the key/value caches of large teachers, pulled live over gRPC."""
    # The deepspeed launcher passes --local_rank to whatever it starts; the same number is in LOCAL_RANK.


@app.command(epilog=SERVE_EXAMPLES)
@with_serve_flags
def serve(**flags: Any) -> None:
    """Serve one teacher's K/V over gRPC until SIGTERM, then drain."""
    config = serve_config(flags)
    from teacher_server.app import run

    run(config)


@app.command(epilog=TRAIN_EXAMPLES)
def train(
    config: Annotated[Path, typer.Option(help="YAML file; docs/configuration.md lists its keys.")],
    overrides: Overrides = None,
) -> None:
    """Train a student on its teachers' K/V. Start it with torchrun or deepspeed for several ranks."""
    overrides = overrides or []
    load_config(config, overrides, TrainConfig)  # Mistakes show before torch is imported.
    from student_trainer.trainer import main as run

    run(config, overrides)


@app.command(cls=passed_on(_extract_flags), add_help_option=False, context_settings=SETTINGS)
def extract(context: typer.Context) -> None:
    """Write the K/V that teachers have for a dataset to a .pt file or a store."""
    from extraction.command import main as run

    raise typer.Exit(run(context.args, "kvdistill extract"))


@app.command("eval", cls=passed_on(_eval_flags), add_help_option=False, context_settings=SETTINGS)
def evaluate(context: typer.Context) -> None:
    """Evaluate a model, thinking in latents or not, on benchmarks with lm-evaluation-harness."""
    from evaluation.multi_task_eval import main as run

    raise typer.Exit(run(context.args, "kvdistill eval"))


@app.command(epilog=DEMO_EXAMPLES)
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps: under 3 minutes.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm.")] = 1,
    output: Annotated[Path, typer.Option(help="Where the report and the picture go.")] = Path("outputs/demo"),
) -> None:
    """Two tiny teachers, two servers, one student: the whole loop on this machine, with controls."""
    from experiments.demo.run import main as run

    run(output=output, quick=quick, seeds=seeds)


@app.command(epilog=REPORT_EXAMPLES)
def report(
    outputs: Annotated[list[Path], typer.Argument(help="Folders of training runs, or folders above some.")],
    output: Annotated[Path, typer.Option(help="Where tables, pictures and the page go.")] = Path("outputs/report"),
) -> None:
    """Compare training runs: scores, learning curves, routing weights, KV loss by layer."""
    from experiments.report.write import write_report

    write_report(outputs, output)


@app.command(epilog=SWEEP_EXAMPLES)
def sweep(
    file: Annotated[Path, typer.Argument(help="YAML file; docs/sweeps.md says what is in it.")],
    overrides: Overrides = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit what is left as a SLURM array.")] = False,
    list_only: Annotated[bool, typer.Option("--list", help="Only say what would run, and what is done.")] = False,
    table_only: Annotated[bool, typer.Option("--table", help="Only write the table of what is done.")] = False,
    task: Annotated[int | None, typer.Option(min=0, help="Run this one alone, by its number in --list.")] = None,
) -> None:
    """Run a matrix of trainings over seeds, resumably, and end in one table with intervals."""
    from experiments.sweep.run import main as run

    run(file, overrides or [], slurm=slurm, list_only=list_only, table_only=table_only, task=task)
