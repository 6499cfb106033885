"""Measures a training step with K/V from a server or a store, against other ways to train the same student.

The arms train the same student on the same batches, each in a process of its own with one thread, and take turns in
every round. `plain` is supervised fine-tuning by transformers' Trainer; `in_process` has the teacher and a loss on its
K/V in the training process; `text` is this trainer without a teacher. Names that begin with `latent_` are in latent
mode, the others in token mode; those that end with `_lora` train LoRA adapters.

The part `supply` reads a fake teacher whose speed is set to 0.8, 1.0 and 1.2 times what the trainer demands. `memory`
compares the peak memory of the trainer with that of a trainer with the teacher in its process, for larger models.
Prints a table, and one JSON object as its last line.

Examples:
  python -m benchmarks.train_step --quick
  python -m benchmarks.train_step --parts arms --arms plain online offline
  python -m benchmarks.train_step --student outputs/real/models/student --teacher outputs/real/models/teacher \
      --data outputs/real/full/data/train.jsonl --steps 12
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.train_step_arms import ARMS, COMPARED, FULL, MEMORY, QUICK, Arm, Inputs, Runs, Sizes, make_inputs
from benchmarks.train_step_process import measured
from data.records import load_records
from experiments.demo.demo_processes import CPU_ONLY
from kvcore.errors import KVDistillError
from student_trainer.launching.local_teachers import LocalTeachers

# Supply over demand: batches that the teacher can send in the time of a step without waiting.
SUPPLIES = (0.8, 1.0, 1.2)
# Arms whose memory is compared.
INSIDE = (("online", "in_process"), ("online_lora", "in_process_lora"))
PARTS = ("arms", "supply", "memory")
# The fake teacher without a delay.
FREE = "supply_free"

Raw = dict[str, Any]


def benchmark(inputs: Inputs, sizes: Sizes, names: Sequence[str], folder: Path, parts: Sequence[str]) -> dict[str, Any]:
    """Measures some of PARTS. Logs and runs go into `folder`."""
    os.environ.update(CPU_ONLY)
    runs, began, load = Runs(inputs, sizes, folder), time.monotonic(), os.getloadavg()[0]
    result: dict[str, Any] = {"benchmark": "train_step", "sizes": asdict(sizes)}
    if "arms" in parts:
        found = measure_arms(runs, names)
        result |= {"arms": {name: figures(raw) for name, raw in found.items()}, "ratios": ratios(found)}
    if "supply" in parts:
        result["supply"] = measure_supply(runs)
    if "memory" in parts:
        result["memory"] = measure_memory(folder / "memory")
    result["seconds"] = round(time.monotonic() - began)
    result["machine"] = {"cores": os.cpu_count(), "load_before": load, "load_after": os.getloadavg()[0]}
    return result


def measure_arms(runs: Runs, names: Sequence[str]) -> dict[str, list[Raw]]:
    """What `measured` returns for each arm in each round."""
    found: dict[str, list[Raw]] = {name: [] for name in names}
    with served(str(runs.inputs.teacher), runs.folder) as endpoint:
        for number in range(runs.sizes.rounds):
            # A drift of the machine's speed favours each side of a comparison in turn.
            for name in names if number % 2 == 0 else reversed(names):
                found[name].append(_measured(runs, name, ARMS[name], endpoint, runs.sizes.steps))
    return found


def measure_memory(folder: Path) -> dict[str, Any]:
    """Peak memory of the trainer with the teacher in a server, and in its own process, and the ratios of the two."""
    found = measure_arms(Runs(make_inputs(folder, MEMORY), MEMORY, folder), [one for pair in INSIDE for one in pair])
    compared = {
        f"{remote}_over_{inside}_{key}": round(found[remote][0][key] / found[inside][0][key], 3)
        for remote, inside in INSIDE
        for key in ("peak_mib", "grown_mib")
    }
    return {"arms": {name: figures(raw) for name, raw in found.items()}, "ratios": compared}


def measure_supply(runs: Runs) -> dict[str, Any]:
    """How long steps take and wait if a teacher sends 0.8, 1.0 and 1.2 times what the trainer demands."""
    model, steps, arm = (
        f"fake:layers={runs.inputs.student_layers()},heads=2,dim=32",
        runs.sizes.supply_steps,
        Arm(kv="online"),
    )
    # The fake teacher's tokens in a batch: the bytes of its texts, and a BOS for each.
    bytes_N = [len(record.text.encode()) for record in load_records(runs.inputs.data)]
    tokens = runs.sizes.batch * (1 + statistics.fmean(bytes_N))
    with served(model, runs.folder) as endpoint:
        free = _measured(runs, FREE, arm, endpoint, steps)
    work_s = free["step"] - free["parts"]["wait"]
    found: dict[str, Any] = {FREE: figures([free])}
    for supply in SUPPLIES:
        delay_ms = 1000 * max(0.0, work_s / supply - free["fetch"]) / tokens
        with served(f"{model},delay_ms={delay_ms:.5f}", runs.folder) as endpoint:
            name = f"supply_{supply}"
            raw = _measured(runs, name, arm, endpoint, steps)
        found[name] = figures([raw]) | {
            "supply_measured": round((raw["step"] - raw["parts"]["wait"]) / raw["fetch"], 3),
            "step_over_free": round(raw["step"] / free["step"], 3),
        }
    return found


def _measured(runs: Runs, name: str, arm: Arm, endpoint: str, steps: int) -> Raw:
    """Runs one arm once, and shows its figures."""
    raw = measured(runs.job(name, arm, endpoint, steps), runs.folder / f"{name}.log", forked=True)
    sys.stderr.write(f"{name} {json.dumps(figures([raw]))}\n")
    sys.stderr.flush()
    return raw


@contextmanager
def served(model: str, folder: Path) -> Iterator[str]:
    """The endpoint of a server with one thread."""
    engine = {"engine": "fake"} if model.startswith("fake:") else {"threads": 1}
    servers = LocalTeachers(
        {"teacher": model}, folder, device="cpu", dtype="fp32", options=engine, environment=CPU_ONLY
    )
    with servers as endpoints:
        yield endpoints["teacher"]


def figures(found: Sequence[Raw]) -> dict[str, Any]:
    """Medians over rounds: milliseconds of a step and its parts, memory in MiB, and the share of waiting."""

    def median_ms(values: Iterator[float]) -> float:
        return round(1000 * statistics.median(values), 1)

    first = found[0]
    parts = {name: median_ms(one["parts"][name] for one in found) for name in first["parts"]}
    step = median_ms(one["step"] for one in found)
    result: dict[str, Any] = {
        "step_ms": step,
        "cpu_ms": median_ms(one["cpu"] for one in found),
        "parts_ms": parts | {"other": round(step - sum(parts.values()), 1)},
        "passes_ms": [median_ms(one["passes"][n] for one in found) for n in range(len(first["passes"]))],
    }
    if "stall_share" in first:
        result["fetch_ms"] = median_ms(one["fetch"] for one in found)
        result["stall_share"] = round(statistics.median(one["stall_share"] for one in found), 4)
    for name in ("peak_mib", "grown_mib"):
        result[name] = round(statistics.median(one[name] for one in found), 1)
    return result


def ratios(found: Mapping[str, Sequence[Raw]]) -> dict[str, float]:
    """The steps of COMPARED as ratios, medians over the rounds, in time and in CPU time (`_cpu`)."""
    result: dict[str, float] = {}
    for one, other in [(f"{a}{end}", f"{b}{end}") for end in ("", "_lora") for a, b in COMPARED]:
        for key, suffix in (("step", ""), ("cpu", "_cpu")) if one in found and other in found else ():
            pairs = zip(found[one], found[other], strict=True)
            result[f"{one}_over_{other}{suffix}"] = round(statistics.median(a[key] / b[key] for a, b in pairs), 3)
    return result


def with_recordings(names: Sequence[str]) -> list[str]:
    """The arms in the order of ARMS, with the recording of each arm that replays one."""
    wanted = {*names, *(name.replace("offline", "record") for name in names)}
    return [name for name in ARMS if name in wanted]


def table(result: Mapping[str, Any]) -> str:
    """The result in Markdown: a row of milliseconds for each arm, then the ratios."""
    shown = ("wait", "decode", "align", "forward", "backward", "optimizer", "other")
    rows = [["arm", "step", "CPU", *shown, "fetch", "stall", "peak MiB", "grown MiB"], ["---"] * (len(shown) + 7)]
    memory = {f"memory: {name}": arm for name, arm in result.get("memory", {}).get("arms", {}).items()}
    for name, arm in {**result.get("arms", {}), **result.get("supply", {}), **memory}.items():
        parts = [f"{arm['parts_ms'][part]:.0f}" if part in arm["parts_ms"] else "" for part in shown]
        waited = [f"{arm['fetch_ms']:.0f}", f"{arm['stall_share']:.1%}"] if "stall_share" in arm else ["", ""]
        times = [f"{arm[key]:.0f}" for key in ("step_ms", "cpu_ms")]
        rows.append([f"`{name}`", *times, *parts, *waited, *(f"{arm[key]:.0f}" for key in ("peak_mib", "grown_mib"))])
    rows += [[""], ["ratio", "value"], ["---", "---"]]
    compared = {**result.get("ratios", {}), **result.get("memory", {}).get("ratios", {})}
    rows += [[f"`{name}`", f"{value:.2f}"] for name, value in compared.items()]
    return "".join(f"| {' | '.join(row)} |\n" if row != [""] else "\n" for row in rows)


def main() -> None:
    """Parses the arguments, runs the benchmark and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller models and one round, about 3 minutes")
    for name, what in (("steps", "of each arm in each round"), ("batch", "records per step"), ("rounds", "")):
        parser.add_argument(
            f"--{name}", type=int, help=f"{what or 'rounds of all arms'}; default: {getattr(FULL, name)}"
        )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="all by default")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="all by default")
    for name in ("student", "teacher", "data"):
        parser.add_argument(f"--{name}", type=Path, help="with the other two; random models and records by default")
    given = parser.parse_args()
    own = (given.student, given.teacher, given.data)
    if any(own) and not all(own):
        parser.error("give --student, --teacher and --data, or none of them")
    changes = {name: value for name in ("steps", "batch", "rounds") if (value := getattr(given, name)) is not None}
    sizes = replace(QUICK if given.quick else FULL, **changes)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        inputs = Inputs(*own) if all(own) else make_inputs(folder, sizes)
        result = benchmark(inputs, sizes, with_recordings(given.arms), folder, given.parts)
    result["models"] = "own" if all(own) else "random"
    sys.stderr.write(table(result))
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KVDistillError as error:
        sys.exit(str(error))
