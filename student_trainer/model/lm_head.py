"""A language model's logits and cross-entropy from its last hidden states, only at the positions that are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from kvcore.errors import FieldError
from kvcore.types import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits held at once: 128 MiB in fp32, whatever the vocabulary and the batch.
_CHUNK_LOGITS = 1 << 25
# Logits of the same model by two routes differ by rounding only.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_CHECKED_TOKENS = 8


def logits_of(lm: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [...,V] of last hidden states [...,E], with the scales and caps that some models apply after the head.

    Granite divides by `logits_scaling`, Cohere multiplies by `logit_scale`, Gemma 2 has `final_logit_softcapping`.
    """
    head = lm.get_output_embeddings()
    assert head is not None, "a causal language model has a head"
    config: Any = lm.config.get_text_config()
    logits = head(hidden)
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


@torch.no_grad()
def check_logits(lm: PreTrainedModel, field: str) -> None:
    """Compares `logits_of` with the model's own logits of a few tokens.

    Raises:
        FieldError: they differ, so the model computes its logits in a way that kvdistill does not know.
    """
    training = lm.training
    lm.eval()
    vocabulary = int(lm.get_input_embeddings().num_embeddings)  # type: ignore[union-attr]
    device = next(lm.parameters()).device
    ids_BT = torch.arange(1, _CHECKED_TOKENS + 1, device=device)[None] * 7 % vocabulary
    expected: Tensor = lm(input_ids=ids_BT, use_cache=False).logits.float()
    found = logits_of(lm, lm.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state).float()
    lm.train(training)
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    if not error <= _TOLERANCE.get(lm.dtype, _TOLERANCE[torch.bfloat16]):
        raise FieldError(
            field,
            f"{type(lm).__name__} computes its logits in a way that kvdistill does not know: the head's output differs "
            f"from the model's logits by {100 * error:.0f} %. Next: use a model of another architecture as the student",
        )


def token_cross_entropy(lm: PreTrainedModel, hidden_BTE: Tensor, targets_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Cross-entropy [B,T] of each target from the hidden state that predicts it (natural logarithm), in fp32.

    Only masked-in positions get logits; the others are 0. Logits are computed in chunks, and again in the backward
    pass, so peak memory does not depend on the batch, its length or the vocabulary.
    """
    hidden_NE, targets_N = hidden_BTE[mask_BT], targets_BT[mask_BT]
    vocabulary = int(lm.config.get_text_config().vocab_size)
    chunk = max(1, _CHUNK_LOGITS // vocabulary)
    parts = list(zip(hidden_NE.split(chunk), targets_N.split(chunk), strict=True))
    if len(parts) > 1 and torch.is_grad_enabled():
        # A head has no dropout, so its random state need not be kept.
        found = [checkpoint(_chunk, lm, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    else:
        found = [_chunk(lm, *part) for part in parts]
    loss_BT = hidden_BTE.new_zeros(targets_BT.shape, dtype=found[0].dtype)
    return loss_BT.masked_scatter(mask_BT, torch.cat(found))


def _chunk(lm: PreTrainedModel, hidden_NE: Tensor, targets_N: Tensor) -> Tensor:
    logits_NV = logits_of(lm, hidden_NE)
    return functional.cross_entropy(
        logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), targets_N, reduction="none"
    )
