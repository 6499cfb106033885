"""`kvdistill.TeacherClient` against real servers: the model's own K/V, plans, replicas, TLS, generated text."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvcore.errors import FieldError, TeacherMismatchError, TeacherRefusedError, TeacherUnavailableError
from kvdistill import CodecSpec, KVPlan, Sample, Selection, Span, TeacherClient
from tests.support.certificates import certificate
from tests.support.servers import REPOSITORY, TeacherProcess, running_teacher
from tests.support.tiny_models import save_tiny_model, tiny_spec

TEXTS = ["2 + 3 = 5", "The capital of France is Paris, and of Spain Madrid."]
FAKE = "fake:layers=3,heads=2,dim=16"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), tiny_spec("qwen2", seed=1))


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherProcess]:
    with running_teacher(model, tmp_path_factory.mktemp("log") / "server.log") as running:
        yield running


@pytest.fixture
def client(server: TeacherProcess) -> Iterator[TeacherClient]:
    with TeacherClient(server.endpoint, patience_s=1.0) as made:
        yield made


def test_values_are_those_in_the_models_own_cache(client: TeacherClient, model: Path) -> None:
    kv = client.fetch(TEXTS, codec="raw")
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    for row, text in enumerate(TEXTS):
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert kv.token_ids[row] == tuple(ids[0].tolist())
        with torch.no_grad():
            cache = lm(ids, use_cache=True).past_key_values
        v_LHTD = torch.cat([layer.values for layer in cache.layers])
        torch.testing.assert_close(kv.v_BLHMD[row, :, :, kv.mask_BM[row]], v_LHTD, atol=1e-5, rtol=1e-4)
        assert kv.mask_BM[row].sum() == ids.shape[1]


def test_positions_and_byte_ends_belong_to_the_selected_tokens(client: TeacherClient) -> None:
    kv = client.fetch(TEXTS, layers=[0, 2], selector="right", budget=6, codec="bf16")
    assert kv.k_BLHMD.shape == (2, 2, client.info.kv_heads, int(kv.mask_BM.sum(dim=1).max()), client.info.head_dim)
    for row, text in enumerate(TEXTS):
        count, kept = len(kv.token_ids[row]), int(kv.mask_BM[row].sum())
        assert kept == min(6, count)
        positions = kv.positions_BLHM[row, 0, 0].tolist()
        assert positions == [*range(count - kept, count), *[-1] * (len(positions) - kept)]
        assert kv.byte_ends_BLHM[row, 0, 0, kept - 1] == len(text.encode())


def test_plan_selects_from_spans(client: TeacherClient) -> None:
    plan = KVPlan(layers=(1,), selection=Selection(), codec=CodecSpec(name="raw"))
    sample = Sample("a", text="2 + 3 = 5", spans=(Span("prompt", 0, 5), Span("reasoning", 5, 9)))
    kv = client.fetch([sample], plan)
    assert kv.plan == plan
    assert kv.byte_ends_BLHM.min() > 5
    whole = client.fetch([sample], layers=[1], codec="raw")
    torch.testing.assert_close(kv.k_BLHMD[0], whole.k_BLHMD[0][:, :, kv.positions_BLHM[0, 0, 0]])


def test_invalid_requests_are_refused(client: TeacherClient) -> None:
    with pytest.raises(FieldError, match="did you mean 'uniform'"):
        client.fetch(TEXTS, selector="unifrom", budget=3)
    with pytest.raises(FieldError, match=r"^plan: .* remove layers"):
        client.fetch(TEXTS, client.plan(), layers=[0])
    with pytest.raises(FieldError, match="id 'a'"):
        client.fetch([Sample("a", text="x"), Sample("a", text="y")])
    for nothing in ([], "a text alone"):
        with pytest.raises(FieldError, match=r"^texts: must be a list"):
            client.fetch(nothing)
    with pytest.raises(TeacherRefusedError, match="layers"):
        client.fetch(TEXTS, layers=[99])
    with pytest.raises(TeacherRefusedError, match="the span 'reasoning'"):
        client.fetch(TEXTS, span="reasoning")
    with pytest.raises(FieldError, match=r"^endpoints\.0: "):
        TeacherClient("localhost")


def test_unreachable_replica_is_skipped(server: TeacherProcess, client: TeacherClient) -> None:
    with TeacherClient(["127.0.0.1:1", server.endpoint], patience_s=5.0) as replicas:
        (one, other) = (each.fetch(TEXTS).k_BLHMD for each in (replicas, client))
        completed = [each.generate(["2 + 3"], max_new_tokens=2)[0].sample for each in (replicas, client)]
    assert completed[0] == completed[1]
    assert one.equal(other)
    with TeacherClient("127.0.0.1:1", patience_s=0.0) as nobody, pytest.raises(TeacherUnavailableError):
        nobody.fetch(TEXTS)


def test_replicas_of_different_models_are_refused(server: TeacherProcess, tmp_path: Path) -> None:
    with (
        running_teacher(FAKE, tmp_path / "fake.log", engine="fake") as other,
        TeacherClient([server.endpoint, other.endpoint]) as mixed,
        pytest.raises(TeacherMismatchError),
    ):
        mixed.fetch(TEXTS)


def test_completions_are_those_of_the_model(client: TeacherClient, model: Path) -> None:
    completions = client.generate(TEXTS, max_new_tokens=5)
    lm: Any
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    for prompt, completion in zip(TEXTS, completions, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        expected = lm.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs.input_ids.shape[1] :]
        # The teacher leaves out an incomplete character at the end.
        text = tokenizer.decode(expected, skip_special_tokens=True).rstrip("\ufffd")
        assert completion.sample.text == prompt + text
    kv = client.fetch([completion.sample for completion in completions], span="reasoning")
    assert kv.mask_BM.any(dim=1).all()
    with pytest.raises(FieldError, match="did you mean 'temperature'"):
        client.generate(TEXTS, max_new_tokens=5, temprature=1.0)


def test_tls_and_token_can_be_arguments(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path / "tls")
    token = tmp_path / "token"
    token.write_text("a-long-secret-for-tests", encoding="utf-8")
    secrets = {"tls_cert": cert, "tls_key": key, "token_file": token}
    with running_teacher(FAKE, tmp_path / "server.log", engine="fake", **secrets) as server:
        with TeacherClient(server.endpoint, tls_ca=cert, token_file=token) as client:
            assert client.fetch(TEXTS).mask_BM.any()
        with TeacherClient(server.endpoint, tls_ca=cert) as stranger, pytest.raises(TeacherRefusedError):
            stranger.fetch(TEXTS)
        with pytest.raises(FieldError, match=r"^token_file: a token is only sent over TLS; set tls_ca"):
            TeacherClient(server.endpoint, token_file=token).fetch(TEXTS)


def test_client_needs_no_package_of_the_extra_train(server: TeacherProcess) -> None:
    extra = ("datasets", "deepspeed", "lm_eval", "matplotlib", "peft", "tensorboard")
    hide = f"import sys\nfor name in {extra}: sys.modules[name] = None\n"
    use = f"from kvdistill import TeacherClient\nprint(TeacherClient({server.endpoint!r}).fetch({TEXTS}).mask_BM.sum())"
    done = subprocess.run(
        [sys.executable, "-c", hide + use], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
