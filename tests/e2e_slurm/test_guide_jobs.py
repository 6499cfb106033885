"""Tests of the `sbatch` lines of docs/guide.md, submitted unchanged from a copy of the checkout with tiny models.

The cluster sets variables in every task that select the CPU and make the training runs short.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from data.multi_task_dataset import MultiTaskReasoningDataset
from tests.support.guide import PAGE, STAGES, Checkout, blocks
from tests.support.slurm_cluster import SlurmCluster
from tests.support.training import metrics

NODES = 4
JOB_SECONDS = 600.0
# A text that only one block of the guide contains.
THREE_STAGES, LARGE_SCALE, SCENARIO = (
    "sbatch --job-name",
    "sbatch scripts/run_large_scale_multi_teacher.sh",
    "cross_family.yaml",
)
MODELS = ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-14B", "Qwen/Qwen2.5-32B", "meta-llama/Llama-3.1-8B")
STEPS = 2
SHORT = {
    "DEVICE": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "GRAD_ACCUM": "2",
    "TRAIN_SAMPLES": "64",
    "VAL_SAMPLES": "8",
    "EXTRA_ARGS": f"--max_steps {STEPS} --latent_passes 1 --calibration_samples 32 --logging_steps 1 --answer_tokens 2",
}


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("guide") / "checkout", 24, MODELS)


@pytest.fixture(scope="module")
def cluster(guide: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    site = {**SHORT, "KVDISTILL_DATA_DIR": str(guide.directory / "copies")}
    with SlurmCluster(tmp_path_factory.mktemp("slurm") / "cluster", NODES, site) as running:
        guide.environment["SLURM_CONF"] = running.environment["SLURM_CONF"]
        yield running


def submitted(guide: Checkout, cluster: SlurmCluster, piece: str) -> tuple[int, str]:
    """Submit the job of a block, check that it succeeds, and return its number and output."""
    (job,) = re.findall(r"^Submitted batch job (\d+)$", guide.run(guide.block(piece)), re.MULTILINE)
    shown = cluster.wait(int(job), JOB_SECONDS)
    (log,) = guide.directory.glob(f"*-{job}.out")
    output = log.read_text(encoding="utf-8", errors="replace")
    assert shown["JobState"] == "COMPLETED", output[-8000:]
    return int(job), output


def test_three_stages_train_on_prepared_data(guide: Checkout, cluster: SlurmCluster) -> None:
    loader = MultiTaskReasoningDataset(train_samples=64, val_samples=16, data_dir=guide.directory / "copies")
    for name, split in zip(("train", "val"), loader.load_and_prepare(), strict=True):
        split.save_to_disk(str(guide.directory / "data" / "prepared" / name))
    job, output = submitted(guide, cluster, THREE_STAGES)
    assert "data: using ./data/prepared" in output
    # Each server has its own node; the ranks use the third.
    assert f"job qwen_dual-{job}: 1 ranks on each of n1\n" in output
    assert "teacher Qwen2.5-7B on n2 (cpu)\n" in output
    assert "teacher Qwen2.5-14B on n3 (cpu)\n" in output
    for stage in STAGES:
        trained = guide.directory / "outputs" / "three_stage_routing" / stage
        assert metrics(trained, "routing/weights_mean/Qwen2.5-14B").keys() == {1, STEPS}
        assert (trained / "best_model" / "latent.safetensors").is_file()


def test_three_large_teachers_have_the_scripts_weights(guide: Checkout, cluster: SlurmCluster) -> None:
    _, output = submitted(guide, cluster, LARGE_SCALE)
    trained = guide.directory / "outputs" / "large_scale_multi_teacher"
    for teacher, node, weight in (("7B", "n2", 0.33), ("14B", "n3", 0.33), ("32B", "n4", 0.34)):
        assert f"teacher Qwen2.5-{teacher} on {node} (cpu)\n" in output
        assert metrics(trained, f"routing/weights_mean/Qwen2.5-{teacher}")[STEPS] == pytest.approx(weight)


def test_scenario_trains_with_two_families_on_its_own_mix(guide: Checkout, cluster: SlurmCluster) -> None:
    _, output = submitted(guide, cluster, SCENARIO)
    assert "data: using ./data/prepared" not in output
    last = guide.directory / "outputs" / "cross_family" / STAGES[-1]
    weights = [metrics(last, f"routing/weights_mean/{name}")[STEPS] for name in ("Qwen2.5-7B", "Llama-3.1-8B")]
    assert sum(weights) == pytest.approx(1.0, abs=1e-3)


def test_every_slurm_block_of_the_guide_is_tested() -> None:
    left = [block.text for block in blocks(PAGE) if block.needs_slurm]
    for piece in (THREE_STAGES, LARGE_SCALE, SCENARIO):
        left.remove(next(text for text in left if piece in text))
    assert left == []
