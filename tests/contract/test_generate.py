"""Tests of the generation contract for every engine; the Hugging Face engine matches transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from kvcore.plan import SamplingParams
from kvcore.types import Sample
from teacher_server.config import ServeConfig
from teacher_server.engines import load_engine
from teacher_server.engines.base import (
    GeneratedText,
    SampleFailure,
    TeacherEngine,
    TokenizedSample,
)
from teacher_server.engines.hf import hf_generate
from tests.support.reference_kv import load_reference
from tests.support.tiny_models import FAMILIES, Family, build_model, save_tiny_model, tiny_spec

TEXTS = ("The start is 3. Add 4.", "Größe? 思考过程", "1", "multiply by 2 and subtract 5, all modulo 7. Reasoning:")
GREEDY = SamplingParams(max_new_tokens=20)
DRAWN = SamplingParams(max_new_tokens=20, temperature=1.0, top_p=0.95, seed=5)


@dataclass(frozen=True)
class Case:
    """An engine under test, its model's directory, and the same model as a reference, if there is one."""

    engine: TeacherEngine
    directory: Path
    reference: PreTrainedModel | None


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Case]]:
    def build(name: str) -> Case:
        if name in loaded:
            return loaded[name]
        directory = tmp_path_factory.mktemp(name)
        if name == "fake":
            config = ServeConfig(model="fake:layers=3", engine="fake")
            return loaded.setdefault(name, Case(load_engine(config), directory, None))
        save_tiny_model(directory, tiny_spec(cast("Family", name), layers=2))
        # The model's generation settings, which the engine must ignore.
        GenerationConfig(repetition_penalty=3.0, eos_token_id=2).save_pretrained(directory)
        return loaded.setdefault(name, Case(load(directory), directory, load_reference(directory)))

    loaded: dict[str, Case] = {}
    yield build
    for case in loaded.values():
        case.engine.close()


@pytest.fixture(params=[*FAMILIES, "fake"])
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


@pytest.fixture(params=FAMILIES)
def hf_case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


def load(directory: Path) -> TeacherEngine:
    return load_engine(ServeConfig(model=str(directory), device="cpu", dtype="fp32"))


def prompts(engine: TeacherEngine) -> list[TokenizedSample]:
    return [engine.tokenize(Sample(f"s{index}", text=text)) for index, text in enumerate(TEXTS)]


def write(engine: TeacherEngine, batch: list[TokenizedSample], sampling: SamplingParams) -> list[GeneratedText]:
    outcomes = engine.generate(batch, sampling, lambda _row: True)
    assert len(outcomes) == len(batch)
    assert all(isinstance(outcome, GeneratedText) for outcome in outcomes)
    return cast("list[GeneratedText]", outcomes)


# ---------------------------------------------------------------------------------------------------- every engine


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_generated_text_does_not_depend_on_the_batch(case: Case, sampling: SamplingParams) -> None:
    batch = prompts(case.engine)
    together = write(case.engine, batch, sampling)
    assert together == [write(case.engine, [tokens], sampling)[0] for tokens in batch]
    assert together == write(case.engine, batch, sampling)
    assert len({one.text for one in together}) == len(TEXTS)
    assert all(0 < one.tokens <= sampling.max_new_tokens for one in together)


def test_the_seed_changes_sampled_text_but_not_greedy_text(case: Case) -> None:
    batch = prompts(case.engine)
    drawn, others = (
        write(case.engine, batch, DRAWN),
        write(case.engine, batch, SamplingParams(max_new_tokens=20, temperature=1.0, top_p=0.95, seed=6)),
    )
    assert all(one.text != other.text for one, other in zip(drawn, others, strict=True))
    assert write(case.engine, batch, GREEDY) == write(case.engine, batch, SamplingParams(max_new_tokens=20, seed=6))


def test_equal_prompts_in_a_batch_get_the_same_text(case: Case) -> None:
    first, *_ = prompts(case.engine)
    once, again = write(case.engine, [first, first], DRAWN)
    assert once == again


def test_a_truncated_text_has_the_finish_reason_length(case: Case) -> None:
    for one, longer in zip(
        write(case.engine, prompts(case.engine), SamplingParams(max_new_tokens=4)),
        write(case.engine, prompts(case.engine), GREEDY),
        strict=True,
    ):
        assert (one.finish_reason, one.tokens) == ("length", 4)
        assert longer.text.startswith(one.text)


def test_a_stop_text_ends_generation_and_is_not_part_of_the_text(case: Case) -> None:
    batch = prompts(case.engine)
    plain = write(case.engine, batch, GREEDY)
    stop = plain[0].text[6:8]
    stopped = write(case.engine, batch, SamplingParams(max_new_tokens=20, stop=("not in any text", stop)))
    assert stopped[0].text == plain[0].text[: plain[0].text.index(stop)]
    assert stopped[0].finish_reason == "stop"
    assert stopped[0].tokens <= plain[0].tokens
    for with_stop, without in zip(stopped, plain, strict=True):
        assert stop not in with_stop.text
        assert without.text.startswith(with_stop.text)


def test_generation_does_not_change_later_kv(case: Case) -> None:
    engine = cast("Any", case.engine)
    batch = prompts(case.engine)

    def keys() -> list[torch.Tensor]:
        outputs: list[torch.Tensor] = []
        engine.prefill(batch, (0, 1), False, lambda output: outputs.append(output.k_BHTD))
        return outputs

    before = keys()
    write(case.engine, batch, GREEDY)
    assert all(torch.equal(old, new) for old, new in zip(before, keys(), strict=True))


def test_prompt_ids_end_where_the_text_ends() -> None:
    """A tokenizer may add an EOS after the text; generation must start before it."""
    sample = Sample("x", text="ab")
    assert TokenizedSample(sample, (1, 5, 6, 2), (-1, 1, 2, -1), (-1,) * 4).prompt_ids == (1, 5, 6)
    assert TokenizedSample(sample, (1, 5, 6), (-1, 1, 2), (-1,) * 3).prompt_ids == (1, 5, 6)
    assert TokenizedSample(sample, (5, 6), (-1, -1), (-1,) * 2).prompt_ids == (5, 6)


# ---------------------------------------------------------------------------------------------------- transformers


def transformers_text(case: Case, prompt: TokenizedSample, sampling: SamplingParams, **settings: Any) -> str:
    """The text of the model's own `generate`, for one prompt without padding."""
    assert case.reference is not None
    ids_1T = torch.tensor([prompt.prompt_ids])
    generate = cast("Any", case.reference).generate
    written_1T = generate(
        ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,
        pad_token_id=0,
        **settings,
    )
    tokenizer = cast("Any", AutoTokenizer.from_pretrained(case.directory))
    text: str = tokenizer.decode(written_1T[0, ids_1T.shape[1] :], skip_special_tokens=True)
    return text


def test_greedy_text_matches_transformers_without_the_models_settings(hf_case: Case) -> None:
    batch = prompts(hf_case.engine)
    for prompt, one in zip(batch, write(hf_case.engine, batch, GREEDY), strict=True):
        expected = transformers_text(hf_case, prompt, GREEDY)
        # The engine drops an incomplete character.
        assert one.text == (expected.rstrip("\ufffd") if one.finish_reason == "length" else expected)


def test_a_tiny_top_p_or_temperature_equals_greedy(hf_case: Case) -> None:
    batch = prompts(hf_case.engine)
    greedy = write(hf_case.engine, batch, GREEDY)
    assert write(hf_case.engine, batch, SamplingParams(max_new_tokens=20, temperature=1.0, top_p=1e-6)) == greedy
    assert write(hf_case.engine, batch, SamplingParams(max_new_tokens=20, temperature=1e-6)) == greedy


def test_every_end_token_of_the_model_ends_its_text(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path, tiny_spec("llama", layers=2))
    reference = load_reference(directory)
    # Most texts of 20 random tokens out of 384 have one of these.
    ends = list(range(2, 60))
    GenerationConfig(eos_token_id=ends).save_pretrained(directory)
    engine = load(directory)
    case, batch = Case(engine, directory, reference), prompts(engine)
    written = write(engine, batch, GREEDY)
    for prompt, one in zip(batch, written, strict=True):
        expected = transformers_text(case, prompt, GREEDY, eos_token_id=ends)
        assert one.text.rstrip("\ufffd") == expected.rstrip("\ufffd")
    engine.close()
    assert {one.finish_reason for one in written} == {"stop", "length"}
    assert all(one.tokens < GREEDY.max_new_tokens for one in written if one.finish_reason == "stop")


def test_generation_stops_for_unwanted_prompts(hf_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    original = hf_generate._Ends.__call__

    def counted(self: Any, input_ids: torch.Tensor, scores: object, **rest: object) -> torch.BoolTensor:
        nonlocal steps
        steps += 1
        return original(self, input_ids, scores, **rest)

    monkeypatch.setattr(hf_generate._Ends, "__call__", counted)
    batch = prompts(hf_case.engine)
    hf_case.engine.generate(batch, SamplingParams(max_new_tokens=300), lambda _row: steps < 3)
    assert steps == 3
    alone = write(hf_case.engine, batch[:1], GREEDY)
    kept = hf_case.engine.generate(batch, GREEDY, lambda row: row == 0)
    assert kept[0] == alone[0]


def test_a_checkpoint_without_a_head_serves_kv_but_does_not_generate(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path, tiny_spec("llama", layers=2))
    weights = load_file(directory / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    engine = load(directory)
    batch = prompts(engine)
    outcomes = engine.generate(batch, GREEDY, lambda _row: True)
    engine.close()
    assert [outcome.index for outcome in outcomes if isinstance(outcome, SampleFailure)] == list(range(len(TEXTS)))
    assert all("no language-model head" in cast("SampleFailure", outcome).problem for outcome in outcomes)


def test_a_model_with_tied_embeddings_generates(tmp_path: Path) -> None:
    spec = tiny_spec("qwen2", layers=2, extra={"tie_word_embeddings": True})
    directory = save_tiny_model(tmp_path, spec)
    assert build_model(spec).config.tie_word_embeddings
    engine = load(directory)
    assert write(engine, prompts(engine), GREEDY)
    engine.close()


def test_sampling_follows_the_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 samples of one token: each frequency is within five standard errors; probability zero is never sampled."""
    count = 20_000
    scores_V = torch.tensor([0.5, 0.2, 0.0, 0.3, 0.0]).log()
    chosen_B = hf_generate._SeededDraw(range(count))(torch.empty(0), scores_V.expand(count, -1)).argmax(dim=-1)
    frequencies_V = torch.bincount(chosen_B, minlength=5) / count
    for frequency, probability in zip(frequencies_V.tolist(), (0.5, 0.2, 0.0, 0.3, 0.0), strict=True):
        assert abs(frequency - probability) <= 5 * (probability * (1 - probability) / count) ** 0.5
