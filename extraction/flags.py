"""The flags of the extraction: one for each field of `ExtractConfig`, with its default. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from extraction.config import DEFAULT_BUDGET, ExtractConfig
from kvcore.flags import FlagSet

DESCRIPTION = """Write the K/V that teachers have for a dataset, in both styles (cot, direct), to a file or a store.

Keys are content keys: without rotary positions, in the teacher's own geometry. The same command, given again after an
interruption of any kind, goes on where it was."""

EXAMPLES = """examples:
  Two teachers, each served on this machine while the command runs, into one .pt file:
    COMMAND --teacher_models Qwen/Qwen2.5-7B Qwen/Qwen2.5-14B \\
        --student_model Qwen/Qwen2.5-1.5B --dataset_path data/prepared/train --output_dir kv_cache/qwen --device cuda
  A store that `kvdistill train` reads with kv.mode=offline, from servers that run elsewhere:
    COMMAND --teacher_models Qwen/Qwen2.5-7B --student_model Qwen/Qwen2.5-1.5B \\
        --teacher_endpoints Qwen2.5-7B=node1:50051,node2:50051 --format store --kv_compression r-kv \\
        --dataset_path data/prepared/train --output_dir kv_cache/qwen
  One of four workers, for example of a SLURM array; the last to end writes the .pt file:
    COMMAND --teacher_models Qwen/Qwen2.5-7B --student_model Qwen/Qwen2.5-1.5B \\
        --dataset_path data/prepared/train --output_dir kv_cache/qwen --shard 2/4"""

# Headings of --help, in order; under each its fields and what to say about them.
GROUPS: Mapping[str, Mapping[str, str]] = {
    "models and data": {
        "teacher_models": "directories or hub ids, each served on this machine unless --teacher_endpoints is given",
        "student_model": "directory or hub id of the student, whose tokenizer --max_length counts in and whose layers "
        "`--layers student` maps to",
        "dataset_path": "directory made by Dataset.save_to_disk, or JSON Lines, with id, prompt, reasoning and answer",
        "max_length": "longest sample in the student's tokens; longer ones are left out, and listed",
        "limit": "only the first so many records",
    },
    "output": {
        "output_dir": "directory that the result goes to",
        "output_name": "its name there",
        "format": "pt: NAME.pt, a list that torch.load reads; store: NAME/TEACHER, which kv.mode=offline trains from",
    },
    "what is kept": {
        "kv_compression": "right: the last tokens of the span; r-kv: those that answer and diversity rank highest; "
        "full: every token",
        "kv_budget": f"tokens that right and r-kv keep; {DEFAULT_BUDGET} by default, none for full",
        "span": "part of the text that tokens are kept of: prompt, reasoning, answer or all. By default all, for a "
        "store with right or r-kv reasoning, which samples of style direct have none of",
        "scope": "of r-kv: the same tokens for a sample, or each layer's or head's own",
        "layers": "all, or those that the student's layers map to; all by default for pt, student for store",
        "layer_map_strategy": "how `--layers student` maps",
        "codec": "how K/V travel and are stored: raw (fp32), bf16, int8; by default bf16 for pt, int8 for store. A .pt "
        "file holds fp32 for raw and bf16 else",
    },
    "teachers": {
        "teacher_endpoints": "NAME=HOST:PORT[,HOST:PORT] of servers that run, NAME being the last part of the model; "
        "or @FILE with one a line",
        "device": "of servers started here: auto, cpu, cuda or cuda:N; several GPUs are dealt out in turn",
        "dtype": "of their weights; auto is bf16 on a GPU and fp32 on a CPU",
        "load_in_8bit": "quantise their weights (bitsandbytes, needs a GPU)",
        "batch_tokens": "padded tokens of one request, and of one batch of servers started here",
        "prefetch": "requests kept ready ahead for each teacher",
        "request_timeout_s": "deadline of one request",
        "patience_s": "how long a teacher may be unreachable",
        "on_missing": "what a sample means that a teacher can't serve: fail: all others are stored, then the command "
        "fails with the reasons; skip: it is left out, and listed",
    },
    "workers": {
        "shard": "I/N: this process is the I-th of N, from 1/N to N/N; all get the same other flags",
    },
}


FLAGS = FlagSet(ExtractConfig, DESCRIPTION, EXAMPLES, GROUPS, switches=True, script="scripts/extract_dual_style_kv.py")


def read_flags(arguments: Sequence[str], program: str) -> ExtractConfig:
    """Reads the command line; `--help` prints and exits.

    Raises:
        ConfigError: a flag is unknown (names the nearest) or lacks a value, or two do not go together.
        FieldError: a value is missing or cannot be used, by its flag.
    """
    return FLAGS.read(arguments, program)
