"""Tests of the lm-eval interface of a latent student: latents in every request, and results independent of batching."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lm_eval.api.instance import Instance
from rich.console import Console

from data.collate import Collator
from evaluation.latent_lm import LatentLM, NoLikelihoodError
from evaluation.metered_lm import MeteredLM
from evaluation.models import load_model
from kvcore.errors import FieldError
from student_trainer.model.latent import LATENT_CONFIG, LATENT_WEIGHTS, new_reasoning, save_reasoning
from student_trainer.model.pretrained import load_pretrained
from tests.support.tiny_models import save_tiny_model, tiny_spec

LATENTS = 3
PROMPTS = ["Question: What is 2+3?\nAnswer:", "Question: no?\nAnswer:", "问题：四加五？\n答案："]
CHOICES = [" yes", " no way, never", " 9"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved student; Llama's tokenizer prepends a BOS."""
    made = save_tiny_model(tmp_path_factory.mktemp("student"), tiny_spec("llama", layers=2, seed=3))
    lm, _ = load_pretrained(str(made), "auto", "path")
    reasoning = new_reasoning(lm, LATENTS, 2, seed=5)
    save_reasoning(reasoning, reasoning.state_dict(), made)
    return made


@pytest.fixture(scope="module")
def model(directory: Path) -> LatentLM:
    made = load_model(str(directory), "fp32", "cpu", 2)
    assert isinstance(made, LatentLM)
    return made


def generation(prompt: str, tokens: int, until: tuple[str, ...] = ()) -> Instance:
    return request("generate_until", prompt, {"until": list(until), "do_sample": False, "max_gen_toks": tokens})


def request(kind: Any, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0, metadata=("task", 0, 1))


def pairs() -> list[Instance]:
    return [request("loglikelihood", prompt, choice) for prompt in PROMPTS for choice in CHOICES]


def test_generation_equals_generate_of_the_student(model: LatentLM) -> None:
    generated = model.generate_until([generation(prompt, 6) for prompt in PROMPTS], disable_tqdm=True)
    collator = Collator(model.tokenizer, 512)
    for prompt, text in zip(PROMPTS, generated, strict=True):
        tokens_BA = model.student.generate(*collator.prompts([prompt]), 6, latent=True)
        ids = tokens_BA[0].tolist()
        end = ids.index(model.eot_token_id) if model.eot_token_id in ids else 6
        assert text == model.tokenizer.decode(ids[:end], skip_special_tokens=True)
    without = model.student.generate(*collator.prompts(PROMPTS[:1]), 6, latent=False)
    assert generated[0] != model.tokenizer.decode(without[0], skip_special_tokens=True)


def test_generation_stops_at_the_tasks_stop_text(model: LatentLM) -> None:
    (whole,) = model.generate_until([generation(PROMPTS[0], 8)], disable_tqdm=True)
    stop = whole[2:4]
    (cut,) = model.generate_until([generation(PROMPTS[0], 8, (stop,))], disable_tqdm=True)
    assert cut == whole.split(stop)[0]


def test_likelihood_is_conditioned_on_prompt_and_latents(model: LatentLM) -> None:
    found = model.loglikelihood(pairs(), disable_tqdm=True)
    collator = Collator(model.tokenizer, 512)
    for each, (likelihood, greedy) in zip(pairs(), found, strict=True):
        prompt, choice = cast("tuple[str, str]", each.args)
        ids = model.tokenizer.encode(choice, add_special_tokens=False)
        ids_A = torch.tensor(ids)
        with torch.no_grad():
            reading = model.student.read_answer(
                *collator.prompts([prompt]), ids_A[None], torch.ones(1, len(ids)).bool()
            )
        logs_AV = reading.logits_BAV[0].double().log_softmax(-1)
        assert likelihood == pytest.approx(float(logs_AV[torch.arange(len(ids)), ids_A].sum()), abs=1e-4)
        assert greedy == bool((logs_AV.argmax(-1) == ids_A).all())


def test_greedy_generation_is_marked_greedy_by_likelihood(model: LatentLM) -> None:
    inputs_BTE, mask_BT = model.student.think(*Collator(model.tokenizer, 512).prompts(PROMPTS[:1]))
    with torch.no_grad():
        best = int(model.student.logits(inputs_BTE, mask_BT)[0, -1].argmax())
    found = model._loglikelihood_tokens([(("", ""), model.tok_encode(PROMPTS[0]), [best])], disable_tqdm=True)
    assert found[0][1] is True
    assert -math.log(model.vocab_size) < found[0][0] < 0


def test_results_do_not_depend_on_the_batch_size(model: LatentLM) -> None:
    alone = [model.loglikelihood([each], disable_tqdm=True)[0][0] for each in pairs()]
    together = [value for value, _ in model.loglikelihood(pairs(), disable_tqdm=True)]
    assert together == pytest.approx(alone, abs=1e-4)
    texts = [model.generate_until([generation(prompt, 5)], disable_tqdm=True)[0] for prompt in PROMPTS]
    assert model.generate_until([generation(prompt, 5) for prompt in PROMPTS], disable_tqdm=True) == texts


def test_latents_reduce_max_length(model: LatentLM) -> None:
    assert model.max_length == model.model.config.max_position_embeddings - LATENTS


def test_text_without_prompt_has_no_likelihood(model: LatentLM) -> None:
    with pytest.raises(NoLikelihoodError, match="task 'task' needs the likelihood of text"):
        model.loglikelihood_rolling([request("loglikelihood_rolling", "text")])


def test_chunked_requests_return_in_order(model: LatentLM) -> None:
    metered = MeteredLM(model, "made-up", Console(force_terminal=False))
    likelihoods = [value for value, _ in metered.loglikelihood(pairs())]
    assert likelihoods == pytest.approx(
        [value for value, _ in model.loglikelihood(pairs(), disable_tqdm=True)], abs=1e-4
    )
    many = [generation(f"Question: {index}?\nAnswer:", 4) for index in range(11)]
    assert metered.generate_until(many) == model.generate_until(many, disable_tqdm=True)
    assert metered.truncated == 0


def test_truncated_prompts_are_counted(model: LatentLM) -> None:
    metered = MeteredLM(model, "made-up", Console(force_terminal=False))
    long = "word " * model.max_length
    metered.generate_until([generation(long, 4), generation(PROMPTS[0], 4)])
    assert metered.truncated == 1
    metered.loglikelihood([request("loglikelihood", f"other {long}", choice) for choice in CHOICES])
    assert metered.truncated == 2


def test_directory_without_latents_loads_plain_model(tmp_path: Path) -> None:
    made = load_model(str(save_tiny_model(tmp_path, tiny_spec("qwen2", layers=1))), "auto", "auto", 2)
    assert not isinstance(made, LatentLM)
    (text,) = made.generate_until([generation(PROMPTS[0], 3)], disable_tqdm=True)
    assert isinstance(text, str)


def test_incomplete_latent_student_is_refused(directory: Path, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, tiny_spec("qwen2", layers=1))
    (tmp_path / LATENT_CONFIG).write_text(json.dumps({"latents": 3, "passes": 2}), encoding="utf-8")
    with pytest.raises(FieldError, match=f"{LATENT_WEIGHTS} is missing"):
        load_model(str(tmp_path), "auto", "cpu", 2)
    with pytest.raises(FieldError, match="--model_path: cannot load"):
        load_model(str(tmp_path / "missing"), "auto", "cpu", 2)
    with pytest.raises(FieldError, match="'cuda:7' does not exist"):
        load_model(str(directory), "auto", "cuda:7", 2)
