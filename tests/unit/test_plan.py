"""Plans: one digest for one meaning, and errors that name the field, the value and the limit."""

from __future__ import annotations

import hashlib

import pytest

from kvcore.config import parse
from kvcore.errors import FieldError
from kvcore.plan import SELECTORS, CodecSpec, KVPlan, PlanMap, Selection, changed_selection

WRITTEN_OUT = {
    "codec": {"max_relative_error": None, "group_size": 64, "name": "int8"},
    "selection": {
        "importance_weight": 0.5,
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
            "scope": "sample",
            "importance_weight": 0.25,
            "importance_pool": "mean",
            "seed": 7,
        },
        "codec": {"name": "bf16", "group_size": 32, "max_relative_error": 0.5},
        "map": {"digest": "ab" * 16, "heads": 2, "head_dim": 8},
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
        '"selection":{"budget":0,"importance_pool":"max","importance_weight":0.5,"scope":"sample","seed":0,'
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
    (("map",), None),
    (("map", "digest"), "cd" * 16),
    (("map", "heads"), 3),
    (("map", "head_dim"), 9),
    (("map", "restores"), True),
]


def test_any_field_that_changes_changes_the_digest():
    digests = [changed(path, value).digest() for path, value in CHANGES]
    digests.append(parse(WRITTEN_OUT, KVPlan).digest())
    assert len(set(digests)) == len(CHANGES) + 1


def test_every_field_of_a_plan_is_in_the_list_of_changes():
    covered = {path[-1] for path, _ in CHANGES}
    fields = {*Selection.model_fields, *CodecSpec.model_fields, *KVPlan.model_fields, *PlanMap.model_fields}
    fields -= {"selection", "codec"}
    assert covered == fields


@pytest.mark.parametrize(
    ("tree", "field", "said"),
    [
        ({}, "layers", "required"),
        ({"layers": []}, "layers", "expected at least one"),
        ({"layers": [2, 1]}, "layers", "ascending and without repeats; got [2, 1]"),
        ({"layers": [1, 1]}, "layers", "got [1, 1]"),
        ({"layers": [-1]}, "layers.0", "greater than or equal to 0 (got -1)"),
        ({"layers": ["0"]}, "layers.0", "valid integer (got '0')"),
        ({"layers": [0], "selection": {"budget": 3}}, "selection.budget", "the selector 'full' keeps all tokens"),
        ({"layers": [0], "selection": {"selector": "r_kv"}}, "selection.budget", "'r_kv' needs a budget of at least 1"),
        (
            {"layers": [0], "selection": {"selector": "best", "budget": 1}},
            "selection.selector",
            "expected one of full, right, r_kv, r_kv_centred, uniform, random, keydiff; got 'best'",
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
            {"layers": [0], "codec": {"name": "int5"}},
            "codec.name",
            "expected one of raw, bf16, int8, int6, int4, pca; got 'int5'; did you mean 'int8'?",
        ),
        ({"layers": [0], "codec": {"group_size": 0}}, "codec.group_size", "greater than or equal to 1 (got 0)"),
        ({"layers": [0], "codec": {"group_size": 5000}}, "codec.group_size", "less than or equal to 4096 (got 5000)"),
        (
            {"layers": [0], "codec": {"max_relative_error": 0.0}},
            "codec.max_relative_error",
            "greater than 0 (got 0.0)",
        ),
        ({"layers": [0], "map": {"digest": "ab", "heads": 1, "head_dim": 4}}, "map.digest", "(got 'ab')"),
        (
            {"layers": [0], "map": {"digest": "ab" * 16, "heads": 0, "head_dim": 4}},
            "map.heads",
            "greater than or equal to 1 (got 0)",
        ),
        (
            {
                "layers": [0],
                "selection": {"scope": "head"},
                "map": {"digest": "ab" * 16, "heads": 1, "head_dim": 4},
            },
            "map",
            "needs selection.scope 'layer' or 'sample'; got 'head'",
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


def test_only_keydiff_has_a_warning():
    warned = {name: Selection(selector=name, budget=0 if name == "full" else 1).warning for name in SELECTORS}
    assert [name for name, warning in warned.items() if warning] == ["keydiff"]
    assert "keeps few informative tokens of real text" in str(warned["keydiff"])
    assert "next: " in str(warned["keydiff"])


def test_another_selector_keeps_the_options_that_it_reads():
    base = Selection(selector="r_kv", budget=5, span="all", importance_weight=0.25, importance_pool="mean")
    assert changed_selection(base, {"span": "answer"}) == base.model_dump() | {"span": "answer"}
    kept = {"selector": "random", "budget": 5, "span": "all", "scope": "sample", "seed": 0}
    assert changed_selection(base, {"selector": "random"}) == kept
    weighted = {"importance_weight": 0.25, "importance_pool": "mean", "budget": 5, "span": "all", "scope": "sample"}
    assert changed_selection(base, {"selector": "r_kv_centred"}) == {"selector": "r_kv_centred", **weighted}
    assert changed_selection(base, {"selector": "full"}) == {"selector": "full", "span": "all", "scope": "sample"}
    assert changed_selection(base, {"selector": "a_plug_in"}) == base.model_dump() | {"selector": "a_plug_in"}
