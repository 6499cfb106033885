"""Tests of K/V kept between passes over the same samples."""

from __future__ import annotations

from student_trainer.kv_sources.kept import Kept
from tests.support.kv_fakes import MemorySource, kv_of, same_result, samples

SAMPLES = samples(6)
SIZE = kv_of(SAMPLES[0]).nbytes


def test_a_second_pass_gets_the_same_kv_without_asking_again() -> None:
    source = MemorySource(missing=["s4"])
    kept = Kept(source, 6 * SIZE)
    first = kept.fetch(SAMPLES[:4]) + kept.fetch(SAMPLES[4:])
    # Other batches, one of them with a sample twice.
    again = kept.fetch(SAMPLES[:1]) + kept.fetch([*SAMPLES[1:], SAMPLES[0]])
    assert source.fetched == [["s0", "s1", "s2", "s3"], ["s4", "s5"]]
    for one, other in zip([*first, first[0]], again, strict=True):
        assert same_result(one, other)


def test_samples_beyond_the_limit_are_asked_for_again_each_time() -> None:
    source = MemorySource()
    kept = Kept(source, 2 * SIZE + SIZE // 2)
    expected = MemorySource().fetch(SAMPLES)
    for _ in range(3):
        for result, wanted in zip(kept.fetch(SAMPLES), expected, strict=True):
            assert same_result(result, wanted)
    assert source.fetched == [["s0", "s1", "s2", "s3", "s4", "s5"], *2 * [["s2", "s3", "s4", "s5"]]]


def test_the_same_text_with_other_spans_or_another_id_is_another_sample() -> None:
    source = MemorySource()
    kept = Kept(source, 100 * SIZE)
    kept.fetch(samples(1, "a"))
    kept.fetch(samples(1, "b"))
    assert source.fetched == [["a0"], ["b0"]]


def test_requests_are_submitted_before_the_results_of_earlier_ones() -> None:
    source = MemorySource()
    kept = Kept(source, 100 * SIZE)
    one, other = kept.submit(SAMPLES[:2]), kept.submit(SAMPLES[1:3])
    assert source.submitted == [["s0", "s1"], ["s1", "s2"]]
    assert [result.sample_id for result in (*one.result(), *other.result())] == ["s0", "s1", "s1", "s2"]
