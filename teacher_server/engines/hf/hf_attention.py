"""Reads keys, values and attention out of a running transformers model, layer by layer.

transformers dispatches attention by name. The function registered here is its scaled-dot-product attention, and shows
the layers that are being read what they attend with: queries and keys after the rotary embedding, and the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvcore.tensors.projections import KVProjection
from kvcore.types import Tensor

# "sdpa" in the name has transformers refuse models that scaled-dot-product attention does not compute exactly.
ATTENTION_NAME = "kvdistill_sdpa"

# fp32 elements of attention probabilities made at once: 128 MiB.
_PROBABILITIES_AT_ONCE = 1 << 25


@dataclass(frozen=True, slots=True)
class LayerTap:
    """One layer as it enters its attention.

    `q_BQTD` has the query heads Q; `rotated_k_BHTD` and `q_BQTD` are rotated, `k_BHTD` is not. `mask` is the layer's
    attention mask (True where a key is seen) or None for plain causal attention. `extras`: other arguments of the
    attention function.
    """

    layer: int
    k_BHTD: Tensor
    v_BHTD: Tensor
    q_BQTD: Tensor
    rotated_k_BHTD: Tensor
    attended_v_BHTD: Tensor
    mask: Tensor | None
    scaling: float
    extras: Mapping[str, Any]


Receive = Callable[[LayerTap], None]
_Observer = Callable[[Tensor, Tensor, Tensor, "Tensor | None", float, Mapping[str, Any]], None]
# Attention modules that are being read: empty between batches, so that a look-up is all it costs.
_observers: dict[nn.Module, _Observer] = {}


def observed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled-dot-product attention as transformers computes it, shown first to the module's observer if it has one."""
    observer = _observers.get(module)
    if observer is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        observer(query, key, value, attention_mask, scale, kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(ATTENTION_NAME, observed_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


@contextmanager
def tapped(projections: Sequence[KVProjection], receive: Receive) -> Iterator[None]:
    """While open, `receive` gets each of the layers before its attention is computed, in the order of computation."""
    with ExitStack() as stack:
        for projection in projections:
            stack.enter_context(_tapped_layer(projection, receive))
        yield


@contextmanager
def _tapped_layer(projection: KVProjection, receive: Receive) -> Iterator[None]:
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            outputs[name] = projection.heads_first(output)

        return hook

    def observe(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, extras: Mapping[str, Any]
    ) -> None:
        # Layers that share another one's keys reach their attention without having projected any.
        if outputs.keys() == {"k", "v"}:
            k_BHTD, v_BHTD = outputs.pop("k"), outputs.pop("v")
            receive(LayerTap(projection.layer, k_BHTD, v_BHTD, query, key, value, mask, scaling, extras))

    handles = [
        projection.key.register_forward_hook(keep("k")),
        projection.value.register_forward_hook(keep("v")),
    ]
    _observers[projection.attention] = observe
    try:
        yield
    finally:
        del _observers[projection.attention]
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True)
class AnswerRows:
    """The answer's tokens of each sample: indices [B,A], padded with any; which are none; where their queries stand."""

    index_BA: Tensor
    valid_BA: Tensor
    query_BA: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], device: torch.device) -> AnswerRows:
        """Pads the samples' token indices to the largest number."""
        longest = max(map(len, rows))
        index_BA = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
        lengths_B = torch.tensor([len(row) for row in rows], device=device)
        return cls(index_BA.long(), torch.arange(longest, device=device) < lengths_B[:, None], index_BA.long())


def answer_importance(tap: LayerTap, answer: AnswerRows) -> tuple[Tensor, Tensor]:
    """The attention that the answer pays to each token, [B,H,T] fp32, by the largest query head and by their mean.

    For each answer token the exact softmax over the keys that it sees, then the largest or the mean of a KV head's
    query heads, then the mean over the answer's tokens; 0 for a sample without an answer. Only the answer's rows are
    computed.
    """
    batch, heads, tokens, head_dim = tap.rotated_k_BHTD.shape
    group = tap.q_BQTD.shape[1] // heads
    # G query heads share a KV head.
    q_BHGTD = tap.q_BQTD.unflatten(1, (heads, group))
    k_BH1DT = tap.rotated_k_BHTD.float().transpose(2, 3).unsqueeze(2)
    largest_BHT = q_BHGTD.new_zeros((batch, heads, tokens), dtype=torch.float32)
    mean_BHT = torch.zeros_like(largest_BHT)
    at_once = max(1, _PROBABILITIES_AT_ONCE // (batch * heads * group * tokens))
    chunks = (tensor.split(at_once, 1) for tensor in (answer.index_BA, answer.valid_BA, answer.query_BA))
    for index_Ba, valid_Ba, query_Ba in zip(*chunks, strict=True):
        rows = query_Ba[:, None, None, :, None].expand(-1, heads, group, -1, head_dim)
        scores_BHGaT = q_BHGTD.gather(3, rows).float() @ k_BH1DT * tap.scaling
        scores_BHGaT = scores_BHGaT + _mask_rows(tap.mask, index_Ba, tokens).unsqueeze(2)
        attention_BHGaT, valid_B1a1 = scores_BHGaT.softmax(dim=-1), valid_Ba[:, None, :, None]
        largest_BHT += (attention_BHGaT.amax(dim=2) * valid_B1a1).sum(dim=2)
        mean_BHT += (attention_BHGaT.mean(dim=2) * valid_B1a1).sum(dim=2)
    count_B11 = answer.valid_BA.sum(dim=1).clamp(min=1)[:, None, None]
    return largest_BHT / count_B11, mean_BHT / count_B11


def _mask_rows(mask: Tensor | None, index_Ba: Tensor, tokens: int) -> Tensor:
    """What is added to the scores of the given queries: [B,1,a,T], 0 where a key is seen and -inf where it is not."""
    if mask is None:
        keys_T = torch.arange(tokens, device=index_Ba.device)
        seen_B1aT = (keys_T <= index_Ba[..., None]).unsqueeze(1)
    else:
        rows = index_Ba[:, None, :, None].expand(-1, 1, -1, tokens)
        seen_B1aT = mask.expand(index_Ba.shape[0], -1, -1, -1).gather(2, rows)
    if seen_B1aT.dtype != torch.bool:
        return seen_B1aT.float()
    return torch.zeros(seen_B1aT.shape, device=index_Ba.device).masked_fill_(~seen_B1aT, -torch.inf)
