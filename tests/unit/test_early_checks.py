"""Tests of the checks that refuse what cannot work before torch is imported and before servers are started."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from evaluation.benchmark_names import check_names
from experiments.recipe.config import RecipeSettings
from experiments.recipe.early_checks import check_data, check_models, check_servers
from kvcore import early_checks
from kvcore.config import parse
from kvcore.errors import ConfigError, FieldError
from student_trainer.config import TrainConfig
from student_trainer.config_checks import check_inputs
from tests.support.tiny_models import save_tiny_model, tiny_spec

HEAVY = {"torch", "transformers", "deepspeed", "lm_eval", "datasets"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model", tiny_spec("qwen2"))


def test_a_complete_model_and_a_hub_id_pass(model: Path) -> None:
    for path in (str(model), "gpt2", "Qwen/Qwen2.5-1.5B"):
        early_checks.check_model(path, "student.path")


@pytest.mark.parametrize("path", ["/no/such", "./model", "outputs/run/best_model", "~/model"])
def test_a_path_that_is_no_directory_and_no_hub_id_is_refused(path: str) -> None:
    with pytest.raises(FieldError, match=r"^student\.path: there is no directory") as caught:
        early_checks.check_model(path, "student.path")
    assert f"'{path}'" in caught.value.problem


def cut(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def pointer(model: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda model: (model / "config.json").unlink(), "has no config.json, so it is not a transformers model"),
        (lambda model: (model / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda model: (model / "config.json").write_text("[]"), "holds a list, not a JSON object"),
        (lambda model: (model / "model.safetensors").unlink(), "model.safetensors is missing"),
        (cut, "model.safetensors is damaged or cut off"),
        (pointer, "is a Git LFS pointer, not the file itself; run 'git lfs pull'"),
    ],
)
def test_a_damaged_model_is_refused(model: Path, damage: Callable[[Path], object], problem: str) -> None:
    damage(model)
    with pytest.raises(FieldError, match=problem):
        early_checks.check_model(str(model), "student.path")


def test_a_file_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").touch()
    with pytest.raises(FieldError, match=r"there is no directory 'model\.gguf'"):
        early_checks.check_model("model.gguf", "student.path")


def test_outputs_are_tried_before_anything_else_and_leave_nothing_behind(tmp_path: Path) -> None:
    early_checks.check_output(tmp_path / "new/run", "run.output_dir")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("file", r"file is a file; choose another directory$"),
        ("file/below/run", r"file/below/run cannot be created, because .*/file is a file; choose"),
        ("/proc/run", r"cannot write to /proc: .*; choose another directory$"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path, path: str, problem: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FieldError, match=r"^run\.output_dir: .*" + problem):
        early_checks.check_output(tmp_path / path, "run.output_dir")


def test_a_run_is_refused_for_its_output_before_its_teachers_are_asked(tmp_path: Path, model: Path) -> None:
    (tmp_path / "data.jsonl").write_text("{}\n", encoding="utf-8")
    config = parse(
        {
            "student": {"path": str(model), "mode": "token"},
            "data": {"train": str(tmp_path / "data.jsonl")},
            "run": {"output_dir": str(model / "config.json"), "steps": 1},
        },
        TrainConfig,
    )
    with pytest.raises(FieldError, match=r"^run\.output_dir: .*config\.json is a file"):
        check_inputs(config)


def test_a_gpu_is_refused_where_torch_can_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    early_checks.check_device("cpu", "device")
    early_checks.check_device("auto", "device")
    monkeypatch.setattr(early_checks.importlib.metadata, "version", lambda _package: "2.13.0")
    monkeypatch.setattr(early_checks.ctypes, "CDLL", lambda _name: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    early_checks.check_device("cuda:1", "device")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(FieldError, match=r"device: got 'cuda'; torch sees 0 GPUs here: CUDA_VISIBLE_DEVICES hides"):
        early_checks.check_device("cuda", "device")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    def without_driver(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(early_checks.ctypes, "CDLL", without_driver)
    with pytest.raises(FieldError, match="no NVIDIA driver"):
        early_checks.check_device("cuda", "device")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_quantised_weights_need_a_gpu_and_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("auto", "cpu"):
        with pytest.raises(FieldError, match="load_in_8bit: needs a GPU, and"):
            early_checks.check_quantised(device, "load_in_8bit")
    monkeypatch.setattr(early_checks, "why_no_gpu", lambda: None)
    monkeypatch.setattr(early_checks, "missing", lambda _extra: ["bitsandbytes"])
    with pytest.raises(FieldError, match=r"needs bitsandbytes, not installed here: pip install 'kvdistill\[gpu\]'"):
        early_checks.check_quantised("auto", "load_in_8bit")
    monkeypatch.setattr(early_checks, "missing", lambda _extra: [])
    early_checks.check_quantised("auto", "load_in_8bit")


def test_a_misspelt_benchmark_is_refused_and_other_tasks_pass(tmp_path: Path) -> None:
    check_names(["gsm8k_test", "bbh", "truthfulqa_mc1", "hellaswag", "no_such_task_at_all"], None)
    with pytest.raises(FieldError, match="unknown dataset 'gsm8k_tst'; did you mean 'gsm8k_test'"):
        check_names(["bbh", "gsm8k_tst"], None)
    (tmp_path / "mine.yaml").write_text("task: gsm8k_tst\n")
    check_names(["gsm8k_tst"], tmp_path)


def settings(**changes: object) -> RecipeSettings:
    given = {"student_model_name_or_path": "org/student", "teacher_models": ("org/a", "/no/b"), "output_dir": Path("o")}
    return RecipeSettings(**{**given, **changes})


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_the_recipe_refuses_before_servers_start() -> None:
    with pytest.raises(FieldError, match="--teacher_models: there is no directory '/no/b'"):
        check_models(settings())
    check_models(settings(num_teachers=1))
    check_models(settings(kv_mode="offline"))
    with pytest.raises(FieldError, match="--load_in_4bit: needs a GPU"):
        check_servers(settings(load_in_4bit=True), "auto")
    with pytest.raises(FieldError, match="--teacher_device: got 'cuda'"):
        check_servers(settings(), "cuda")
    with pytest.raises(FieldError, match=r"--dataset_name: .*did you mean 'svamp'"):
        check_data(settings(dataset_name=("svam",)))
    with pytest.raises(ConfigError, match=r"there is no directory '\./data/none'"):
        check_data(settings(dataset_name=("./data/none",)))
    check_data(settings())


RUN = {"student": {"path": "{model}"}, "data": {"train": "{data}"}, "run": {"output_dir": "{out}", "steps": 1}}
OFFLINE = {"kv": {"mode": "offline", "store": "no_store"}, "teachers": [{"name": "a"}]}


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("train --config {run} --set student.path=./none", "student.path: there is no directory './none'"),
        ("train --config {run} --set data.train=none.jsonl", "data.train: none.jsonl: no such data file"),
        ("train --config {run} --set data.val=none.jsonl", "data.val: none.jsonl: no such data file"),
        ("train --config {offline}", "kv.store: there is no directory no_store"),
        ("serve --model ./none", "model: there is no directory './none'"),
        ("serve --model gpt2 --device cuda", "device: got 'cuda'"),
        ("serve --model gpt2 --load-in-8bit", "load_in_8bit: needs a GPU"),
        ("eval --model_path missing", "--model_path: there is no directory 'missing'"),
        ("eval --model_path {model} --device cuda", "--device: got 'cuda'"),
        ("eval --model_path {model} --eval_datasets mth500", "did you mean 'math500'"),
        ("eval --model_path {model} --eval_datasets gsm_hrad", "did you mean 'gsm_hard'"),
        ("extract {extract} --dataset-path none.jsonl", "--dataset_path: none.jsonl: no such data file"),
        ("extract {extract} --dataset-path {data} --device cuda", "--device: got 'cuda'"),
        ("extract {extract} --dataset-path {data} --load-in-8bit", "--load_in_8bit: needs a GPU"),
        ("extract {extract} --dataset-path {data} --student-model a/b/c", "--student_model: there is no directory"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_commands_refuse_without_importing_torch(command: str, problem: str, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.touch()
    names = {"model": model, "data": data, "out": tmp_path / "out"}
    for name, sections in (("run", {}), ("offline", OFFLINE)):
        text = yaml.safe_dump(RUN | sections)
        for key, value in names.items():
            text = text.replace("{" + key + "}", str(value))
        (tmp_path / f"{name}.yaml").write_text(text)
    extract = f"--teacher-models {model} --student-model {model} --output-dir {tmp_path / 'out'}"
    filled = command.format(
        run=tmp_path / "run.yaml", offline=tmp_path / "offline.yaml", model=model, data=data, extract=extract
    )
    code = (
        "import atexit, json, sys; from kvdistill.cli import main;"
        " atexit.register(lambda: print(json.dumps([name.partition('.')[0] for name in sys.modules]))); main()"
    )
    ended = subprocess.run([sys.executable, "-c", code, *filled.split()], capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    assert problem in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not HEAVY & set(json.loads(ended.stdout))
    assert not (tmp_path / "out").exists()
