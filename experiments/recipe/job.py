"""Runs the recipe as a job, on a SLURM allocation or on this machine: teacher servers, then ranks.

`python -m experiments.recipe.job [--local]` takes its settings from environment variables, as the two shell scripts
set them (scripts/run_three_stage_routing.sh, scripts/run_large_scale_multi_teacher.sh). Does not import torch.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from experiments.recipe.config import FLAGS, RecipeSettings
from experiments.recipe.early_checks import check_data, check_models, check_servers
from experiments.recipe.environment import JobSettings, job_settings, recipe_flags
from experiments.recipe.run_recipe import serve_flags
from student_trainer.launching.endpoints import teacher_names
from student_trainer.launching.hosts import LocalHost
from student_trainer.launching.job import Job, exit_status
from student_trainer.launching.placement import Placement, lay_out
from student_trainer.launching.processes import end
from student_trainer.launching.slurm_hosts import SlurmHosts
from student_trainer.launching.teacher_servers import as_arguments

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit status tells SLURM how the job ended."""
    parser = argparse.ArgumentParser(prog="job", description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--local", action="store_true", help="run on this machine, without SLURM")
    local = parser.parse_args(arguments).local

    def run() -> None:
        settings = FLAGS.read(recipe_flags(os.environ), "job")
        job_options = job_settings(os.environ, local=local)
        run_job(Job(LocalHost() if local else SlurmHosts(), job_options.log_dir), settings, job_options)

    return exit_status("job", run)


def run_job(job: Job, settings: RecipeSettings, options: JobSettings) -> None:
    """Prepares the data, starts a server for each teacher and replica, and trains.

    Raises:
        KVDistillError: a process failed.
        StoppedError: a signal ended the job.
    """
    check_models(settings)
    check_data(settings)
    if settings.kv_mode != "offline":
        check_servers(settings, "auto" if options.gpus else "cpu")
    models = {} if settings.kv_mode == "offline" else teacher_names(settings.teachers)
    placement = lay_out(
        job.hosts.nodes,
        options.gpus,
        list(models),
        replicas=options.replicas,
        ranks_per_node=options.ranks_per_node,
    )
    _log_placement(job, placement)
    with job.running():
        # All ranks read the data, so it must exist before they start.
        prepare = subprocess.Popen(_command(job, settings, prepare_only=True), stdin=subprocess.DEVNULL, text=True)
        job.wait([prepare], "preparing the data", lambda processes: end(*processes))
        if models:
            job.protect_servers()
        for name, model in models.items():
            for server in placement.teachers[name]:
                flags = {"model": model, "device": server.device, **serve_flags(settings)}
                job.servers.start(name, server.node, as_arguments(flags))
        endpoints = job.wait_ready()
        named = (f"@{job.endpoints_file}",) if endpoints else ()
        job.train(_command(job, settings, teacher_endpoints=named), placement, endpoints)
    logger.info("done: %s", settings.output_dir)


def _log_placement(job: Job, placement: Placement) -> None:
    nodes = ", ".join(node.name for node in placement.trainers)
    logger.info("job %s: %d ranks on each of %s", job.hosts.job_name, placement.ranks_per_node, nodes)
    for name, servers in placement.teachers.items():
        logger.info("  teacher %s on %s", name, ", ".join(f"{one.node.name} ({one.device})" for one in servers))
    logger.info("  logs in %s", job.log_dir)


def _command(job: Job, settings: RecipeSettings, **changes: object) -> list[str]:
    """The recipe's command, which reads this job's settings from a file among the logs."""
    # The servers quantise the weights, not the recipe.
    changed = settings.model_copy(update={"load_in_8bit": False, "load_in_4bit": False, **changes})
    path: Path = job.log_dir / ("prepare.yaml" if changed.prepare_only else "train.yaml")
    tree = changed.model_dump(mode="json", exclude_defaults=True)
    path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return [sys.executable, "-m", "experiments.train_multi_teacher_kv", "--config", str(path)]


if __name__ == "__main__":
    sys.exit(main())
