"""The tables of `benchmarks.all`, and the figures of `benchmarks.scale` that they show."""

from __future__ import annotations

import pytest

from benchmarks import scale, serve_overlap, tables
from benchmarks.scale import Arm, Measured, Sizes
from benchmarks.transport import Round, ratio


def test_numbers_are_short_and_missing_ones_are_blank() -> None:
    assert tables.table(("a", "b"), [["`x`", 12345.6], [0.04567, None], [1234567, 99.95]]) == (
        "| a | b |\n| --- | --- |\n| `x` | 12,346 |\n| 0.0457 |  |\n| 1,234,567 | 100 |\n"
    )


def test_errors_of_codecs_are_shown_over_the_norm_and_over_what_varies() -> None:
    kind = {"error": 0.004, "error_of_varying": 0.008, "encode_mb_s": 250.4, "decode_mb_s": 1300.0}
    both = {"smaller_than_bf16": 1.93, "error_together": 0.0123, "k": kind, "v": {**kind, "error": 0.5}}
    row = tables.codec({"codecs": {"int8, groups of 64": both}}).splitlines()[2]
    assert row == "| int8, groups of 64 | 1.93 | 0.40% (0.80%) | 50.00% (0.80%) | 1.23% | 250, 1300 | 250, 1300 |"


def test_padding_has_a_column_for_each_number_of_ranks() -> None:
    shares = {"random": {"ranks1": 0.35, "ranks8": 0.4}, "sorted": {"ranks1": 0.01, "ranks8": 0.02}}
    assert tables.padding({"padding_share": shares}).splitlines() == [
        "| order | 1 ranks | 8 ranks |",
        "| --- | --- | --- |",
        "| random | 0.35 | 0.4 |",
        "| sorted | 0.01 | 0.02 |",
    ]


def test_ratios_of_throughput_compare_arms_within_a_round() -> None:
    one, four = scale.BY_REPLICAS[0], scale.BY_REPLICAS[2]
    # The machine is twice as slow in the second round.
    found = {arm: [Measured(100.0, 1.0), Measured(50.0, 1.0), Measured(80.0, 1.0)] for arm in scale.ARMS}
    found[four] = [Measured(390.0, 1.0), Measured(190.0, 1.0), Measured(8.0, 1.0)]
    assert (one.replicas, four.replicas) == (1, 4)
    assert scale.ratios(found)["replicas_1_to_4"] == 3.8
    assert scale.ratios(found)["replicas_1_to_8"] == 1.0


def test_a_perfect_service_is_as_fast_as_the_servers_that_ranks_use() -> None:
    # A sample takes 0.5 s, and 3 ranks use 3 of 8 replicas.
    sizes = Sizes(tokens=1000, delay_ms=0.5)
    rounds = [Measured(2.4, 0.9), Measured(3.0, 0.8), Measured(1.0, 0.7)]
    found = scale.figures(Arm(3, replicas=8), rounds, sizes)
    assert (found["samples_per_s"], found["forward_share"], found["least_share"]) == (2.4, 0.4, 0.8)


def test_ranks_never_ask_for_the_same_sample() -> None:
    sizes = Sizes(batches=3, samples=4, tokens=20)
    asked = [sample for rank in range(8) for batch in scale.batches_of(rank, sizes) for sample in batch]
    assert len({sample.token_ids for sample in asked}) == len(asked) == 8 * 3 * 4


def test_cpu_of_transports_is_compared_within_a_round() -> None:
    some, others = [Round(1.0, 1.0), Round(1.0, 4.0), Round(1.0, 9.0)], [Round(1.0, 0.5), Round(1.0, 2.0)] * 2
    assert ratio(some, others[:3]) == 2.0


def test_the_service_is_compared_with_the_bare_model_within_a_round() -> None:
    # The machine is half as fast in the second round.
    seconds = {"bare": [0.9, 1.8, 0.8], "one": [1.0, 2.0, 1.0], "two": [0.8, 1.6, 0.9]}
    found = serve_overlap.figures(seconds, {"plan": [0.1, 0.3, 0.2]}, tokens=100)
    assert (found["service_over_bare"], found["two_over_one"]) == (0.9, 1.25)
    assert found["tokens_per_s"] == {"bare": 111.1, "one": 100.0, "two": 111.1}
    assert found["encode_share"] == {"plan": 0.2}


def test_batches_of_the_overlap_have_no_sample_twice() -> None:
    asked = [sample for samples in serve_overlap.batches(32) for sample in samples]
    assert len({sample.token_ids for sample in asked}) == len(asked) == 32 * serve_overlap.SAMPLES
    assert {len(sample.token_ids or ()) for sample in asked} == {serve_overlap.TOKENS}


def test_the_table_of_the_cache_has_its_epochs_and_ratios() -> None:
    epoch = {"samples_per_s": 70.0, "server_cpu_ms_per_sample": 12.0}
    found = {"without": epoch, "first": epoch, "second": {**epoch, "samples_per_s": 560.0}}
    lines = tables.result_cache({**found, "second_over_first": 8.0, "first_over_without": 1.0}).splitlines()
    assert "| second epoch | 560 | 12 |" in lines
    assert "| `second_over_first` | 8 |" in lines


@pytest.mark.parametrize("arm", scale.ARMS)
def test_every_arm_has_servers_enough(arm: Arm) -> None:
    assert arm.teachers * arm.replicas <= scale.MOST_SERVERS
