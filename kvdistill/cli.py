"""The command line: arguments only. Commands import what they need when they run, so that `--help` is fast."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from kvcore.command_line import EXIT_FAILED, run_command
from kvcore.config import load_config
from kvcore.errors import ConfigError
from kvcore.extras import require
from kvcore.flags import FlagSet
from kvcore.typer_help import Command, Group
from kvdistill.forwarded import SETTINGS, forwarding_command
from student_trainer.config import TrainConfig

FIRST_EXAMPLES = """
# The whole pipeline at toy scale, in under 3 minutes
kvdistill demo --quick
# A teacher, and a student that learns from it
kvdistill serve --model Qwen/Qwen2.5-7B --grpc-port 50051
kvdistill train --config run.yaml
"""

TRAIN_EXAMPLES = """
kvdistill train --config run.yaml
# Several ranks, with one key of the file changed
torchrun --standalone --nproc_per_node 2 -m kvdistill train --config run.yaml --set run.steps=500
deepspeed --num_gpus 8 --module kvdistill train --config run.yaml --set run.zero_stage=3
# From a store instead of teachers
kvdistill train --config run.yaml --set kv.mode=offline --set teachers.0.weight=2.0
# Three stages, with another router in the last one
kvdistill train --config configs/train/three_stage.yaml --set stages.2.fuse.router=gate
"""

DEMO_EXAMPLES = """
kvdistill demo
kvdistill demo --quick --output outputs/quick
kvdistill demo --seeds 3
"""

REPORT_EXAMPLES = """
kvdistill report outputs/three_stage_routing
kvdistill report outputs/run_a outputs/run_b --output outputs/compared
"""

SWEEP_EXAMPLES = """
# Show the runs and their states, then run those that are not done
kvdistill sweep configs/sweeps/compression.yaml --list
kvdistill sweep configs/sweeps/compression.yaml
# The same as a SLURM array
kvdistill sweep configs/sweeps/compression.yaml --slurm --set slurm.partition=gpu
# Only write the table of finished runs
kvdistill sweep configs/sweeps/compression.yaml --table
"""

PLAN_EXAMPLES = """
kvdistill plan --config run.yaml
# Read the teachers' models instead of asking their servers
kvdistill plan --config run.yaml \\
    --teacher-model qwen14b=Qwen/Qwen2.5-14B --teacher-model llama8b=/models/llama
kvdistill plan --config run.yaml --set kv.codec.name=bf16 --set run.global_batch=256
"""

DOCTOR_EXAMPLES = """
kvdistill doctor
kvdistill doctor --teacher node1:50051 --teacher node2:50051
kvdistill doctor --config run.yaml --output /scratch/outputs
"""

INSPECT_EXAMPLES = """
kvdistill inspect node1:50051
kvdistill inspect outputs/store
kvdistill inspect kv_cache/qwen_dual_teacher/train_kv.pt
kvdistill inspect outputs/run/alignment.json
"""

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one key of the file. Can be repeated.")
]

app = typer.Typer(
    cls=Group,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=FIRST_EXAMPLES,
)


def _serve_flags() -> FlagSet[Any]:
    from teacher_server.config import FLAGS

    return FLAGS


def _extract_flags() -> FlagSet[Any]:
    from extraction.config import FLAGS

    return FLAGS


def _eval_flags() -> FlagSet[Any]:
    from evaluation.config import FLAGS

    return FLAGS


def main() -> None:
    """Runs the command line. Errors of users end in one line on stderr, never in a traceback."""
    sys.exit(run_command("kvdistill", _run))


def _run() -> int:
    try:
        return app(sys.argv[1:] or ["--help"], prog_name="kvdistill", standalone_mode=False) or 0
    except TyperException as error:
        raise ConfigError(error.format_message()) from error


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
    """Train a small student LLM to match the key/value caches of large teachers, streamed live over gRPC."""
    # The deepspeed launcher passes --local_rank to every process; LOCAL_RANK holds the same number.


@app.command(cls=forwarding_command(_serve_flags), add_help_option=False, context_settings=SETTINGS)
def serve(context: typer.Context) -> None:
    """Serve one teacher's K/V over gRPC."""
    config = _serve_flags().read(context.args, "kvdistill serve")
    from teacher_server.app import run

    run(config)


@app.command(cls=Command, epilog=TRAIN_EXAMPLES)
def train(
    config: Annotated[Path, typer.Option(help="YAML file of the run; docs/configuration.md lists its keys.")],
    overrides: Overrides = None,
) -> None:
    """Train a student on the K/V of its teachers. For several ranks, start it with torchrun or deepspeed."""
    overrides = overrides or []
    load_config(config, overrides, TrainConfig)  # Reports mistakes before torch is imported.
    require("train", "kvdistill train")
    from student_trainer.loop.trainer import main as run

    run(config, overrides)


@app.command(cls=Command, epilog=PLAN_EXAMPLES)
def plan(
    config: Annotated[Path, typer.Option(help="YAML file of the run, as for train.")],
    overrides: Overrides = None,
    teacher_model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Model of a teacher, to read instead of its server. Can be repeated."),
    ] = None,
) -> None:
    """Show what a run will request from each teacher: layers, tokens, bytes per sample and epoch, bandwidth."""
    settings = load_config(config, overrides or [], TrainConfig)
    from kvdistill.plan_summary import plan_text

    typer.echo(plan_text(settings, teacher_model or []))


@app.command(cls=Command, epilog=DOCTOR_EXAMPLES)
def doctor(
    teacher: Annotated[
        list[str] | None, typer.Option(metavar="HOST:PORT", help="Teacher server to check. Can be repeated.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of a run whose teachers are checked.")] = None,
    output: Annotated[Path, typer.Option(help="Directory to which runs will write.")] = Path("outputs"),
) -> None:
    """Check this machine and its teachers. Exits with status 1 if there is a problem, and says how to fix it."""
    run = load_config(config, [], TrainConfig) if config else None
    endpoints = [endpoint for listed in (run.teachers if run else ()) for endpoint in listed.endpoints]
    from kvdistill.doctor import checks
    from kvdistill.doctor import report as checks_report

    found = checks([*(teacher or []), *endpoints], output)
    typer.echo(checks_report(found))
    raise typer.Exit(EXIT_FAILED if any(check.state == "problem" for check in found) else 0)


@app.command("inspect", cls=Command, epilog=INSPECT_EXAMPLES)
def show(
    target: Annotated[str, typer.Argument(help="HOST:PORT of a server, a store, a .pt file, or a run's folder.")],
) -> None:
    """Show what a teacher server offers, what a store or .pt file holds, or how a run was aligned."""
    from kvdistill.inspection import inspect

    typer.echo(inspect(target))


@app.command(cls=forwarding_command(_extract_flags), add_help_option=False, context_settings=SETTINGS)
def extract(context: typer.Context) -> None:
    """Write the K/V of teachers for a dataset to a .pt file or a store."""
    from extraction.command import main as run

    raise typer.Exit(run(context.args, "kvdistill extract"))


@app.command("eval", cls=forwarding_command(_eval_flags), add_help_option=False, context_settings=SETTINGS)
def evaluate(context: typer.Context) -> None:
    """Evaluate a model on benchmarks with lm-evaluation-harness."""
    from evaluation.multi_task_eval import main as run

    raise typer.Exit(run(context.args, "kvdistill eval"))


@app.command(cls=Command, epilog=DEMO_EXAMPLES)
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps: under 3 minutes.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Number of runs of each arm.")] = 1,
    output: Annotated[Path, typer.Option(help="Directory for the report and the picture.")] = Path("outputs/demo"),
) -> None:
    """Run the whole pipeline on this machine at toy scale: two teachers, one student, and control runs."""
    require("train", "kvdistill demo")
    from experiments.demo.run_demo import main as run

    run(output=output, quick=quick, seeds=seeds)


@app.command(cls=Command, epilog=REPORT_EXAMPLES)
def report(
    outputs: Annotated[list[Path], typer.Argument(help="Directories of training runs, or of several runs.")],
    output: Annotated[Path, typer.Option(help="Directory for tables, pictures and the page.")] = Path("outputs/report"),
) -> None:
    """Compare training runs: scores, learning curves, routing weights, KV loss by layer."""
    require("train", "kvdistill report")
    from kvdistill.report.write_report import write_report

    write_report(outputs, output)


@app.command(cls=Command, epilog=SWEEP_EXAMPLES)
def sweep(
    file: Annotated[Path, typer.Argument(help="YAML file of the sweep; docs/jobs.md describes it.")],
    overrides: Overrides = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit the remaining runs as a SLURM array.")] = False,
    list_only: Annotated[bool, typer.Option("--list", help="Only list the runs and their states.")] = False,
    table_only: Annotated[bool, typer.Option("--table", help="Only write the table of finished runs.")] = False,
    task: Annotated[int | None, typer.Option(min=0, help="Run only this one, by its number in --list.")] = None,
) -> None:
    """Run a matrix of training runs over seeds, resumably, and write one table with confidence intervals."""
    require("train", "kvdistill sweep")
    from kvdistill.sweep.run_sweep import main as run

    run(file, overrides or [], slurm=slurm, list_only=list_only, table_only=table_only, task=task)
