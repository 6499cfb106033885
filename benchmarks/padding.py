"""Measures how much of a training run's micro-batches is padding, in random order and sorted by length.

Prints one JSON object as its last line: shares of padding in the first epoch by order and ranks. The data are a local
copy of a dataset of data/families, read as the mixture reads it, or records.

Examples:
  python -m benchmarks.padding --data gsm8k.jsonl --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct
  python -m benchmarks.padding --data data/prepared/train --tokenizer outputs/run/best_model --micro-batch 16
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from data.collate import Collator
from data.dataset_sources import Source, read_rows
from data.families import FAMILIES, find_family
from data.question_pool import PoolReader
from data.records import Record, load_records
from student_trainer.config import RunConfig
from student_trainer.loop.sample_order import SampleOrder, padding_share

RANKS = (1, 2, 8)


def read(data: Path) -> list[Record]:
    """The records of a file or saved dataset; of a dataset named like a family, those with its reasoning."""
    if data.stem not in FAMILIES:
        return load_records(data)
    family = find_family(data.stem)
    pool = PoolReader(["cot"], seed=0).read(family, read_rows(Source(family, data), seed=0, max_rows=10**9))
    return [record for entry in pool.entries for _, record in entry.records]


def share(lengths_N: NDArray[np.int64], micro_batch: int, ranks: int, *, is_sorted: bool) -> float:
    """The share of padding in the micro-batches of all ranks in one epoch."""
    whole = micro_batch * ranks
    run = RunConfig(
        output_dir=Path(), steps=math.ceil(len(lengths_N) / whole), global_batch=whole, micro_batch=micro_batch
    )
    batches: list[list[int]] = []
    for rank in range(ranks):
        order = SampleOrder(run, len(lengths_N), rank, ranks)
        if is_sorted:
            order.sort_by(lengths_N)
        batches += order.micro_batches(0)
    return padding_share(lengths_N, batches)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="records, or a local copy of a public dataset")
    parser.add_argument("--tokenizer", required=True, help="directory or hub id of the student")
    parser.add_argument("--micro-batch", type=int, default=8, help="samples per forward pass of a rank")
    arguments = parser.parse_args()
    records = read(arguments.data)
    collator = Collator(AutoTokenizer.from_pretrained(arguments.tokenizer), max_tokens=1 << 30)
    lengths_N = collator.count(records).sum(axis=1) + 1
    shares = {
        name: {
            f"ranks{ranks}": round(share(lengths_N, arguments.micro_batch, ranks, is_sorted=is_sorted), 4)
            for ranks in RANKS
        }
        for name, is_sorted in (("random", False), ("sorted", True))
    }
    lengths = {"mean": round(float(lengths_N.mean()), 1), "max": int(lengths_N.max())}
    found = {"records": len(records), "tokens": lengths, "micro_batch": arguments.micro_batch, "padding_share": shares}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
