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
from kvcore.plan import CODECS, CODED, SELECTORS, CodecSpec, KVPlan, PlanMap, SamplingParams, Selection
from kvcore.types import ROLES, Chat, Sample, Span, TeacherInfo, Turn
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
maps = st.builds(
    PlanMap,
    digest=st.text("0123456789abcdef", min_size=32, max_size=32),
    heads=st.integers(1, INT32_MAX),
    head_dim=st.integers(1, INT32_MAX),
    restores=st.booleans(),
)
plans = st.builds(
    lambda layers, selection, codec, named: KVPlan(
        layers=tuple(sorted(layers)),
        selection=selection,
        codec=CodecSpec() if codec.name == CODED and (named is None or selection.scope == "head") else codec,
        map=None if selection.scope == "head" else named,
    ),
    st.sets(st.integers(0, INT32_MAX), min_size=1, max_size=5),
    selections,
    codecs,
    st.none() | maps,
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
    assert plan.selection.importance_weight == 0.5
    assert plan.selection.importance_pool == "max"
    assert plan.selection.seed == 0
    assert plan.codec == CodecSpec(name="int8", group_size=64, max_relative_error=None)


def test_a_weight_of_zero_is_not_taken_for_a_missing_one():
    plan = KVPlan(layers=(0,), selection=Selection(selector="r_kv", budget=1, importance_weight=0.0))
    assert plan_from_proto(through_bytes(plan_to_proto(plan))).selection.importance_weight == 0.0


def bad_plan(**changes: Any) -> pb.Plan:
    named = PlanMap(digest="0a" * 16, heads=1, head_dim=4)
    message = plan_to_proto(KVPlan(layers=(0, 2), selection=Selection(selector="r_kv", budget=3), map=named))
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
        ({"codec__name": "zip"}, "plan.codec.name", "expected one of raw, bf16, int8, int6, int4, pca; got 'zip'"),
        ({"codec__group_size": 0}, "plan.codec.group_size", "greater than or equal to 1 (got 0)"),
        ({"codec__group_size": 4097}, "plan.codec.group_size", "less than or equal to 4096 (got 4097)"),
        ({"codec__max_relative_error": 0.0}, "plan.codec.max_relative_error", "greater than 0 (got 0.0)"),
        ({"codec__max_relative_error": float("inf")}, "plan.codec.max_relative_error", "finite number (got inf)"),
        ({"codec": None}, "plan.codec.name", "expected one of raw, bf16, int8, int6, int4, pca; got ''"),
        ({"map__digest": "x" * 32}, "plan.map.digest", f"(got '{'x' * 32}')"),
        ({"map__heads": 0}, "plan.map.heads", "greater than or equal to 1 (got 0)"),
        ({"map__head_dim": -1}, "plan.map.head_dim", "greater than or equal to 1 (got -1)"),
        ({"selection__scope": pb.SCOPE_HEAD}, "plan.map", "a map mixes heads"),
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
    chat = None
    if text is not None and draw(st.booleans()):
        roles = draw(st.lists(st.sampled_from(ROLES[1:]), min_size=1, max_size=3))
        ranges = iter(sorted(draw(st.lists(st.integers(0, length), min_size=6, max_size=6))))
        turns = tuple(Turn(role, start, end) for role, start, end in zip(roles, ranges, ranges, strict=False))
        chat = Chat(turns, draw(st.sampled_from(["", "é"])))
    return Sample(draw(st.text("abc0", min_size=1)), text, token_ids, spans, chat)


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


def turns(*turns: tuple[str, int, int], **content: Any) -> pb.Sample:
    chat = pb.Chat(turns=[pb.Turn(role=role, start=start, end=end) for role, start, end in turns])
    return pb.Sample(id="a", chat=chat, **(content or {"text": "héllo"}))


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
        (turns(), "samples.3.chat.turns", "is empty"),
        (turns(("tool", 0, 1)), "samples.3.chat.turns.0.role", "user or assistant (got 'tool')"),
        (turns(("user", 0, 1), ("system", 1, 2)), "samples.3.chat.turns.1.role", "(got 'system')"),
        (turns(("user", 0, 6)), "samples.3.chat.turns.0", "the text's length 5 (got 0 to 6)"),
        (turns(("user", 0, 3), ("user", 2, 4)), "samples.3.chat.turns.1", "the turn before, 3, and"),
        (turns(("user", 3, 2)), "samples.3.chat.turns.0", "(got 3 to 2)"),
        (turns(("user", 0, 1), token_ids=pb.TokenIds(ids=[1])), "samples.3.chat", "the sample has token_ids"),
    ],
    ids=range(20),
)
def test_a_wrong_sample_is_refused_by_its_path(message, field, problem):
    with pytest.raises(FieldError) as caught:
        sample_from_proto(message, "samples.3")
    assert caught.value.field == field
    assert problem in caught.value.problem


def test_a_key_depends_on_every_part_of_a_chat():
    plan = KVPlan(layers=(0,))
    chat = Chat((Turn("user", 0, 2),))
    others = [
        None,
        Chat((Turn("user", 0, 3),)),
        Chat((Turn("user", 1, 2),)),
        Chat((Turn("system", 0, 2),)),
        Chat((Turn("user", 0, 2), Turn("user", 2, 3))),
        Chat((Turn("user", 0, 2),), "x"),
    ]
    keys = [Sample("a", text="hello", chat=each).key("w", plan) for each in (chat, *others)]
    assert len(set(keys)) == len(keys)


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


def test_a_teacher_that_knows_no_maps_takes_none():
    assert info_from_proto(info_to_proto(dataclasses.replace(INFO, max_map_bytes=0))).max_map_bytes == 0
    with pytest.raises(FieldError, match=r"^limits.max_map_bytes: must be at least 0 \(got -1\)$"):
        info_from_proto(info_to_proto(dataclasses.replace(INFO, max_map_bytes=-1)))


@pytest.mark.parametrize("name", ["weights_digest", "tokenizer_fingerprint"])
def test_a_teacher_without_an_identity_is_refused(name):
    with pytest.raises(FieldError, match=f"^{name}: is empty"):
        info_from_proto(info_to_proto(dataclasses.replace(INFO, **{name: ""})))


def sealed(message: pb.DescribeResponse) -> pb.DescribeResponse:
    """The description with a hash that fits, as a hostile server sends it."""
    message.ClearField("xxh3")
    message.xxh3 = xxhash.xxh3_64_intdigest(message.SerializeToString())
    return message


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"layers": 50_000_000}, "layers: must be at most 4096 (got 50000000)"),
        ({"kv_heads": INT32_MAX}, "kv_heads: must be at most 4096"),
        ({"head_dim": INT32_MAX}, "head_dim: must be at most 65536"),
        ({"max_frame_bytes": INT32_MAX}, f"limits.max_frame_bytes: must be at most {64 << 20}"),
        ({"model": "\x1b[2J\nfake"}, "model: must have no control characters (got '\\x1b[2J\\nfake')"),
        ({"engine": "hf\r"}, "engine: must have no control characters"),
        ({"dtype": "\u202ebf16"}, "dtype: must have no control characters"),
        ({"model": "m" * 5000}, "model: must have at most 1024 characters (got 5000)"),
        ({"selectors": ("full",) * 1000}, "selectors: must be at most 256 (got 1000)"),
        ({"codecs": ("raw", "\x00")}, "codecs: must have no control characters"),
    ],
)
def test_a_hostile_description_is_refused_before_anything_is_made_of_it(changes, problem):
    with pytest.raises(FieldError) as caught:
        info_from_proto(info_to_proto(dataclasses.replace(INFO, **changes)))
    assert str(caught.value).startswith(problem)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ['{"a":' + "[" * 30_000, '{"a": ' + "9" * 6000 + "}"])
def test_rope_parameters_that_python_cannot_read_are_refused(text):
    message = info_to_proto(INFO)
    message.rope_json = text
    with pytest.raises(FieldError, match=r"^rope_json: is not valid JSON"):
        info_from_proto(sealed(message))


@pytest.mark.parametrize(("text", "problem"), [("", "not valid JSON"), ("{", "not valid JSON"), ("[1]", "JSON object")])
def test_rope_parameters_that_are_no_object_are_refused(text, problem):
    message = info_to_proto(INFO)
    message.rope_json = text
    with pytest.raises(FieldError, match=f"^rope_json: .*{problem}"):
        info_from_proto(sealed(message))


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
