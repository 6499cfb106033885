"""`kvdistill.load_student`: answers as in evaluation, streams, prompt formats, and the tokens of the latents."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from lm_eval.api.instance import Instance
from torch.nn.functional import layer_norm
from transformers import AutoTokenizer, GenerationConfig

from evaluation.latent_lm import LatentLM
from evaluation.models import load_model
from kvcore.errors import FieldError
from kvcore.models.latent_folder import LATENT_WEIGHTS
from kvcore.types import Tensor
from kvdistill import Student, load_student
from kvdistill.thoughts import token_text
from student_trainer.model.latent import new_reasoning, save_reasoning
from student_trainer.model.pretrained import load_pretrained
from student_trainer.model.prompt_format import PROMPT_FORMAT, PromptFormat
from tests.support.text_tokenizers import sentencepiece
from tests.support.tiny_models import save_tiny_model, tiny_spec

PROMPTS = ["Question: What is 2+3?\nAnswer:", "Question: no?\nAnswer:", "问题：四加五？\n答案："]
TOKENS = 6
LATENTS, PASSES = 3, 2
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if messages[-1].role == 'assistant' %}{{ raise_exception('the user speaks last') }}{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("plain"), tiny_spec("llama", layers=2, seed=3))


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, with latents."""
    directory = save_tiny_model(tmp_path_factory.mktemp("latent"), tiny_spec("llama", layers=2, seed=3))
    lm, _ = load_pretrained(str(directory), "auto", "path")
    reasoning = new_reasoning(lm, LATENTS, PASSES, seed=5)
    save_reasoning(reasoning, reasoning.state_dict(), directory)
    return directory


@pytest.fixture(params=["plain", "latent"])
def either(request: pytest.FixtureRequest) -> Student:
    return student(request.getfixturevalue(request.param))


def evaluated(directory: Path, **prompt_format: Any) -> list[str]:
    """The answers that `kvdistill eval` scores."""
    settings = {"until": [], "do_sample": False, "max_gen_toks": TOKENS}
    requests = [Instance("generate_until", {}, (prompt, settings), 0, metadata=("task", 0, 1)) for prompt in PROMPTS]
    return load_model(str(directory), "fp32", "cpu", 2, **prompt_format).generate_until(requests, disable_tqdm=True)


def student(directory: Path) -> Student:
    return load_student(directory, device="cpu")


@pytest.mark.parametrize(("kind", "latents", "passes"), [("plain", 0, 0), ("latent", LATENTS, PASSES)])
def test_answers_are_those_that_evaluation_scores(
    kind: str, latents: int, passes: int, request: pytest.FixtureRequest
) -> None:
    directory: Path = request.getfixturevalue(kind)
    loaded = student(directory)
    assert (loaded.latents, loaded.passes) == (latents, passes)
    assert loaded.generate(PROMPTS, TOKENS) == evaluated(directory)


def test_latents_change_the_answers(plain: Path, latent: Path) -> None:
    assert student(plain).generate(PROMPTS, TOKENS) != student(latent).generate(PROMPTS, TOKENS)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 4}])
def test_answers_do_not_depend_on_the_batch_size(either: Student, settings: dict[str, Any]) -> None:
    alone = [either.generate(prompt, TOKENS, **settings)[0] for prompt in PROMPTS]
    assert either.generate(PROMPTS, TOKENS, batch_size=2, **settings) == alone
    assert either.generate([]) == []


def test_sampled_answers_depend_on_the_seed(either: Student) -> None:
    sampled = [either.generate(PROMPTS, TOKENS, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert either.generate(PROMPTS, TOKENS, temperature=1.0, top_p=1e-6) == either.generate(PROMPTS, TOKENS)


def test_a_stream_gives_the_answer_in_whole_characters(either: Student) -> None:
    for prompt in PROMPTS:
        stream = either.stream(prompt, 40)
        assert stream.answer is None
        pieces = list(stream)
        (answer,) = either.answer(prompt, 40)
        assert "".join(pieces) == answer.text
        assert stream.answer == answer
        assert len(pieces) > 3
        assert all(pieces)
        assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])


def test_an_answer_ends_at_the_end_of_sequence(plain: Path, tmp_path: Path) -> None:
    loaded = student(plain)
    (whole,) = loaded.answer(PROMPTS[0], TOKENS)
    assert not whole.finished
    assert whole.forward_passes == TOKENS
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    third = loaded.tokenizer.encode(whole.text, add_special_tokens=False)[2]
    GenerationConfig(eos_token_id=third).save_pretrained(tmp_path)
    (cut,) = student(tmp_path).answer(PROMPTS[0], TOKENS)
    assert cut.finished
    assert whole.text.startswith(cut.text)
    assert len(cut.text) < len(whole.text)


def test_a_latent_student_of_the_hub_keeps_its_latents(latent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_given, **_named: str(latent))
    assert load_student("someone/student", device="cpu").generate(PROMPTS, TOKENS) == evaluated(latent)
    assert isinstance(load_model("someone/student", "auto", "cpu", 2), LatentLM)


# ----------------------------------------------------------------------------------------------------------- formats


def asked(loaded: Student, *text: str) -> list[str]:
    """Answers to token ids that were written out by hand."""
    assert not loaded.latents
    found: list[str] = []
    lm: Any = loaded.lm
    for each in text:
        ids = torch.tensor([loaded.tokenizer.encode(each, add_special_tokens=False)])
        tokens = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
        found.append(str(loaded.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)))
    return found


def test_a_question_is_written_as_in_the_data_of_the_recipe(plain: Path) -> None:
    loaded = student(plain)
    expected = asked(loaded, "<s>Question: 2+3?\nAnswer:", "<s>问题：四加五？\n答案：")
    assert loaded.generate(["2+3?", "四加五？"], TOKENS, format="question") == expected
    assert loaded.generate(["2+3?", "四加五？"], TOKENS) != expected


def with_chat_template(directory: Path, copy: Path) -> Path:
    shutil.copytree(directory, copy, dirs_exist_ok=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(copy)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(copy)
    return copy


@pytest.mark.parametrize("kind", ["plain", "latent"])
def test_a_student_of_chats_is_asked_and_evaluated_in_its_chat_template(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    directory = with_chat_template(request.getfixturevalue(kind), tmp_path)
    talks: list[Any] = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}] for prompt in PROMPTS
    ]
    as_chats, as_texts = student(directory).generate(talks, TOKENS), student(directory).generate(PROMPTS, TOKENS)
    assert evaluated(directory) == as_texts != as_chats
    PromptFormat("chat", "Be brief.").save(directory)
    loaded = student(directory)
    assert loaded.generate(PROMPTS, TOKENS) == as_chats
    assert loaded.generate(PROMPTS, TOKENS, format="plain") == as_texts
    assert evaluated(directory) == as_chats
    assert evaluated(directory, style="plain") == as_texts
    shouted = loaded.generate(PROMPTS, TOKENS, system_prompt="Shout.")
    assert evaluated(directory, system_prompt="Shout.") == shouted != as_chats


def test_a_system_prompt_without_a_chat_is_refused(plain: Path) -> None:
    with pytest.raises(FieldError, match=r"^system_prompt: needs format 'chat'"):
        student(plain).generate("2+3?", TOKENS, system_prompt="Be brief.")
    with pytest.raises(FieldError, match=r"^--system_prompt: needs --format chat"):
        evaluated(plain, system_prompt="Be brief.")


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "chat"}', '{"format": "xml", "system_prompt": ""}'])
def test_a_damaged_prompt_format_is_refused(plain: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    (tmp_path / PROMPT_FORMAT).write_text(content, encoding="utf-8")
    with pytest.raises(FieldError, match=f"^path: .*{PROMPT_FORMAT}"):
        student(tmp_path)


def test_a_latent_student_of_an_earlier_version_is_refused(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    (tmp_path / "latent_config.json").write_text('{"latents": 3, "passes": 2}', encoding="utf-8")
    with pytest.raises(FieldError, match=r"^path: .* of an earlier version"):
        student(tmp_path)
    with pytest.raises(FieldError, match=r"^--model_path: .* of an earlier version"):
        evaluated(tmp_path)


def test_a_chat_uses_the_template_of_the_tokenizer_with_one_bos(plain: Path, tmp_path: Path) -> None:
    loaded = student(with_chat_template(plain, tmp_path))
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+3?"},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "4+4?"},
    ]
    (one, long) = asked(
        loaded, "<s>[user]2+3?[assistant]", "<s>[system]Be brief.[user]2+3?[assistant]5[user]4+4?[assistant]"
    )
    assert loaded.generate("2+3?", TOKENS, format="chat") == [one]
    assert loaded.generate(talk, TOKENS) == [long]
    assert loaded.generate([talk, talk[1:2]], TOKENS) == [long, one]
    assert "".join(loaded.stream(talk, TOKENS)) == long
    assert loaded.generate(talk[1:], TOKENS, system_prompt="Be brief.") == [long]
    assert loaded.generate(talk, TOKENS, system_prompt="Shout.") == [long]
    with pytest.raises(FieldError, match=r"^format: the chat template refuses the roles .*: the user speaks last"):
        loaded.generate(talk[:3])
    with pytest.raises(FieldError, match=r"^prompts\.0: expected messages with a 'role' .* got \{'text'"):
        loaded.generate([{"text": "2+3?"}])
    with pytest.raises(
        FieldError, match=r"^prompts\.0: expected .* \(system, user, assistant\) .* got \{'role': 'tool'"
    ):
        loaded.generate([{"role": "tool", "content": "5"}])


# ------------------------------------------------------------------------------------------------------------ latents


def naive_passes(loaded: Student, prompt: str, latents: int, passes: int) -> list[tuple[Tensor, Tensor]]:
    """After each pass: the probabilities that the head gives to each latent's place, and the latents. In fp64."""
    assert loaded._latent is not None
    lm: Any = loaded.lm.double()
    state = {name: weight.double() for name, weight in loaded._latent.reasoning.state_dict().items()}
    ids = loaded.tokenizer.encode(prompt)
    prompt_PE = lm.get_input_embeddings()(torch.tensor(ids))
    latents_ME = state["first_inputs.weight"][:latents]
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(passes):
        output = lm(inputs_embeds=torch.cat([prompt_PE, latents_ME])[None], output_hidden_states=True)
        before_ME = output.hidden_states[-1][0, len(ids) - 1 : -1]
        x_ME = before_ME @ state["projection.0.weight"].T + state["projection.0.bias"]
        x_ME = torch.nn.functional.gelu(x_ME) @ state["projection.2.weight"].T + state["projection.2.bias"]
        norm = state["projection.3.weight"], state["projection.3.bias"]
        latents_ME = layer_norm(x_ME, x_ME.shape[-1:], *norm)
        found.append((output.logits[0, len(ids) - 1 : -1].softmax(dim=-1), latents_ME))
    return found


@pytest.mark.parametrize(("latents", "passes"), [(None, None), (2, None), (None, 4), (1, 1)])
def test_thoughts_are_the_latents_and_the_tokens_in_their_place(
    latent: Path, latents: int | None, passes: int | None
) -> None:
    loaded = student(latent)
    found = loaded.think(PROMPTS, top=4, latents=latents, passes=passes, batch_size=2)
    assert len(found) == len(PROMPTS)
    with torch.no_grad():
        expected = [naive_passes(loaded, prompt, latents or LATENTS, passes or PASSES) for prompt in PROMPTS]
    for thoughts, of_prompt in zip(found, expected, strict=True):
        assert len(thoughts.tokens) == len(of_prompt) == (passes or PASSES)
        for number, (probabilities_MV, latents_ME) in enumerate(of_prompt):
            torch.testing.assert_close(thoughts.latents_TME[number].double(), latents_ME, atol=1e-5, rtol=1e-5)
            best = probabilities_MV.topk(4)
            for place, tokens in enumerate(thoughts.tokens[number]):
                assert [token.probability for token in tokens] == pytest.approx(best.values[place].tolist(), abs=1e-5)
                texts = [loaded.tokenizer.decode([token]) for token in best.indices[place].tolist()]
                assert [token.text for token in tokens] == texts
            firsts = [loaded.tokenizer.decode([token]) for token in best.indices[:, 0].tolist()]
            assert thoughts.text(number) == "".join(map(str, firsts))


@pytest.mark.parametrize(("latents", "passes"), [(2, None), (None, 4), (1, 1)])
def test_answers_with_fewer_latents_or_other_passes_follow_the_latents_of_think(
    latent: Path, latents: int | None, passes: int | None
) -> None:
    loaded = student(latent)
    (answer,) = loaded.answer(PROMPTS[0], TOKENS, latents=latents, passes=passes)
    assert answer.forward_passes == 1 + (passes or PASSES) + TOKENS
    (thoughts,) = loaded.think(PROMPTS[0], latents=latents, passes=passes)
    lm: Any = loaded.lm
    prompt_PE = lm.get_input_embeddings()(torch.tensor(loaded.tokenizer.encode(PROMPTS[0])))
    inputs_1TE = torch.cat([prompt_PE, thoughts.latents_TME[-1]])[None]
    mask_1T = torch.ones(inputs_1TE.shape[:2], dtype=torch.long)
    tokens = lm.generate(inputs_embeds=inputs_1TE, attention_mask=mask_1T, max_new_tokens=TOKENS, do_sample=False)
    assert answer.text == loaded.tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert answer.text != loaded.generate(PROMPTS[0], TOKENS)[0]
    assert (loaded.latents, loaded.passes) == (LATENTS, PASSES), "the student itself is unchanged"


def test_tokens_of_sentencepiece_keep_their_space() -> None:
    tokenizer = sentencepiece(prepend=True)
    piece, token = next(
        (piece, token) for piece, token in tokenizer.get_vocab().items() if re.fullmatch("▁[a-z]+", piece)
    )
    assert tokenizer.decode([token]) == piece[1:]
    assert token_text(tokenizer, token) == f" {piece[1:]}"


# ----------------------------------------------------------------------------------------------------------- refusals


def test_models_that_cannot_be_loaded_are_refused(plain: Path, latent: Path, tmp_path: Path) -> None:
    with pytest.raises(FieldError, match=r"^path: .*has no config\.json"):
        load_student(tmp_path)
    with pytest.raises(FieldError, match="device: expected auto, cpu, cuda or cuda:N"):
        load_student(plain, device="gpu")
    shutil.copytree(latent, tmp_path, dirs_exist_ok=True)
    (tmp_path / LATENT_WEIGHTS).unlink()
    with pytest.raises(FieldError, match=rf"^path: .*{LATENT_WEIGHTS} is missing"):
        load_student(tmp_path)


def test_impossible_settings_are_refused(plain: Path, latent: Path) -> None:
    loaded, thinking = student(plain), student(latent)
    with pytest.raises(FieldError, match=r"^prompts\.1: expected a text"):
        loaded.generate(["a", ""])
    with pytest.raises(FieldError, match=r"^max_new_tokens: .*greater than or equal to 1 \(got 0\)"):
        loaded.generate(PROMPTS, 0)
    with pytest.raises(FieldError, match=r"^temprature: unknown key; did you mean 'temperature'"):
        loaded.generate(PROMPTS, temprature=1.0)
    with pytest.raises(FieldError, match=r"^passes: this model has no latents; leave it out"):
        loaded.generate(PROMPTS, passes=2)
    with pytest.raises(FieldError, match=r"^model: this model has no latents"):
        loaded.think(PROMPTS)
    with pytest.raises(FieldError, match=r"^latents: this student was trained with 3 and cannot use more; got 4"):
        thinking.generate(PROMPTS, latents=4)
    with pytest.raises(FieldError, match=r"^top: expected at least 1 and at most the size of the vocabulary; got 385"):
        thinking.think(PROMPTS, top=385)
    with pytest.raises(FieldError, match=r"^format: the tokenizer has no chat template"):
        thinking.think(PROMPTS, format="chat")
    with pytest.raises(FieldError, match=r"^prompt: expected one prompt to stream; got 3"):
        loaded.stream(PROMPTS)  # pyright: ignore[reportArgumentType]


def test_a_prompt_that_does_not_fit_the_context_is_refused_with_the_numbers(latent: Path) -> None:
    loaded = student(latent)
    count = len(loaded.tokenizer.encode(PROMPTS[0]))
    room = 512 - count - LATENTS
    with pytest.raises(FieldError, match=rf"its {count} tokens and 3 latents leave room for {room} .* context of 512"):
        loaded.generate(PROMPTS[0], room + 1)
    loaded.stream(PROMPTS[0], room)
    with pytest.raises(FieldError, match=r"^prompts\.1: its \d+ tokens and 3 latents leave room for 0 new tokens"):
        loaded.generate([PROMPTS[0], "word " * 600], 1)


@pytest.mark.parametrize("settings", [{}, {"format": "question", "latents": 2, "passes": 1}])
def test_the_language_model_alone_continues_from_the_prompt_embeddings(latent: Path, settings: dict[str, Any]) -> None:
    """Without padding, cache or latent parameters, as in an engine that knows the language model only."""
    loaded = student(latent)
    answers = loaded.generate(PROMPTS, TOKENS, **settings)
    for embeddings_TE, answer in zip(loaded.prompt_embeddings(PROMPTS, **settings), answers, strict=True):
        inputs_TE, ids = embeddings_TE, list[int]()
        for _ in range(TOKENS):
            with torch.no_grad():
                ids.append(int(loaded.lm(inputs_embeds=inputs_TE[None], use_cache=False).logits[0, -1].argmax()))
                inputs_TE = torch.cat([inputs_TE, loaded.lm.get_input_embeddings()(torch.tensor(ids[-1:]))])
        assert loaded.tokenizer.decode(ids, skip_special_tokens=True) == answer


def test_prompt_embeddings_are_those_of_the_tokens_then_the_latents(plain: Path, latent: Path) -> None:
    with_latents, without = student(latent), student(plain)
    thoughts = with_latents.think(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor(without.tokenizer.encode(prompt))
        (tokens_TE,) = without.prompt_embeddings(prompt)
        assert torch.equal(tokens_TE, without.lm.get_input_embeddings()(ids))
        (embeddings_TE,) = with_latents.prompt_embeddings(prompt)
        assert torch.equal(embeddings_TE[:-LATENTS], tokens_TE)
        torch.testing.assert_close(embeddings_TE[-LATENTS:], thoughts[row].latents_TME[-1])
