"""`benchmarks.result_cache`: what it asks for, and the figures that it derives."""

from __future__ import annotations

from benchmarks import result_cache
from benchmarks.result_cache import Epoch


def test_no_two_samples_of_the_first_epochs_are_equal() -> None:
    asked = [sample for number in range(6) for samples in result_cache.requests_of(number, 16) for sample in samples]
    assert len({sample.token_ids for sample in asked}) == len(asked) == 6 * 16 * 8


def test_epochs_are_compared_within_a_round() -> None:
    # The machine is half as fast in the second round.
    found = {
        "without": [Epoch(11.0, 2.0), Epoch(5.0, 3.0), Epoch(10.0, 4.0)],
        "first": [Epoch(10.0, 2.0), Epoch(5.0, 2.0), Epoch(10.0, 2.0)],
        "second": [Epoch(70.0, 0.5), Epoch(35.0, 0.5), Epoch(20.0, 0.5)],
    }
    figures = result_cache.figures(found)
    assert (figures["second_over_first"], figures["first_over_without"]) == (7.0, 1.0)
    assert figures["without"] == {"samples_per_s": 10.0, "server_cpu_ms_per_sample": 3.0}
