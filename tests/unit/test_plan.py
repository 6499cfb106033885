"""Plans: one digest for one meaning, and errors that name the field, the value and the limit."""

from __future__ import annotations

import hashlib

import pytest

from kvcore.config import parse
from kvcore.errors import FieldError
from kvcore.plan import CodecSpec, KVPlan, Selection

WRITTEN_OUT = {
    "codec": {"max_relative_error": None, "group_size": 64, "name": "int8"},
    "selection": {
        "importance_weight": 0.1,
        "importance_pool": "max",
        "seed": 0,
        "scope": "sample",
        "span": "reasoning",
        "budget": 0,
        "selector": "full",
    },
    "layers": [0, 2],
}


def changed(path, value):
    """A plan in which every field has a value other than its default, with one of them changed."""
    tree = {
        "layers": [1, 3],
        "selection": {
            "selector": "r_kv",
            "budget": 5,
            "span": "answer",
            "scope": "head",
            "importance_weight": 0.25,
            "importance_pool": "mean",
            "seed": 7,
        },
        "codec": {"name": "bf16", "group_size": 32, "max_relative_error": 0.5},
    }
    node = tree
    *parents, last = path
    for name in parents:
        node = node[name]
    node[last] = value
    return parse(tree, KVPlan)


def test_equal_plans_have_equal_digests_however_they_are_written():
    digest = parse(WRITTEN_OUT, KVPlan).digest()
    reordered = dict(reversed(WRITTEN_OUT.items()))
    assert parse({"layers": [0, 2]}, KVPlan).digest() == digest
    assert parse(reordered, KVPlan).digest() == digest
    assert KVPlan(layers=(0, 2)).digest() == digest
    assert KVPlan(layers=(0, 2), selection=Selection(), codec=CodecSpec(name="int8")).digest() == digest
    whole = changed(("selection", "importance_weight"), 1).digest()
    assert changed(("selection", "importance_weight"), 1.0).digest() == whole


def test_a_digest_is_of_the_plan_as_compact_json_with_sorted_keys():
    canonical = (
        '{"codec":{"group_size":64,"max_relative_error":null,"name":"int8"},"layers":[0,2],'
        '"selection":{"budget":0,"importance_pool":"max","importance_weight":0.1,"scope":"sample","seed":0,'
        '"selector":"full","span":"reasoning"}}'
    )
    expected = hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()
    assert parse(WRITTEN_OUT, KVPlan).digest() == expected


CHANGES = [
    (("layers",), [1, 2]),
    (("layers",), [1]),
    (("selection", "selector"), "right"),
    (("selection", "budget"), 6),
    (("selection", "span"), "all"),
    (("selection", "scope"), "layer"),
    (("selection", "importance_weight"), 0.26),
    (("selection", "importance_pool"), "max"),
    (("selection", "seed"), 8),
    (("codec", "name"), "int8"),
    (("codec", "group_size"), 33),
    (("codec", "max_relative_error"), 0.4),
    (("codec", "max_relative_error"), None),
]


def test_any_field_that_changes_changes_the_digest():
    digests = [changed(path, value).digest() for path, value in CHANGES]
    digests.append(parse(WRITTEN_OUT, KVPlan).digest())
    assert len(set(digests)) == len(CHANGES) + 1


def test_every_field_of_a_plan_is_in_the_list_of_changes():
    covered = {path[-1] for path, _ in CHANGES}
    fields = {*Selection.model_fields, *CodecSpec.model_fields, *KVPlan.model_fields} - {"selection", "codec"}
    assert covered == fields


@pytest.mark.parametrize(
    ("tree", "field", "said"),
    [
        ({}, "layers", "required"),
        ({"layers": []}, "KVPlan", "layers: expected at least one"),
        ({"layers": [2, 1]}, "KVPlan", "ascending and without repeats; got [2, 1]"),
        ({"layers": [1, 1]}, "KVPlan", "got [1, 1]"),
        ({"layers": [-1]}, "layers.0", "greater than or equal to 0 (got -1)"),
        ({"layers": ["0"]}, "layers.0", "valid integer (got '0')"),
        ({"layers": [0], "selection": {"budget": 3}}, "selection", "budget: the selector 'full' keeps all tokens"),
        ({"layers": [0], "selection": {"selector": "r_kv"}}, "selection", "'r_kv' needs a budget of at least 1"),
        (
            {"layers": [0], "selection": {"selector": "best", "budget": 1}},
            "selection.selector",
            "expected one of full, right, r_kv, uniform, random, keydiff; got 'best'",
        ),
        ({"layers": [0], "selection": {"budget": -1}}, "selection.budget", "greater than or equal to 0 (got -1)"),
        (
            {"layers": [0], "selection": {"scope": "batch"}},
            "selection.scope",
            "expected one of head, layer, sample; got 'batch'",
        ),
        (
            {"layers": [0], "selection": {"span": "x"}},
            "selection.span",
            "one of prompt, reasoning, answer, all; got 'x'",
        ),
        (
            {"layers": [0], "selection": {"importance_weight": 1.5}},
            "selection.importance_weight",
            "less than or equal to 1 (got 1.5)",
        ),
        (
            {"layers": [0], "selection": {"importance_pool": "sum"}},
            "selection.importance_pool",
            "expected one of max, mean; got 'sum'",
        ),
        ({"layers": [0], "selection": {"seed": -1}}, "selection.seed", "greater than or equal to 0 (got -1)"),
        ({"layers": [0], "selection": {"seed": 2**63}}, "selection.seed", f"less than {2**63} (got {2**63})"),
        (
            {"layers": [0], "codec": {"name": "int4"}},
            "codec.name",
            "expected one of raw, bf16, int8; got 'int4'; did you mean 'int8'?",
        ),
        ({"layers": [0], "codec": {"group_size": 0}}, "codec.group_size", "greater than or equal to 1 (got 0)"),
        ({"layers": [0], "codec": {"group_size": 5000}}, "codec.group_size", "less than or equal to 4096 (got 5000)"),
        (
            {"layers": [0], "codec": {"max_relative_error": 0.0}},
            "codec.max_relative_error",
            "greater than 0 (got 0.0)",
        ),
        ({"layers": [0], "codec": {"groupsize": 8}}, "codec.groupsize", "unknown key; did you mean 'group_size'?"),
    ],
)
def test_a_wrong_plan_names_the_field_the_value_and_the_limit(tree, field, said):
    with pytest.raises(FieldError) as caught:
        parse(tree, KVPlan)
    assert caught.value.field == field
    assert said in caught.value.problem


def test_plans_cannot_be_changed():
    plan = KVPlan(layers=(0,))
    with pytest.raises(ValueError, match="frozen"):
        plan.layers = (1,)
