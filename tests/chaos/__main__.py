"""Trains the same run once in peace and once under random faults, for each seed, and compares every loss.

Two teachers with two replicas each, real servers behind TCP proxies, and two ranks. After the first checkpoint, faults
come at random times: replicas are killed, stopped, drained, made unreachable or slow, serve other weights, or have bits
flipped on their connections; the trainer is killed or its disk is full. A trainer that ended is started again. Prints
each fault, and one JSON object as its last line: the losses that differ, the number of faults, and how often a replica
with other weights was set aside. The exit code is 1 if any loss differs.

Examples:
  python -m tests.chaos
  python -m tests.chaos --seeds 7 --steps 100 --output outputs/chaos
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from student_trainer.launching.processes import free_port
from student_trainer.loop.checkpoint import latest
from student_trainer.loop.finished_run import is_finished
from tests.chaos.faults import REPLICA_FAULTS, TRAINER_FAULTS, Fault, Replica, kill_trainer
from tests.chaos.tcp_proxy import TcpProxy
from tests.support.tiny_models import save_tiny_model, tiny_spec
from tests.support.training import LOSSES, World, make_world, metrics, start_cli

METRICS = "metrics.jsonl"
RANKS = 2
REPLICAS = 2
POLL_SECONDS = 0.1
# Seconds between two faults, and of one fault.
PAUSES, LENGTHS = (0.5, 3.0), (1.0, 6.0)
TRAINER_SHARE = 0.08
RUN_SECONDS = 1800.0
# The teachers' architectures with other weights.
WRONG_MODELS = {
    "ada": tiny_spec("qwen2", seed=11),
    "ben": tiny_spec("llama", layers=4, kv_heads=4, head_dim=8, seed=12),
}


@dataclass
class Active:
    """A fault that has begun. `ends_at` is None while its server starts."""

    fault: Fault
    seconds: float
    ends_at: float | None


@dataclass
class Chaos:
    """Random faults during one run of `kvdistill train`."""

    replicas: Sequence[Replica]
    config: dict[str, Any]
    directory: Path
    seed: int
    starts: int = 0
    faults: Counter[str] = field(default_factory=Counter[str])
    _active: dict[Replica, Active] = field(default_factory=dict[Replica, "Active"])
    _starting: set[Replica] = field(default_factory=set[Replica])

    def __post_init__(self) -> None:
        self.output = Path(self.config["run"]["output_dir"])
        self._random = random.Random(self.seed)
        self._began = time.monotonic()

    def run(self) -> None:
        """Train until the run has finished, with faults from the first checkpoint on."""
        trainer = self._start_trainer()
        next_fault_at = 0.0
        try:
            while not is_finished(self.output):
                assert time.monotonic() < self._began + RUN_SECONDS, "the run takes too long"
                time.sleep(POLL_SECONDS)
                self._end_faults()
                if trainer.poll() is not None:
                    if trainer.returncode == 0:
                        break
                    self._say(f"trainer: ended with {trainer.returncode}; started again")
                    trainer = self._start_trainer()
                if time.monotonic() > next_fault_at and latest(self.output / "checkpoints"):
                    self._next_fault(trainer)
                    next_fault_at = time.monotonic() + self._random.uniform(*PAUSES)
            trainer.wait(60)
        finally:
            kill_trainer(trainer)
            self._end_faults(at_once=True)

    def set_aside(self) -> int:
        """How often a trainer stopped using a replica that served other weights."""
        logs = [path.read_text(encoding="utf-8") for path in self.directory.glob("start-*/run.log")]
        return sum(log.count("it is not used while another replica works") for log in logs)

    def _start_trainer(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        self._bytes_at_start = self._metrics_bytes()
        directory = self.directory / f"start-{self.starts}"
        directory.mkdir()
        return start_cli(self.config, RANKS, directory)[0]

    def _metrics_bytes(self) -> int:
        """Grows with each step. A trainer that has not taken any since its start is left alone, or none would end."""
        path = self.output / METRICS
        return path.stat().st_size if path.is_file() else 0

    def _next_fault(self, trainer: subprocess.Popen[bytes]) -> None:
        if self._random.random() < TRAINER_SHARE and self._metrics_bytes() > self._bytes_at_start:
            name, apply = self._random.choice(TRAINER_FAULTS)
            self._say(name)
            self.faults[name] += 1
            apply(trainer)
            return
        unharmed = [each for each in self.replicas if each not in self._active and each not in self._starting]
        if not unharmed:
            return
        replica = self._random.choice(unharmed)
        (fault,) = self._random.choices(REPLICA_FAULTS, [each.weight for each in REPLICA_FAULTS])
        seconds = self._random.uniform(*LENGTHS)
        self._say(f"{replica.name}: {fault.name}, for {seconds:.1f} s")
        self.faults[fault.name] += 1
        fault.begin(replica)
        self._active[replica] = Active(fault, seconds, None if fault.starts else time.monotonic() + seconds)

    def _end_faults(self, *, at_once: bool = False) -> None:
        for replica, active in list(self._active.items()):
            if active.ends_at is None and replica.is_ready():
                active.ends_at = time.monotonic() + active.seconds
            if at_once or (active.ends_at is not None and time.monotonic() > active.ends_at):
                del self._active[replica]
                starts = replica.starts
                active.fault.end(replica)
                if replica.starts > starts:
                    self._starting.add(replica)
        self._starting = {replica for replica in self._starting if not replica.is_ready()}

    def _say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f} s] {line}", flush=True)


def run_config(world: World, replicas: Sequence[Replica], output: Path, steps: int, seed: int) -> dict[str, Any]:
    """A run with checkpoints and short timeouts."""
    endpoints = {name: [r.proxy.endpoint for r in replicas if r.name.startswith(name)] for name in world.teachers}
    run = {"output_dir": str(output), "steps": steps, "save_every": 10, "seed": seed}
    return world.config("unused", endpoints, kv={"request_timeout_s": 8.0, "patience_s": 30.0}, run=run)


def differing_steps(calm: Path, chaotic: Path) -> list[str]:
    """The losses that differ, as NAME at STEP, or that only one run has."""
    found: list[str] = []
    for name in (*LOSSES, "val/ce_loss", "val/kv_loss"):
        ours, theirs = metrics(calm, name), metrics(chaotic, name)
        assert ours, f"the calm run has no {name}"
        found += [f"{name} at {step}" for step in ours.keys() | theirs.keys() if ours.get(step) != theirs.get(step)]
    return sorted(found)


def make_replicas(world: World, stack: ExitStack, seed: int) -> list[Replica]:
    """Start the servers and proxies of all teachers, until `stack` closes."""
    replicas: list[Replica] = []
    for teacher, model in world.teachers.items():
        wrong = save_tiny_model(world.directory / f"{teacher}-wrong", WRONG_MODELS[teacher])
        for number in range(1, REPLICAS + 1):
            port = free_port()
            proxy = stack.enter_context(TcpProxy(port, seed + len(replicas)))
            replica = Replica(f"{teacher}-{number}", model, wrong, world.directory, port, proxy)
            replica.start()
            stack.callback(replica.stop)
            replicas.append(replica)
    for replica in replicas:
        replica.process.wait_ready()
    return replicas


def run_seed(directory: Path, steps: int, seed: int) -> dict[str, Any]:
    """One calm and one chaotic run; returns the figures of the comparison."""
    directory.mkdir(parents=True)
    world = make_world(directory)
    with ExitStack() as stack:
        replicas = make_replicas(world, stack, 1000 * seed)
        calm, chaotic = directory / "calm", directory / "chaotic"
        log = directory / "calm-log"
        log.mkdir()
        began = time.monotonic()
        trainer, path = start_cli(run_config(world, replicas, calm, steps, seed), RANKS, log)
        assert trainer.wait(RUN_SECONDS) == 0, path.read_text(encoding="utf-8")[-4000:]
        calm_seconds = time.monotonic() - began
        print(f"seed {seed}: the calm run took {calm_seconds:.0f} s", flush=True)
        chaos = Chaos(replicas, run_config(world, replicas, chaotic, steps, seed), directory, seed)
        began = time.monotonic()
        chaos.run()
        return {
            "seed": seed,
            "differing": differing_steps(calm, chaotic),
            "final_loss": metrics(chaotic, "train/loss")[steps],
            "trainer_starts": chaos.starts,
            "replicas_set_aside": chaos.set_aside(),
            "bits_flipped": sum(replica.proxy.flips for replica in replicas),
            "faults": dict(chaos.faults),
            "seconds": {"calm": round(calm_seconds), "chaotic": round(time.monotonic() - began)},
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the seeds given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one calm and one chaotic run for each")
    parser.add_argument("--steps", type=int, default=60, help="steps of each run")
    parser.add_argument("--output", type=Path, default=Path("outputs/chaos"), help="folder; replaced if it exists")
    options = parser.parse_args(arguments)
    shutil.rmtree(options.output, ignore_errors=True)
    results = [run_seed(options.output.resolve() / f"seed-{seed}", options.steps, seed) for seed in options.seeds]
    print(json.dumps({"seeds": results}))
    return int(any(result["differing"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
