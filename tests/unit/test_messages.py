"""Plans, samples and descriptions survive protobuf, and every wrong value is refused by its field's path."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
import xxhash
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from kvcore.errors import FieldError, ProtocolError
from kvcore.plan import CODECS, SELECTORS, CodecSpec, KVPlan, SamplingParams, Selection
from kvcore.types import Sample, Span, TeacherInfo
from kvcore.wire.messages import (
    info_from_proto,
    info_to_proto,
    plan_from_proto,
    plan_to_proto,
    sample_from_proto,
    sample_to_proto,
    sampling_from_proto,
    sampling_to_proto,
)
from protos import kv_cache_pb2 as pb
from tests.support.streams import INFO

INT32_MAX = 2**31 - 1

selections = st.builds(
    lambda selector, budget, span, scope, weight, pool, seed: Selection(
        selector=selector,
        budget=0 if selector == "full" else budget,
        span=span,
        scope=scope,
        importance_weight=weight,
        importance_pool=pool,
        seed=seed,
    ),
    st.sampled_from(tuple(SELECTORS)),
    st.integers(1, INT32_MAX),
    st.sampled_from(["prompt", "reasoning", "answer", "all"]),
    st.sampled_from(["head", "layer", "sample"]),
    st.floats(0, 1),
    st.sampled_from(["max", "mean"]),
    st.integers(0, 2**63 - 1),
)
codecs = st.builds(
    CodecSpec,
    name=st.sampled_from(tuple(CODECS)),
    group_size=st.integers(1, 4096),
    max_relative_error=st.none() | st.floats(0, 1e300, exclude_min=True),
)
plans = st.builds(
    lambda layers, selection, codec: KVPlan(layers=tuple(sorted(layers)), selection=selection, codec=codec),
    st.sets(st.integers(0, INT32_MAX), min_size=1, max_size=5),
    selections,
    codecs,
)


def through_bytes(message):
    return type(message).FromString(message.SerializeToString())


@given(plans)
def test_a_plan_and_its_digest_survive_the_wire(plan):
    got = plan_from_proto(through_bytes(plan_to_proto(plan)))
    assert got == plan
    assert got.digest() == plan.digest()


def test_fields_that_a_foreign_client_leaves_out_take_the_documented_defaults():
    plan = plan_from_proto(
        pb.Plan(
            layers=[1],
            selection=pb.Selection(selector="r_kv", budget=4, span=pb.SPAN_KIND_REASONING, scope=pb.SCOPE_HEAD),
            codec=pb.Codec(name="int8"),
        )
    )
    assert plan.selection.importance_weight == 0.1
    assert plan.selection.importance_pool == "max"
    assert plan.selection.seed == 0
    assert plan.codec == CodecSpec(name="int8", group_size=64, max_relative_error=None)


def test_a_weight_of_zero_is_not_taken_for_a_missing_one():
    plan = KVPlan(layers=(0,), selection=Selection(selector="r_kv", budget=1, importance_weight=0.0))
    assert plan_from_proto(through_bytes(plan_to_proto(plan))).selection.importance_weight == 0.0


def bad_plan(**changes: Any) -> pb.Plan:
    message = plan_to_proto(KVPlan(layers=(0, 2), selection=Selection(selector="r_kv", budget=3)))
    for path, value in changes.items():
        *parents, name = path.split("__")
        target = message
        for parent in parents:
            target = getattr(target, parent)
        if name == "layers":
            target.ClearField(name)
            target.layers.extend(value)
        elif value is None:
            target.ClearField(name)
        else:
            setattr(target, name, value)
    return message


@pytest.mark.parametrize(
    ("changes", "field", "problem"),
    [
        ({"selection__budget": -1}, "plan.selection.budget", "greater than or equal to 0 (got -1)"),
        ({"selection__budget": 0}, "plan.selection.budget", "at least 1"),
        ({"selection__selector": "full"}, "plan.selection.budget", "takes no budget; got 3"),
        ({"selection__selector": "best"}, "plan.selection.selector", "random, keydiff; got 'best'"),
        ({"selection__selector": None}, "plan.selection.selector", "random, keydiff; got ''"),
        ({"selection__span": 0}, "plan.selection.span", "3 (answer), 4 (all) (got 0)"),
        ({"selection__span": 17}, "plan.selection.span", "(got 17)"),
        ({"selection__scope": 4}, "plan.selection.scope", "1 (head), 2 (layer), 3 (sample) (got 4)"),
        (
            {"selection__importance_weight": 1.5},
            "plan.selection.importance_weight",
            "less than or equal to 1 (got 1.5)",
        ),
        ({"selection__importance_weight": float("nan")}, "plan.selection.importance_weight", "finite number (got nan)"),
        (
            {"selection__importance_pool": pb.IMPORTANCE_POOL_UNSPECIFIED},
            "plan.selection.importance_pool",
            "1 (max), 2 (mean) (got 0)",
        ),
        ({"selection__importance_pool": 3}, "plan.selection.importance_pool", "(got 3)"),
        ({"selection__seed": 2**63}, "plan.selection.seed", f"less than {2**63} (got {2**63})"),
        ({"selection": None}, "plan.selection.span", "(got 0)"),
        ({"codec__name": "zip"}, "plan.codec.name", "expected one of raw, bf16, int8; got 'zip'"),
        ({"codec__group_size": 0}, "plan.codec.group_size", "greater than or equal to 1 (got 0)"),
        ({"codec__group_size": 4097}, "plan.codec.group_size", "less than or equal to 4096 (got 4097)"),
        ({"codec__max_relative_error": 0.0}, "plan.codec.max_relative_error", "greater than 0 (got 0.0)"),
        ({"codec__max_relative_error": float("inf")}, "plan.codec.max_relative_error", "finite number (got inf)"),
        ({"codec": None}, "plan.codec.name", "expected one of raw, bf16, int8; got ''"),
        ({"layers": []}, "plan.layers", "at least one"),
        ({"layers": [2, 0]}, "plan.layers", "ascending and without repeats; got [2, 0]"),
        ({"layers": [1, 1]}, "plan.layers", "ascending and without repeats; got [1, 1]"),
        ({"layers": [-3, 1]}, "plan.layers.0", "greater than or equal to 0 (got -3)"),
    ],
    ids=str,
)
def test_a_wrong_plan_is_refused_by_field_value_and_limit(changes, field, problem):
    with pytest.raises(FieldError) as caught:
        plan_from_proto(bad_plan(**changes))
    assert caught.value.field == field
    assert problem in caught.value.problem


@st.composite
def samples(draw) -> Sample:
    text = draw(st.none() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
    token_ids = None if text is not None else tuple(draw(st.lists(st.integers(0, INT32_MAX), min_size=1)))
    length = len(text if text is not None else token_ids or ())
    cuts = sorted(draw(st.lists(st.integers(0, length), min_size=2, max_size=4)))
    kinds = draw(st.permutations(["prompt", "reasoning", "answer"]))
    spans = tuple(Span(kind, start, end) for kind, start, end in zip(kinds, cuts, cuts[1:], strict=False))
    return Sample(draw(st.text("abc0", min_size=1)), text, token_ids, spans)


@given(samples())
def test_a_sample_and_its_key_survive_the_wire(sample):
    got = sample_from_proto(through_bytes(sample_to_proto(sample)))
    assert got == sample
    plan = KVPlan(layers=(0,))
    assert got.key("w", plan) == sample.key("w", plan)


def spans(*ranges: tuple[int, int, int]) -> pb.Sample:
    return pb.Sample(
        id="a", text="héllo", spans=[pb.Span(kind=cast("pb.SpanKind", k), start=s, end=e) for k, s, e in ranges]
    )


@pytest.mark.parametrize(
    ("message", "field", "problem"),
    [
        (pb.Sample(text="x"), "samples.3.id", "is empty"),
        (pb.Sample(id="a"), "samples.3", "neither text nor token_ids"),
        (pb.Sample(id="a", text=""), "samples.3.text", "is empty"),
        (pb.Sample(id="a", token_ids=pb.TokenIds()), "samples.3.token_ids.ids", "is empty"),
        (pb.Sample(id="a", token_ids=pb.TokenIds(ids=[0, -2])), "samples.3.token_ids.ids.1", "at least 0 (got -2)"),
        (spans((1, 0, 2), (0, 2, 3)), "samples.3.spans.1.kind", "(got 0)"),
        (spans((9, 0, 2)), "samples.3.spans.0.kind", "(got 9)"),
        (spans((4, 0, 2)), "samples.3.spans.0.kind", "prompt, reasoning, answer (got all)"),
        (spans((1, -1, 2)), "samples.3.spans.0.start", "(got -1)"),
        (spans((1, 6, 6)), "samples.3.spans.0.start", "length 5 (got 6)"),
        (spans((1, 2, 6)), "samples.3.spans.0.end", "the length 5 (got 6)"),
        (spans((1, 2, 1)), "samples.3.spans.0.end", "the start 2"),
        (spans((1, 0, 3), (2, 2, 4)), "samples.3.spans.1", "[2, 4) overlaps spans.0 [0, 3)"),
    ],
    ids=range(13),
)
def test_a_wrong_sample_is_refused_by_its_path(message, field, problem):
    with pytest.raises(FieldError) as caught:
        sample_from_proto(message, "samples.3")
    assert caught.value.field == field
    assert problem in caught.value.problem


def test_text_that_utf8_cannot_carry_is_refused():
    with pytest.raises(FieldError, match="sample 'a' is not valid Unicode"):
        sample_to_proto(Sample("a", text="\ud800"))


def test_a_description_survives_the_wire():
    info = dataclasses.replace(INFO, rope={"rope_type": "yarn", "factor": 2.5, "scaling": {"a": [1, 2]}})
    assert info_from_proto(through_bytes(info_to_proto(info))) == info


def test_every_flipped_bit_of_a_description_is_noticed():
    data = info_to_proto(INFO).SerializeToString()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            message = pb.DescribeResponse.FromString(bytes(damaged))
        except DecodeError:
            continue
        with pytest.raises(ProtocolError, match="description does not match its xxh3"):
            info_from_proto(message)


def test_the_smallest_teacher_is_taken():
    ones = dict.fromkeys(POSITIVE, 1)
    info = dataclasses.replace(INFO, **ones)
    assert info_from_proto(info_to_proto(info)) == info


POSITIVE = ["layers", "kv_heads", "head_dim", "max_sample_tokens", "max_samples_per_request", "max_frame_bytes"]


@pytest.mark.parametrize("name", POSITIVE)
def test_a_teacher_without_a_size_is_refused(name):
    info: TeacherInfo = dataclasses.replace(INFO, **{name: 0})
    field = f"limits.{name}" if name.startswith("max") else name
    with pytest.raises(FieldError, match=rf"^{field}: must be at least 1 \(got 0\)$"):
        info_from_proto(info_to_proto(info))


@pytest.mark.parametrize("name", ["weights_digest", "tokenizer_fingerprint"])
def test_a_teacher_without_an_identity_is_refused(name):
    with pytest.raises(FieldError, match=f"^{name}: is empty"):
        info_from_proto(info_to_proto(dataclasses.replace(INFO, **{name: ""})))


@pytest.mark.parametrize(("text", "problem"), [("", "not valid JSON"), ("{", "not valid JSON"), ("[1]", "JSON object")])
def test_rope_parameters_that_are_no_object_are_refused(text, problem):
    message = info_to_proto(INFO)
    message.rope_json = text
    message.ClearField("xxh3")
    message.xxh3 = xxhash.xxh3_64_intdigest(message.SerializeToString())
    with pytest.raises(FieldError, match=f"^rope_json: .*{problem}"):
        info_from_proto(message)


stops = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=256), max_size=16).map(tuple)
samplings = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(1, INT32_MAX),
    temperature=st.floats(0, 100),
    top_p=st.floats(0, 1, exclude_min=True),
    seed=st.integers(0, 2**63 - 1),
    stop=stops,
    answer_marker=st.text(st.characters(exclude_categories=["Cs"]), max_size=256),
)


@given(samplings)
def test_samplings_survive_the_wire(sampling: SamplingParams) -> None:
    sent = pb.Sampling.FromString(sampling_to_proto(sampling).SerializeToString())
    assert sampling_from_proto(sent) == sampling


def test_what_a_sampling_leaves_out_is_greedy() -> None:
    assert sampling_from_proto(pb.Sampling(max_new_tokens=3)) == SamplingParams(max_new_tokens=3)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"max_new_tokens": 0}, "sampling.max_new_tokens"),
        ({"max_new_tokens": -1}, "sampling.max_new_tokens"),
        ({"temperature": -0.5}, "sampling.temperature"),
        ({"temperature": float("nan")}, "sampling.temperature"),
        ({"temperature": 1000.0}, "sampling.temperature"),
        ({"top_p": 0.0}, "sampling.top_p"),
        ({"top_p": 1.5}, "sampling.top_p"),
        ({"top_p": float("inf")}, "sampling.top_p"),
        ({"seed": 2**63}, "sampling.seed"),
        ({"stop": ["a", ""]}, "sampling.stop.1"),
        ({"stop": ["a"] * 17}, "sampling.stop"),
        ({"answer_marker": "a" * 257}, "sampling.answer_marker"),
    ],
)
def test_samplings_that_make_no_sense_are_refused_by_field(change: dict[str, Any], field: str) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 3} | change
    with pytest.raises(FieldError) as caught:
        sampling_from_proto(pb.Sampling(**arguments))
    assert caught.value.field == field
