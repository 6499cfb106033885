"""Tests of process placement in a job and of the job scripts' environment variables."""

from __future__ import annotations

import re

import pytest

from experiments.recipe.config import FLAGS
from experiments.recipe.environment import VARIABLES, job_settings, recipe_flags
from kvcore.errors import ConfigError
from student_trainer.launching.placement import Node, ServerPlacement, lay_out
from tests.support.servers import REPOSITORY

SCRIPTS = ("run_three_stage_routing.sh", "run_large_scale_multi_teacher.sh")
# The guide's names.
GUIDE = [
    "STUDENT",
    "NUM_TEACHERS",
    "FUSION_STRATEGY",
    "FIXED_WEIGHTS",
    "SIMILARITY_METRIC",
    "TEMPERATURE",
    "ROUTER_TYPE",
    "ROUTER_HIDDEN_DIM",
    "ENTROPY_REG_WEIGHT",
    "KV_COMPRESSION",
    "KV_LOSS_WEIGHT",
    "BATCH_SIZE",
    "GRAD_ACCUM",
    "LEARNING_RATE",
    "WARMUP_RATIO",
    "GRADIENT_CHECKPOINTING",
    "USE_BF16",
]


def nodes(count: int) -> list[Node]:
    return [Node(f"n{number}", f"10.0.0.{number}") for number in range(1, count + 1)]


def test_each_teacher_gets_a_node_and_ranks_use_the_others() -> None:
    n1, n2, n3, n4 = nodes(4)
    layout = lay_out([n1, n2, n3, n4], 8, ["a", "b"])
    assert layout.trainers == (n1, n2)
    assert (layout.ranks_per_node, layout.gpus) == (8, None)
    assert layout.teachers == {"a": (ServerPlacement(n3, "cuda:0"),), "b": (ServerPlacement(n4, "cuda:0"),)}


def test_servers_share_nodes_if_there_are_too_few() -> None:
    n1, n2, n3 = nodes(3)
    layout = lay_out([n1, n2, n3], 8, ["a", "b", "c"], replicas=2)
    assert layout.trainers == (n1,)
    assert layout.teachers["a"] == (ServerPlacement(n2, "cuda:0"), ServerPlacement(n3, "cuda:1"))
    assert layout.teachers["b"] == (ServerPlacement(n3, "cuda:0"), ServerPlacement(n2, "cuda:2"))
    places = [seat for seats in layout.teachers.values() for seat in seats]
    assert len(set(places)) == 6


def test_servers_take_the_last_gpus_of_a_single_node() -> None:
    (n1,) = nodes(1)
    layout = lay_out([n1], 4, ["a", "b"])
    assert (layout.gpus, layout.ranks_per_node) == ((0, 1), 2)
    assert layout.teachers == {"a": (ServerPlacement(n1, "cuda:2"),), "b": (ServerPlacement(n1, "cuda:3"),)}


def test_without_gpus_everything_runs_on_cpus() -> None:
    (n1,) = nodes(1)
    layout = lay_out([n1], 0, ["a"], ranks_per_node=2)
    assert (layout.gpus, layout.ranks_per_node) == (None, 2)
    assert layout.teachers == {"a": (ServerPlacement(n1, "cpu"),)}


def test_without_teachers_every_node_trains() -> None:
    layout = lay_out(nodes(2), 4, [])
    assert (len(layout.trainers), layout.ranks_per_node, layout.gpus) == (2, 4, None)


@pytest.mark.parametrize(("count", "gpus", "teachers"), [(1, 2, "ab"), (2, 2, "abc")])
def test_too_few_gpus_raise(count: int, gpus: int, teachers: str) -> None:
    with pytest.raises(ConfigError, match=f"{len(teachers)} servers and the training do not fit on {count} nodes"):
        lay_out(nodes(count), gpus, list(teachers))


def test_variables_become_flags() -> None:
    environment = {
        "STUDENT": "Qwen/Qwen2.5-1.5B",
        "TEACHERS": "Qwen/Qwen2.5-7B Qwen/Qwen2.5-14B",
        "FIXED_WEIGHTS": "0.5,0.5",
        "OUTPUT_DIR": "out",
        "TEMPERATURE": "",
        "LEARNING_RATE": "",
        "USE_BF16": "false",
        "EXTRA_ARGS": "--max_steps 3 --data_dir 'my copies'",
        "HOME": "/root",
    }
    settings = FLAGS.read(recipe_flags(environment), "job")
    assert settings.teachers == ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-14B")
    assert settings.fixed_weights == (0.5, 0.5)
    assert (settings.bf16, settings.temperature, settings.max_steps) == (False, None, 3)
    assert str(settings.data_dir) == "my copies"


def test_deploy_page_lists_every_variable_of_the_recipe() -> None:
    page = (REPOSITORY / "docs" / "deploy.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if "|" in line]
    listed = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", "\n".join(rows)))
    assert set(VARIABLES) - listed == set()


def test_both_teacher_variables_must_agree() -> None:
    assert recipe_flags({"TEACHERS": "a", "TEACHER_MODELS": "a"}).count("--teacher_models") == 2
    with pytest.raises(ConfigError, match="TEACHERS and TEACHER_MODELS are the same setting but differ"):
        recipe_flags({"TEACHERS": "a", "TEACHER_MODELS": "b"})


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_set_every_variable_of_the_guide(script: str) -> None:
    text = (REPOSITORY / "scripts" / script).read_text(encoding="utf-8")
    for name in GUIDE:
        assert f"default {name} " in text, name
        assert name in VARIABLES


def test_job_settings_use_the_allocations_gpus() -> None:
    assert job_settings({"SLURM_GPUS_ON_NODE": "8"}, local=False).gpus == 8
    assert job_settings({"SLURM_GPUS_ON_NODE": "8", "DEVICE": "cpu"}, local=False).gpus == 0
    how = job_settings({"TEACHER_REPLICAS": "2", "RANKS_PER_NODE": "4", "LOG_DIR": "there"}, local=False)
    assert (how.replicas, how.ranks_per_node, str(how.log_dir)) == (2, 4, "there")
    with pytest.raises(ConfigError, match="DEVICE: no GPU for 'cuda'"):
        job_settings({"DEVICE": "cuda"}, local=False)
    with pytest.raises(ConfigError, match="RANKS_PER_NODE: expected a number; got 'two'"):
        job_settings({"RANKS_PER_NODE": "two"}, local=False)
