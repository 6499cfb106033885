"""A latent student loaded by transformers, in a process without kvdistill, answers as with `load_student`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from extraction.teachers import model_geometry
from kvcore.early_checks import check_model
from kvcore.errors import FieldError
from kvcore.models.backbone import read_tokenizer
from kvcore.models.files import CONFIG, SINGLE
from kvcore.models.latent_folder import BACKBONE_WEIGHTS, LATENT_WEIGHTS
from kvcore.models.loading import find_model
from kvdistill import Student, load_student
from student_trainer.model.generation import after_latents, left_padded
from student_trainer.model.latent import HUB_CODE, new_reasoning, save_reasoning
from student_trainer.model.pretrained import load_pretrained
from tests.support.tiny_models import Family, build_tokenizer, save_tiny_model, tiny_spec

PROMPTS = ["Question: What is 2+3?\nAnswer:", "Question: no?\nAnswer:", "问题：四加五？\n答案："]
TOKENS, LATENTS, PASSES = 8, 3, 2
# Qwen2 ties its embeddings; Mistral's prompts are longer than its sliding window.
SPECS: dict[Family, dict[str, Any]] = {"llama": {}, "qwen2": {"extra": {"tie_word_embeddings": True}}, "mistral": {}}

OUTSIDE = """
import importlib.abc, json, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("kvdistill", "kvcore", "student_trainer", "evaluation", "data", "align", "fuse"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

path, prompts, tokens = json.loads(sys.argv[1])
trusted = {"trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(path, **trusted)
tokenizer = AutoTokenizer.from_pretrained(path, **trusted)
found = {"class": [type(model).__module__.partition(".")[0], type(model).__name__], "dtype": str(model.dtype)}
for side in ("left", "right"):
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side=side)
    whole = model.generate(**batch, max_new_tokens=tokens)
    found[side] = tokenizer.batch_decode(whole[:, batch["input_ids"].shape[1]:], skip_special_tokens=True)
ask = pipeline("text-generation", model=path, **trusted)
answers = ask(prompts, max_new_tokens=tokens, do_sample=False, return_full_text=False, batch_size=len(prompts))
found["pipeline"] = [answer[0]["generated_text"] for answer in answers]
again = sys.argv[2]
model.save_pretrained(again)
tokenizer.save_pretrained(again)
model = AutoModelForCausalLM.from_pretrained(again, **trusted)
whole = model.generate(**batch, max_new_tokens=tokens)
found["again"] = tokenizer.batch_decode(whole[:, batch["input_ids"].shape[1]:], skip_special_tokens=True)
print(json.dumps(found))
"""


def latent_student(directory: Path, family: Family, **changes: Any) -> Path:
    return add_latents(save_tiny_model(directory, tiny_spec(family, layers=2, seed=3, **changes)))


def add_latents(directory: Path) -> Path:
    lm, _ = load_pretrained(str(directory), "auto", "path")
    reasoning = new_reasoning(lm, LATENTS, PASSES, seed=5)
    save_reasoning(reasoning, reasoning.state_dict(), directory)
    return directory


@pytest.fixture(scope="module", params=SPECS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return latent_student(tmp_path_factory.mktemp(request.param), request.param, **SPECS[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return latent_student(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def loaded(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The student through transformers, in this process."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return AutoModelForCausalLM.from_pretrained(llama, trust_remote_code=True)


@pytest.fixture
def ours(llama: Path) -> Student:
    return load_student(llama, device="cpu")


def outside(directory: Path, tmp_path: Path) -> dict[str, Any]:
    """What a process finds that cannot import kvdistill."""
    arguments = [json.dumps([str(directory), PROMPTS, TOKENS]), str(tmp_path / "again")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", OUTSIDE, *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_transformers_alone_gives_the_answers_of_load_student(directory: Path, tmp_path: Path) -> None:
    expected = load_student(directory, device="cpu").generate(PROMPTS, TOKENS)
    found = outside(directory, tmp_path)
    assert found.pop("class") == ["transformers_modules", "KVDistillLatentForCausalLM"]
    assert found.pop("dtype") == "torch.float32"
    assert found == dict.fromkeys(["left", "right", "pipeline", "again"], expected)
    assert load_student(tmp_path / "again", device="cpu").generate(PROMPTS, TOKENS) == expected


def test_without_trust_remote_code_transformers_refuses_a_latent_student_and_names_it(llama: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)contains custom code .*trust_remote_code=True") as caught:
        AutoModelForCausalLM.from_pretrained(llama, trust_remote_code=False)
    assert str(llama) in str(caught.value)
    tree = json.loads((llama / CONFIG).read_text(encoding="utf-8"))
    assert tree["model_type"] == "kvdistill_latent"
    assert tree["architectures"] == ["KVDistillLatentForCausalLM"]


def test_the_folder_holds_our_code_and_each_weight_once(llama: Path) -> None:
    assert (llama / HUB_CODE.name).read_bytes() == HUB_CODE.read_bytes()
    assert {file.name for file in llama.glob("*.safetensors")} == {BACKBONE_WEIGHTS, LATENT_WEIGHTS}
    assert not (llama / SINGLE).exists()


def test_the_code_in_the_folder_imports_torch_and_transformers_only() -> None:
    lines = HUB_CODE.read_text(encoding="utf-8").splitlines()
    imported = {line.split()[1].partition(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imported == {"__future__", "typing", "torch", "transformers"}


def tokens_of(ours: Student, side: str = "left") -> Any:
    return ours.tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side=side)


def reference_logits(ours: Student, prompt: str, answer: list[int]) -> torch.Tensor:
    """The logits [A,V] of our own code before each token of an answer."""
    assert ours._latent is not None
    student = ours._latent
    start = left_padded([ours.tokenizer.encode(prompt)], torch.device("cpu"))
    with torch.no_grad():
        thought = student.think(student.read_prompt(*start))
        ids_1A = torch.tensor([answer])
        hidden_1AE = student.read_answer(thought, ids_1A, torch.ones_like(ids_1A).bool()).hidden_BAE
        return student.logits(hidden_1AE)[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_sample_is_drawn_from_the_logits_of_our_own_code(loaded: Any, ours: Student, side: str) -> None:
    batch = tokens_of(ours, side)
    torch.manual_seed(0)
    output = loaded.generate(
        **batch,
        max_new_tokens=5,
        do_sample=True,
        top_k=0,
        temperature=1.0,
        num_return_sequences=3,
        eos_token_id=[],
        output_logits=True,
        return_dict_in_generate=True,
    )
    answers = output.sequences[:, batch["input_ids"].shape[1] :].tolist()
    logits_BAV = torch.stack(output.logits, dim=1)
    assert len(answers) == 3 * len(PROMPTS)
    assert len({tuple(answer) for answer in answers}) > len(PROMPTS), "samples of one prompt differ"
    for row, answer in enumerate(answers):
        expected_AV = reference_logits(ours, PROMPTS[row // 3], answer)
        torch.testing.assert_close(logits_BAV[row], expected_AV, atol=1e-4, rtol=1e-4)


def test_beams_and_settings_of_generation_work(loaded: Any, ours: Student) -> None:
    batch = tokens_of(ours)
    length = batch["input_ids"].shape[1]
    best = loaded.generate(
        **batch, num_beams=3, max_new_tokens=4, min_new_tokens=4, output_scores=True, return_dict_in_generate=True
    )
    for row, prompt in enumerate(PROMPTS):
        answer = best.sequences[row, length:].tolist()
        logs_AV = reference_logits(ours, prompt, answer).log_softmax(-1)
        likelihood = logs_AV[torch.arange(4), answer].sum()
        assert float(best.sequences_scores[row]) == pytest.approx(float(likelihood) / 4, abs=1e-4)
    loaded.generation_config.max_new_tokens = 2
    assert loaded.generate(**batch).shape[1] == length + 2


@pytest.mark.parametrize(("latents", "passes"), [(2, 2), (3, 4), (1, 1)])
def test_fewer_latents_and_other_passes_are_settings_of_the_configuration(
    loaded: Any, ours: Student, latents: int, passes: int
) -> None:
    loaded.config.latents, loaded.config.passes = latents, passes
    batch = tokens_of(ours)
    whole = loaded.generate(**batch, max_new_tokens=TOKENS)
    found = ours.tokenizer.batch_decode(whole[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found == ours.generate(PROMPTS, TOKENS, latents=latents, passes=passes)


def test_reading_a_prompt_gives_the_logits_of_the_next_token_and_a_cache_for_later_tokens(
    loaded: Any, ours: Student
) -> None:
    answer = [60, 33, 7]
    batch = tokens_of(ours)
    ids_BP, mask_BP = batch["input_ids"], batch["attention_mask"]
    embedded = {"inputs_embeds": loaded.get_input_embeddings()(ids_BP), "attention_mask": mask_BP}
    with torch.no_grad():
        first = loaded(**embedded)
        rest_BA = torch.tensor([answer[:-1]] * len(PROMPTS))
        mask_BT = torch.cat([mask_BP, torch.ones_like(rest_BA)], dim=1)
        rest = loaded(rest_BA, attention_mask=mask_BT, past_key_values=first.past_key_values)
    logits_BAV = torch.cat([first.logits, rest.logits], dim=1)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(logits_BAV[row], reference_logits(ours, prompt, answer), atol=1e-4, rtol=1e-4)


def test_what_a_latent_student_cannot_do_is_refused(loaded: Any, ours: Student) -> None:
    batch = tokens_of(ours)
    ids_BP = batch["input_ids"]
    refused = partial(pytest.raises, ValueError)
    with refused(match="labels: a latent student cannot be trained through transformers; use `kvdistill train`"):
        loaded(**batch, labels=ids_BP)
    with refused(match="use_cache: a latent student keeps its latents in the cache"):
        loaded.generate(**batch, max_new_tokens=2, use_cache=False)
    with refused(match="past_key_values: a latent student needs a DynamicCache, got a StaticCache"):
        loaded.generate(**batch, max_new_tokens=2, cache_implementation="static")
    with refused(match="assisted generation is not supported with stateful models"):
        loaded.generate(ids_BP[:1], max_new_tokens=2, prompt_lookup_num_tokens=2)
    cache = loaded(**batch).past_key_values
    with refused(match="attention_mask: has 27 tokens, but the cache and the inputs have 28"):
        loaded(ids_BP[:, :1], attention_mask=torch.ones(3, 27), past_key_values=cache)
    loaded.config.latents = LATENTS + 1
    with refused(match="config.latents: expected at least 1 and at most 3, as many as in training; got 4"):
        loaded.generate(**batch, max_new_tokens=2)


@pytest.mark.usefixtures("loaded")  # For the cache of code.
def test_experts_have_their_names_on_disk_in_the_folder_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = MixtralConfig(**sizes, vocab_size=384, head_dim=16, num_hidden_layers=1, num_local_experts=3)
    directory = tmp_path / "experts"
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    build_tokenizer("mistral").save_pretrained(str(directory))
    add_latents(directory)
    ours = load_student(directory, device="cpu")
    again = tmp_path / "again"
    AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).save_pretrained(again)
    for each in (directory, again):
        loaded: Any = AutoModelForCausalLM.from_pretrained(each, trust_remote_code=True)
        expected = ours.lm.state_dict()
        assert all(tensor.equal(expected[name]) for name, tensor in loaded.backbone.state_dict().items())
        batch = tokens_of(ours)
        whole = loaded.generate(**batch, max_new_tokens=TOKENS)
        found = ours.tokenizer.batch_decode(whole[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        assert found == ours.generate(PROMPTS, TOKENS)


def test_latents_are_not_computed_twice(loaded: Any, ours: Student) -> None:
    assert ours._latent is not None
    start = after_latents(ours._latent, *left_padded([ours.tokenizer.encode(PROMPTS[0])], torch.device("cpu")))
    calls: list[int] = []
    loaded.reasoning.projection.register_forward_hook(lambda *_: calls.append(1))
    loaded.generate(torch.tensor([ours.tokenizer.encode(PROMPTS[0])]), max_new_tokens=4, eos_token_id=[])
    assert len(calls) == PASSES == start.forward_passes - 1


def test_tokenizers_need_no_trust(llama: Path) -> None:
    trusting = AutoTokenizer.from_pretrained(llama, trust_remote_code=True)
    assert trusting.encode(PROMPTS[0]) == load_student(llama, device="cpu").tokenizer.encode(PROMPTS[0])


def test_a_latent_student_is_refused_as_a_teacher(llama: Path) -> None:
    refused = rf"^model: '{llama}' is a student that reasons in latents.*'kvdistill export {llama} DIR --plain"
    with pytest.raises(FieldError, match=refused):
        check_model(str(llama), "model", teacher=True)
    with pytest.raises(FieldError, match=refused):
        find_model(str(llama), "model", trust_remote_code=True)


def test_other_commands_read_its_tokenizer_without_a_question_on_the_terminal(
    llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asks whether to run code"))
    assert read_tokenizer(llama).encode(PROMPTS[0]) == load_student(llama, device="cpu").tokenizer.encode(PROMPTS[0])
    assert not caplog.messages
    geometry = model_geometry(str(llama), "student.path")
    assert (geometry.layers, geometry.heads, geometry.head_dim) == (2, 2, 16)
