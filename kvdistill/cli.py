"""The command line: arguments only. Commands import what they need when they run, so that `--help` is fast."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.exceptions import TyperException

from kvcore.command_line import run_command
from kvcore.config import load_config, parse
from kvcore.errors import EXIT_FAILED, ConfigError, FieldError
from kvcore.extras import require
from kvcore.flags import FlagSet
from kvcore.typer_help import Command, Group
from kvdistill.calibrate_command import CALIBRATE_EXAMPLES, calibrate
from kvdistill.forwarded import SETTINGS, forwarding_command
from kvdistill.generation_settings import GenerationSettings, LoadingSettings
from kvdistill.sharing_commands import EXPORT_EXAMPLES, PUSH_EXAMPLES, export, push
from student_trainer.config import TrainConfig
from student_trainer.config_checks import check_inputs

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
# Also show the most likely tokens at the student's latents for validation prompts
kvdistill report outputs/run --prompts data/val.jsonl
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
kvdistill inspect kv_cache/qwen_dual_teacher
kvdistill inspect outputs/run/alignment.json
"""

GENERATE_EXAMPLES = """
kvdistill generate outputs/run/best_model "Question: What is 2+3?"
# Questions as in the recipe's data, between Question: and Answer:
kvdistill generate outputs/run/best_model --format question "What is 2+3?" "What is 4+4?"
# In the chat template of the model, with sampling
kvdistill generate outputs/run/best_model --chat "What is 2+3?" --temperature 0.7 --seed 1
# Faster, and less accurate: 2 passes over the first 8 latents
kvdistill generate outputs/run/best_model "What is 2+3?" --passes 2 --latents 8
"""

THINK_EXAMPLES = """
kvdistill think outputs/run/best_model "Question: What is 2+3?"
kvdistill think outputs/run/best_model --format question "What is 2+3?" --passes 6 --top 5
"""

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set one key of the file. Can be repeated.")
]

ModelArgument = Annotated[str, typer.Argument(help="A run's best_model, or a directory or hub id of a model.")]
Device = Annotated[str, typer.Option(help="Device of the model: auto, cpu, cuda or cuda:N.")]
DType = Annotated[
    Literal["auto", "fp32", "bf16"],
    typer.Option(metavar="auto|fp32|bf16", help="Data type of the weights; auto keeps the saved type."),
]
Format = Annotated[
    Literal["plain", "question", "chat"] | None,
    typer.Option(
        "--format",
        metavar="plain|question|chat",
        help="plain: the prompt as it is; question: between Question: and Answer:; chat: as a message in the "
        "tokenizer's chat template. The default is plain or chat, as in the student's training.",
    ),
]
Chat = Annotated[bool, typer.Option("--chat", help="The same as --format chat.")]
SystemPrompt = Annotated[
    str | None, typer.Option(help="System message of a chat. The default is that of the student's training.")
]
Latents = Annotated[int | None, typer.Option(min=1, help="Number of latents, at most as many as in training.")]
Passes = Annotated[
    int | None,
    typer.Option(min=1, help="Number of passes over the latents. The default is the number used in training."),
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
    """Runs the command line. An error that a user can cause gives one line on stderr, never a traceback."""
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
    from teacher_server.config import check_host

    check_host(config)
    from teacher_server.app import run

    run(config)


@app.command(cls=Command, epilog=TRAIN_EXAMPLES)
def train(
    config: Annotated[Path, typer.Option(help="YAML file of the run; docs/configuration.md lists its keys.")],
    overrides: Overrides = None,
) -> None:
    """Train a student on the K/V of its teachers. For several ranks, start it with torchrun or deepspeed."""
    overrides = overrides or []
    settings = load_config(config, overrides, TrainConfig)  # Reports mistakes before torch is imported.
    require("train", "kvdistill train")
    check_inputs(settings)
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
    config: Annotated[Path | None, typer.Option(help="YAML file of a run to check.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory to which runs will write. Defaults to run.output_dir of the file.")
    ] = None,
) -> None:
    """Check this machine and its teachers. If there is a problem, say how to fix it and exit with status 1.

    With --config, also check the run's student, data, teachers, and the disk of its output directory.
    """
    run = load_config(config, [], TrainConfig) if config else None
    from kvdistill.doctor import checks
    from kvdistill.doctor import report as checks_report

    found = checks(teacher or [], output, run)
    typer.echo(checks_report(found))
    raise typer.Exit(EXIT_FAILED if any(check.state == "problem" for check in found) else 0)


app.command(cls=Command, epilog=CALIBRATE_EXAMPLES)(calibrate)


@app.command("inspect", cls=Command, epilog=INSPECT_EXAMPLES)
def show(
    target: Annotated[
        str, typer.Argument(help="HOST:PORT of a server, or the path of a store, an extraction or a run.")
    ],
) -> None:
    """Show a teacher server's model and limits, the content of a store or extraction, or a run's alignment."""
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


def _prompt_format(style: str | None, chat: bool) -> str | None:
    if chat and style not in {None, "chat"}:
        raise FieldError("--chat", f"conflicts with --format {style}; leave one of them out")
    return "chat" if chat else style


@app.command(cls=Command, epilog=GENERATE_EXAMPLES)
def generate(  # noqa: PLR0913, PLR0917 - arguments are command-line flags
    model: ModelArgument,
    questions: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    style: Format = None,
    chat: Chat = False,
    system_prompt: SystemPrompt = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Softmax temperature. 0 is greedy decoding.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the smallest set of tokens with this total probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling.")] = 0,
    latents: Latents = None,
    passes: Passes = None,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Ask a trained student, or any causal language model, and print the answer while it is generated."""
    settings = {
        "format": _prompt_format(style, chat),
        "system_prompt": system_prompt,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "latents": latents,
        "passes": passes,
    }
    parse(settings, GenerationSettings)  # Reports mistakes before torch is imported.
    loading = parse({"device": device, "dtype": dtype}, LoadingSettings)
    from kvdistill.ask import generate as run

    run(model, loading, questions, settings)


@app.command(cls=Command, epilog=THINK_EXAMPLES)
def think(  # noqa: PLR0913, PLR0917 - arguments are command-line flags
    model: ModelArgument,
    question: Annotated[str, typer.Argument(help="The prompt.")],
    style: Format = None,
    chat: Chat = False,
    system_prompt: SystemPrompt = None,
    top: Annotated[int, typer.Option(min=1, help="Number of tokens to show for each latent.")] = 3,
    latents: Latents = None,
    passes: Passes = None,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Show the tokens that a student would most likely write in the place of each latent, after each pass."""
    settings = {
        "format": _prompt_format(style, chat),
        "system_prompt": system_prompt,
        "top": top,
        "latents": latents,
        "passes": passes,
    }
    loading = parse({"device": device, "dtype": dtype}, LoadingSettings)
    from kvdistill.ask import think as run

    run(model, loading, question, settings)


app.command(cls=Command, epilog=EXPORT_EXAMPLES)(export)
app.command(cls=Command, epilog=PUSH_EXAMPLES)(push)


@app.command(cls=Command, epilog=DEMO_EXAMPLES)
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Train fewer steps, in under 3 minutes.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Number of runs of each arm.")] = 1,
    output: Annotated[Path, typer.Option(help="Directory for the report and the picture.")] = Path("outputs/demo"),
) -> None:
    """Run the whole pipeline on this machine at toy scale: two teachers, one student, and control runs."""
    require("train", "kvdistill demo")
    from experiments.demo.run_demo import main as run

    run(output=output, quick=quick, seeds=seeds)


@app.command(cls=Command, epilog=REPORT_EXAMPLES)
def report(
    outputs: Annotated[
        list[Path], typer.Argument(help="Directories of runs, or directories that contain several runs.")
    ],
    output: Annotated[Path, typer.Option(help="Directory for tables, pictures and the page.")] = Path("outputs/report"),
    prompts: Annotated[
        Path | None,
        typer.Option(help="File of records. For the first three, also show the most likely tokens at the latents."),
    ] = None,
) -> None:
    """Compare training runs: scores, learning curves, routing weights, KV loss by layer."""
    require("train", "kvdistill report")
    from kvdistill.report.write_report import write_report

    write_report(outputs, output, prompts)


@app.command(cls=Command, epilog=SWEEP_EXAMPLES)
def sweep(
    file: Annotated[Path, typer.Argument(help="YAML file of the sweep; docs/student.md describes it.")],
    overrides: Overrides = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit the remaining runs as a SLURM array.")] = False,
    list_only: Annotated[bool, typer.Option("--list", help="Only list the runs and their states.")] = False,
    table_only: Annotated[bool, typer.Option("--table", help="Only write the table of finished runs.")] = False,
    task: Annotated[int | None, typer.Option(min=0, help="Run only the run with this number in --list.")] = None,
) -> None:
    """Run a matrix of trainings, each with several seeds, and write one table with confidence intervals.

    After an interruption, the same command continues with the runs that are not done.
    """
    require("train", "kvdistill sweep")
    from kvdistill.sweep.run_sweep import main as run

    run(file, overrides or [], slurm=slurm, list_only=list_only, table_only=table_only, task=task)
