"""The command line: arguments only. What a command needs is imported inside it, so that `--help` is instant."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcore.config import load_config
from kvcore.errors import ConfigError, KVDistillError
from kvcore.extras import require
from kvcore.flags import FlagSet
from kvdistill.forwarded import SETTINGS, forwarding_command
from kvdistill.serve_flags import serve_config, with_serve_flags
from student_trainer.config import TrainConfig

EXIT_FAILED = 1
EXIT_USAGE = 2

FIRST_EXAMPLES = """**Examples**

`kvdistill demo --quick`

`kvdistill serve --model Qwen/Qwen2.5-7B --grpc-port 50051`

`kvdistill train --config run.yaml`
"""

SERVE_EXAMPLES = """**Examples**

`kvdistill serve --model meta-llama/Llama-3.1-8B-Instruct --grpc-port 50051 --http-port 8001`

`kvdistill serve --model /models/qwen --dtype bf16 --device cuda:1 --grpc-host 0.0.0.0 --grpc-port 50052`

`kvdistill serve --engine vllm --model meta-llama/Llama-3.1-70B --tensor-parallel-size 8 --dtype bf16 --grpc-port 50051`

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

PLAN_EXAMPLES = """**Examples**

`kvdistill plan --config run.yaml`

`kvdistill plan --config run.yaml --teacher-model qwen14b=Qwen/Qwen2.5-14B --teacher-model llama8b=/models/llama`

`kvdistill plan --config run.yaml --set kv.codec.name=bf16 --set run.global_batch=256`
"""

DOCTOR_EXAMPLES = """**Examples**

`kvdistill doctor`

`kvdistill doctor --teacher node1:50051 --teacher node2:50051`

`kvdistill doctor --config run.yaml --output /scratch/outputs`
"""

INSPECT_EXAMPLES = """**Examples**

`kvdistill inspect node1:50051`

`kvdistill inspect outputs/store`

`kvdistill inspect kv_cache/qwen_dual_teacher/train_kv.pt`

`kvdistill inspect outputs/run/alignment.json`
"""

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one key of the file; repeat for more.")
]

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown", epilog=FIRST_EXAMPLES
)


def _extract_flags() -> FlagSet[Any]:
    from extraction.flags import FLAGS

    return FLAGS


def _eval_flags() -> FlagSet[Any]:
    from evaluation.config import FLAGS

    return FLAGS


def main() -> None:
    """Runs the command line. Errors that users meet end in one line on stderr, never in a traceback."""
    try:
        app()
    except KVDistillError as error:
        typer.echo(f"kvdistill: {_rank()}{error.line()}", err=True)
        sys.exit(EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED)


def _rank() -> str:
    """Says which process of several speaks."""
    return f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def _show_version(wanted: bool) -> None:
    if wanted:
        from kvdistill.version import __version__

        typer.echo(f"kvdistill {__version__}")
        raise typer.Exit


@app.callback()
def launched(
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
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
    require("train", "kvdistill train")
    from student_trainer.loop.trainer import main as run

    run(config, overrides)


@app.command(epilog=PLAN_EXAMPLES)
def plan(
    config: Annotated[Path, typer.Option(help="YAML file of a run, as for train.")],
    overrides: Overrides = None,
    teacher_model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH", help="A teacher's model, read instead of asking its server; repeat for more."
        ),
    ] = None,
) -> None:
    """Show what a run will ask of each teacher: layers, tokens, bytes a sample and an epoch, bandwidth."""
    settings = load_config(config, overrides or [], TrainConfig)
    from kvdistill.plan_summary import plan_text

    typer.echo(plan_text(settings, teacher_model or []))


@app.command(epilog=DOCTOR_EXAMPLES)
def doctor(
    teacher: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="A teacher server that should answer; repeat for more."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A run whose teachers should answer.")] = None,
    output: Annotated[Path, typer.Option(help="Where runs will write.")] = Path("outputs"),
) -> None:
    """Check this machine and its teachers, and say what to do next; ends with status 1 where there is a problem."""
    run = load_config(config, [], TrainConfig) if config else None
    endpoints = [endpoint for listed in (run.teachers if run else ()) for endpoint in listed.endpoints]
    from kvdistill.doctor import checks
    from kvdistill.doctor import report as checks_report

    found = checks([*(teacher or []), *endpoints], output)
    typer.echo(checks_report(found))
    raise typer.Exit(EXIT_FAILED if any(check.state == "problem" for check in found) else 0)


@app.command("inspect", epilog=INSPECT_EXAMPLES)
def show(
    target: Annotated[str, typer.Argument(help="HOST:PORT of a server, a store, a .pt file, or a run's folder.")],
) -> None:
    """Show what a teacher server offers, what a store or an extraction holds, or how a run was aligned."""
    from kvdistill.inspection import inspect

    typer.echo(inspect(target))


@app.command(cls=forwarding_command(_extract_flags), add_help_option=False, context_settings=SETTINGS)
def extract(context: typer.Context) -> None:
    """Write the K/V that teachers have for a dataset to a .pt file or a store."""
    from extraction.command import main as run

    raise typer.Exit(run(context.args, "kvdistill extract"))


@app.command("eval", cls=forwarding_command(_eval_flags), add_help_option=False, context_settings=SETTINGS)
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
    require("train", "kvdistill demo")
    from experiments.demo.run_demo import main as run

    run(output=output, quick=quick, seeds=seeds)


@app.command(epilog=REPORT_EXAMPLES)
def report(
    outputs: Annotated[list[Path], typer.Argument(help="Folders of training runs, or folders above some.")],
    output: Annotated[Path, typer.Option(help="Where tables, pictures and the page go.")] = Path("outputs/report"),
) -> None:
    """Compare training runs: scores, learning curves, routing weights, KV loss by layer."""
    require("train", "kvdistill report")
    from kvdistill.report.write_report import write_report

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
    require("train", "kvdistill sweep")
    from kvdistill.sweep.run_sweep import main as run

    run(file, overrides or [], slurm=slurm, list_only=list_only, table_only=table_only, task=task)
