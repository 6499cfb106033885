"""Tests of the contract of teacher engines in this process; the Hugging Face engine matches transformers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
import torch
from transformers import PreTrainedModel

from kvcore.models import attention_taps
from kvcore.types import Sample
from teacher_server.config import ServeConfig
from teacher_server.engines import load_engine
from teacher_server.engines.base import SPAN_KINDS, LayerOutput, TeacherEngine, TokenizedSample
from teacher_server.engines.fake import FakeEngine
from teacher_server.engines.hf import hf_engine as hf
from teacher_server.engines.hf.hf_engine import HFEngine
from tests.support.engine_contract import *  # noqa: F403  every engine has to pass it
from tests.support.engine_contract import read_batch
from tests.support.reference_kv import load_reference, reference_kv
from tests.support.tiny_models import FAMILIES, Family, save_tiny_model, tiny_spec

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """An engine under test, its configuration, and the same model as a reference, if there is one."""

    engine: HFEngine | FakeEngine
    config: ServeConfig
    reference: PreTrainedModel | None


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Case]]:
    """Loads each engine once, when a test first asks for it."""

    def build(name: str) -> Case:
        if name in loaded:
            return loaded[name]
        if name == "fake":
            config = ServeConfig(model="fake:layers=3,heads=2,dim=16", engine="fake", max_sample_tokens=512)
            return loaded.setdefault(name, Case(in_process(config), config, None))
        directory = save_tiny_model(tmp_path_factory.mktemp(name), tiny_spec(cast("Family", name), layers=3))
        config = ServeConfig(model=str(directory), name=name, device="cpu", dtype="fp32")
        return loaded.setdefault(name, Case(in_process(config), config, load_reference(directory)))

    loaded: dict[str, Case] = {}
    yield build
    for case in loaded.values():
        case.engine.close()


@pytest.fixture(params=[*FAMILIES, "fake"])
def case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


@pytest.fixture
def engine(case: Case) -> TeacherEngine:
    return case.engine


@pytest.fixture(params=FAMILIES)
def hf_case(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    return cases(request.param)


def in_process(config: ServeConfig) -> HFEngine | FakeEngine:
    """Load an engine that emits its layers in this process."""
    engine = load_engine(config)
    assert isinstance(engine, HFEngine | FakeEngine)
    return engine


def run(
    engine: HFEngine | FakeEngine, batch: list[TokenizedSample], layers: tuple[int, ...], *, importance: bool = False
) -> list[LayerOutput]:
    outputs: list[LayerOutput] = []
    engine.prefill(batch, layers, importance, outputs.append)
    return outputs


def rows_in(tokens: TokenizedSample, kind: str) -> list[int]:
    return [place for place, span in enumerate(tokens.span_ids) if span >= 0 and SPAN_KINDS[span] == kind]


# ---------------------------------------------------------------------------------------------------- every engine


def test_layers_come_in_order_with_the_geometry_of_info(case: Case) -> None:
    info = case.engine.info
    batch = read_batch(case.engine)
    outputs = run(case.engine, batch, (0, 2))
    assert [output.layer for output in outputs] == [0, 2]
    longest = max(len(tokens.token_ids) for tokens in batch)
    for output in outputs:
        assert output.k_BHTD.shape == (len(batch), info.kv_heads, longest, info.head_dim)
        assert output.v_BHTD.shape == output.k_BHTD.shape
        assert output.importance_BHT is None
    assert info.layers == 3


def test_kv_of_a_sample_do_not_depend_on_its_batch(case: Case) -> None:
    batch = read_batch(case.engine)
    together = run(case.engine, batch, (0, 1, 2), importance=True)
    for row, tokens in enumerate(batch):
        alone = run(case.engine, [tokens], (0, 1, 2), importance=True)
        count = len(tokens.token_ids)
        for mixed, single in zip(together, alone, strict=True):
            torch.testing.assert_close(mixed.k_BHTD[row, :, :count], single.k_BHTD[0], atol=TOLERANCE, rtol=0)
            torch.testing.assert_close(mixed.v_BHTD[row, :, :count], single.v_BHTD[0], atol=TOLERANCE, rtol=0)
            assert mixed.importance_BHT is not None
            assert single.importance_BHT is not None
            torch.testing.assert_close(
                mixed.importance_BHT[row, :, :count], single.importance_BHT[0], atol=TOLERANCE, rtol=0
            )


def test_kv_differ_between_layers_heads_tokens_and_kinds(case: Case) -> None:
    first, second = run(case.engine, read_batch(case.engine)[:1], (0, 1))
    assert not torch.allclose(first.k_BHTD, second.k_BHTD)
    assert not torch.allclose(first.k_BHTD, first.v_BHTD)
    assert not torch.allclose(first.k_BHTD[:, 0], first.k_BHTD[:, 1])
    assert not torch.allclose(first.k_BHTD[:, :, 1], first.k_BHTD[:, :, 2])


def test_the_same_batch_gives_the_same_bits_again(case: Case) -> None:
    batch = read_batch(case.engine)
    for once, again in zip(run(case.engine, batch, (0, 2)), run(case.engine, batch, (0, 2)), strict=True):
        assert torch.equal(once.k_BHTD, again.k_BHTD)
        assert torch.equal(once.v_BHTD, again.v_BHTD)


def test_an_error_in_the_sink_ends_the_batch_and_the_engine_still_works(case: Case) -> None:
    batch = read_batch(case.engine)
    expected = run(case.engine, batch, (0, 1))

    def broken(output: LayerOutput) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        case.engine.prefill(batch, (0, 1), True, broken)
    for once, again in zip(expected, run(case.engine, batch, (0, 1)), strict=True):
        assert torch.equal(once.k_BHTD, again.k_BHTD)


def test_two_engines_of_the_same_model_have_the_same_identity(case: Case) -> None:
    again = load_engine(case.config)
    assert again.info.same_teacher(case.engine.info)
    again.close()


def test_importance_is_returned_as_requested_and_only_on_request(case: Case) -> None:
    batch = read_batch(case.engine)
    (output,) = run(case.engine, batch, (1,), importance=True)
    largest_BHT, mean_BHT = output.importance("max"), output.importance("mean")
    assert largest_BHT is output.importance_BHT
    assert mean_BHT is output.mean_importance_BHT
    assert largest_BHT is not None
    assert mean_BHT is not None
    assert mean_BHT.shape == largest_BHT.shape
    assert bool((mean_BHT <= largest_BHT + 1e-6).all())
    assert not torch.allclose(mean_BHT, largest_BHT)
    alone_BHT = run(case.engine, batch[2:3], (1,), importance=True)[0].mean_importance_BHT
    assert alone_BHT is not None
    torch.testing.assert_close(mean_BHT[2, :, : alone_BHT.shape[2]], alone_BHT[0], atol=TOLERANCE, rtol=0)
    assert run(case.engine, batch, (1,))[0].mean_importance_BHT is None


# ---------------------------------------------------------------------------------------------------- transformers


def test_keys_and_values_match_transformers_for_any_batch(hf_case: Case) -> None:
    assert hf_case.reference is not None
    batch = read_batch(hf_case.engine)
    outputs = run(hf_case.engine, batch, (0, 1, 2))
    for row, tokens in enumerate(batch):
        expected = reference_kv(hf_case.reference, tokens.token_ids)
        for output in outputs:
            count = len(tokens.token_ids)
            k_HTD, v_HTD = output.k_BHTD[row, :, :count].double(), output.v_BHTD[row, :, :count].double()
            torch.testing.assert_close(k_HTD, expected.k_LHTD[output.layer], atol=TOLERANCE, rtol=0)
            torch.testing.assert_close(v_HTD, expected.v_LHTD[output.layer], atol=TOLERANCE, rtol=0)


def test_importance_is_the_attention_of_the_answer(hf_case: Case) -> None:
    assert hf_case.reference is not None
    batch = read_batch(hf_case.engine)
    outputs = run(hf_case.engine, batch, (0, 1, 2), importance=True)
    for row, tokens in enumerate(batch):
        count = len(tokens.token_ids)
        expected_LHT = reference_kv(hf_case.reference, tokens.token_ids).importance(rows_in(tokens, "answer"))
        for output in outputs:
            assert output.importance_BHT is not None
            found_HT = output.importance_BHT[row].double()
            torch.testing.assert_close(found_HT[:, :count], expected_LHT[output.layer], atol=TOLERANCE, rtol=0)
            assert not found_HT[:, count:].any()


def test_mean_importance_is_the_mean_of_the_query_heads(hf_case: Case) -> None:
    assert hf_case.reference is not None
    batch = read_batch(hf_case.engine)
    outputs = run(hf_case.engine, batch, (0, 1, 2), importance=True)
    for row, tokens in enumerate(batch):
        count = len(tokens.token_ids)
        expected_LHT = reference_kv(hf_case.reference, tokens.token_ids).importance(rows_in(tokens, "answer"), "mean")
        for output in outputs:
            assert output.mean_importance_BHT is not None
            found_HT = output.mean_importance_BHT[row].double()
            torch.testing.assert_close(found_HT[:, :count], expected_LHT[output.layer], atol=TOLERANCE, rtol=0)
            assert not found_HT[:, count:].any()


def test_importance_of_a_long_answer_does_not_depend_on_the_piece_size(
    hf_case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = read_batch(hf_case.engine)
    whole = run(hf_case.engine, batch, (0, 1, 2), importance=True)
    monkeypatch.setattr(attention_taps, "_PROBABILITIES_AT_ONCE", 1)
    for expected, output in zip(whole, run(hf_case.engine, batch, (0, 1, 2), importance=True), strict=True):
        torch.testing.assert_close(output.importance_BHT, expected.importance_BHT, atol=1e-6, rtol=0)
        torch.testing.assert_close(output.mean_importance_BHT, expected.mean_importance_BHT, atol=1e-6, rtol=0)


def test_a_sample_without_an_answer_does_not_change_the_importance_of_others(hf_case: Case) -> None:
    whole = read_batch(hf_case.engine)[0]
    without = hf_case.engine.tokenize(Sample("none", text="No spans at all in here, and so no answer"))
    expected = run(hf_case.engine, [whole], (1,), importance=True)[0].importance_BHT
    mixed = run(hf_case.engine, [without, whole], (1,), importance=True)[0].importance_BHT
    assert expected is not None
    assert mixed is not None
    assert not mixed[0].any()
    torch.testing.assert_close(mixed[1, :, : expected.shape[2]], expected[0], atol=1e-6, rtol=0)


def test_attention_is_computed_only_on_request(hf_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: object) -> None:
        pytest.fail("importance was computed though nobody asked")

    monkeypatch.setattr(hf, "answer_importance", forbidden)
    run(hf_case.engine, read_batch(hf_case.engine), (0, 1))


def test_each_layer_is_emitted_before_the_next_is_computed_and_the_last_ends_the_pass(hf_case: Case) -> None:
    engine = hf_case.engine
    assert isinstance(engine, HFEngine)
    events: list[str] = []
    modules = {
        f"{name} {projection.layer}": getattr(projection.attention, name)
        for projection in engine._projections
        for name in ("k_proj", "o_proj")
    }
    handles = [
        module.register_forward_hook(lambda *_, name=name: events.append(name)) for name, module in modules.items()
    ]
    engine.prefill(read_batch(engine), (0, 1), False, lambda output: events.append(f"sink {output.layer}"))
    for handle in handles:
        handle.remove()
    assert events == ["k_proj 0", "sink 0", "o_proj 0", "k_proj 1", "sink 1"]


def test_only_the_requested_layers_are_hooked_and_all_hooks_are_removed(hf_case: Case) -> None:
    engine = hf_case.engine
    assert isinstance(engine, HFEngine)
    hooked: list[list[int]] = []

    def sink(output: LayerOutput) -> None:
        hooked.append([p.layer for p in engine._projections if p.key._forward_hooks or p.value._forward_hooks])

    engine.prefill(read_batch(engine), (1,), True, sink)
    assert hooked == [[1]]
    assert not any(p.key._forward_hooks or p.value._forward_hooks for p in engine._projections)
    assert not attention_taps._observers


def test_another_process_computes_the_same_digest(cases: Callable[[str], Case]) -> None:
    case = cases("qwen2")
    program = (
        "import sys; from teacher_server.config import ServeConfig; from teacher_server.engines import load_engine\n"
        "print('digest', load_engine(ServeConfig(model=sys.argv[1], device='cpu')).info.weights_digest)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, case.config.model],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        timeout=100,
    )
    assert f"digest {case.engine.info.weights_digest}" in answer.stdout
