"""Chooses the waiting samples that share a batch, so that little of the batch is padding."""

from __future__ import annotations

from collections.abc import Sequence

# The largest share of a batch's padded tokens that may be padding.
MAX_PADDING_SHARE = 0.05


def similar_lengths(lengths: Sequence[int], max_tokens: int, small_tokens: int, first: int | None = None) -> list[int]:
    """Choose a batch around the first sample: indices into `lengths`, ascending, of those nearest to it in length.

    A sample joins if at most `MAX_PADDING_SHARE` of the batch is padding then. Below `small_tokens`, padding costs less
    than another batch, so it does not count. Of equal lengths the earlier sample is chosen.

    Args:
        lengths: tokens of each waiting sample, not empty.
        max_tokens: limit of the batch's padded tokens; the first sample may exceed it alone.
        small_tokens: padded tokens up to which a larger batch takes hardly longer.
        first: the samples before this index are chosen before all others; None for all.
    """
    chosen, longest, tokens = [0], lengths[0], lengths[0]
    preferred = len(lengths) if first is None else first

    def order(place: int) -> tuple[bool, int]:
        return place >= preferred, abs(lengths[place] - lengths[0])

    for place in sorted(range(1, len(lengths)), key=order):
        padded = max(longest, lengths[place]) * (len(chosen) + 1)
        padding = padded - tokens - lengths[place]
        if padded <= max_tokens and (padded <= small_tokens or padding <= MAX_PADDING_SHARE * padded):
            chosen.append(place)
            longest, tokens = max(longest, lengths[place]), tokens + lengths[place]
    return sorted(chosen)


def padding(lengths: Sequence[int]) -> int:
    """The padding tokens of a batch of samples with these lengths."""
    return max(lengths) * len(lengths) - sum(lengths)
