"""Captures keys, values and attention inputs from a running transformers model, layer by layer.

Teachers use it, and students that are their own teacher.

transformers dispatches attention by name. The function registered here computes its scaled-dot-product attention, and
passes the attention's inputs of captured layers to an observer: queries and keys after the rotary embedding, and mask.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # pyright: ignore[reportUnknownVariableType]
from transformers.masking_utils import sdpa_mask  # pyright: ignore[reportUnknownVariableType]

from kvcore.tensors.projections import KVProjection
from kvcore.types import Tensor

# Because of "sdpa" in the name, transformers refuses models that scaled-dot-product attention cannot compute exactly.
ATTENTION_NAME = "kvdistill_sdpa"

# fp32 attention probabilities in memory at once: 128 MiB.
_PROBABILITIES_AT_ONCE = 1 << 25


@dataclass(frozen=True, slots=True)
class LayerTap:
    """One layer's inputs to its attention.

    `k_BHTD` and `v_BHTD`: as projected, before the rotary embedding. `q_BQTD` (query heads Q), `rotated_k_BHTD` and
    `attended_v_BHTD`: as the attention gets them. `mask`: True where a key is visible; None for plain causal attention.
    `extras`: other arguments of the attention function.
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
# Observers of captured attention modules; empty between batches, so that generation pays only for a look-up.
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
    """The scaled-dot-product attention of transformers; calls the module's observer first if it has one."""
    observer = _observers.get(module)
    if observer is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        observer(query, key, value, attention_mask, scale, kwargs)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


AttentionInterface.register(ATTENTION_NAME, observed_attention)  # pyright: ignore[reportUnknownMemberType]
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)  # pyright: ignore[reportUnknownMemberType]


@contextmanager
def tapped(projections: Sequence[KVProjection], receive: Receive) -> Generator[None]:
    """Context in which `receive` gets each layer before its attention is computed, in the order of computation."""
    with ExitStack() as stack:
        for projection in projections:
            stack.enter_context(_tapped_layer(projection, receive))
        yield


@contextmanager
def _tapped_layer(projection: KVProjection, receive: Receive) -> Generator[None]:
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            outputs[name] = projection.heads_first(output)

        return hook

    def observe(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, extras: Mapping[str, Any]
    ) -> None:
        # A layer that shares another layer's keys projects none itself.
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
    """The answer's tokens of each sample, padded to A: token indices, validity, and indices of their queries, [B,A].

    A token's index counts the keys before it. Its query has another index if the pass reads a kept cache, or if only
    some queries are given.
    """

    index_BA: Tensor
    valid_BA: Tensor
    query_BA: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], device: torch.device) -> AnswerRows:
        """Pad the samples' token indices to the longest answer."""
        longest = max(map(len, rows))
        index_BA = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
        lengths_B = torch.tensor([len(row) for row in rows], device=device)
        return cls(index_BA.long(), torch.arange(longest, device=device) < lengths_B[:, None], index_BA.long())


def answer_importance(tap: LayerTap, answer: AnswerRows) -> tuple[Tensor, Tensor]:
    """The attention that the answer pays to each token, [B,H,T] fp32: maximum over query heads, and mean over them.

    For each answer token: the exact softmax over its visible keys, then the maximum or the mean over a KV head's query
    heads, then the mean over the answer's tokens. 0 for a sample without an answer. Computes only the answer's rows.
    """
    batch, heads, tokens, head_dim = tap.rotated_k_BHTD.shape
    group = tap.q_BQTD.shape[1] // heads
    # G query heads share one KV head.
    q_BHGTD = tap.q_BQTD.reshape(batch, heads, group, *tap.q_BQTD.shape[2:])
    k_BH1DT = tap.rotated_k_BHTD.float().transpose(2, 3).unsqueeze(2)
    largest_BHT = q_BHGTD.new_zeros((batch, heads, tokens), dtype=torch.float32)
    mean_BHT = torch.zeros_like(largest_BHT)
    at_once = max(1, _PROBABILITIES_AT_ONCE // (batch * heads * group * tokens))
    for start in range(0, answer.index_BA.shape[1], at_once):
        index_Ba, valid_Ba, query_Ba = (
            x_BA[:, start : start + at_once] for x_BA in (answer.index_BA, answer.valid_BA, answer.query_BA)
        )
        rows = query_Ba[:, None, None, :, None].expand(-1, heads, group, -1, head_dim)
        scores_BHGaT = q_BHGTD.gather(3, rows).float() @ k_BH1DT * tap.scaling
        scores_BHGaT = scores_BHGaT + _mask_rows(tap.mask, index_Ba, query_Ba, tokens).unsqueeze(2)
        attention_BHGaT, valid_B1a1 = scores_BHGaT.softmax(dim=-1), valid_Ba[:, None, :, None]
        largest_BHT += (attention_BHGaT.amax(dim=2) * valid_B1a1).sum(dim=2)
        mean_BHT += (attention_BHGaT.mean(dim=2) * valid_B1a1).sum(dim=2)
    count_B11 = answer.valid_BA.sum(dim=1).clamp(min=1)[:, None, None]
    return largest_BHT / count_B11, mean_BHT / count_B11


def _mask_rows(mask: Tensor | None, index_Ba: Tensor, query_Ba: Tensor, tokens: int) -> Tensor:
    """The additive mask of the given queries, [B,1,a,T]: 0 where a key is visible, -inf where it is not."""
    if mask is None:
        keys_T = torch.arange(tokens, device=index_Ba.device)
        visible_B1aT = (keys_T <= index_Ba[..., None]).unsqueeze(1)
    else:
        rows = query_Ba[:, None, :, None].expand(-1, 1, -1, tokens)
        visible_B1aT = mask.expand(index_Ba.shape[0], -1, -1, -1).gather(2, rows)
    if visible_B1aT.dtype != torch.bool:
        return visible_B1aT.float()
    return torch.zeros(visible_B1aT.shape, device=index_Ba.device).masked_fill_(~visible_B1aT, -torch.inf)
