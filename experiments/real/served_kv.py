"""Compares the K/V that a teacher server sends with the cache of a plain transformers forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvcore.errors import KVDistillError
from kvcore.types import Tensor
from kvdistill.client import TeacherClient


class ServedKVError(KVDistillError):
    """A server read other tokens than transformers."""


@dataclass(frozen=True, slots=True)
class ServedKV:
    """Differences by layer, keys and values, over all texts.

    `largest`: the largest absolute difference of an element. `relative`: the norm of the difference over the norm of
    transformers' tensor.
    """

    codec: str
    largest_KL: list[list[float]]
    relative_KL: list[list[float]]

    @property
    def worst_relative(self) -> float:
        """The largest relative difference of any layer."""
        return max(max(layers) for layers in self.relative_KL)


def compare_served(
    endpoint: str, model: Path | str, texts: Sequence[str], codecs: Sequence[str], *, dtype: torch.dtype, device: str
) -> list[ServedKV]:
    """Asks a server for all tokens of all layers, and reads each text alone with transformers. Llama and Qwen2 only.

    The server sends keys without rotary positions. The model's own rotary embedding is applied to them here, since
    transformers caches rotated keys.

    Args:
        endpoint: host:port of the server.
        model: the directory that it serves.
        texts: sent in one request, so that the server pads them.
        codecs: how K/V are sent.
        dtype: of transformers' weights, as the server's.
        device: of transformers' pass.

    Raises:
        ServedKVError: the server read other tokens.
    """
    lm, ids = _reader(model, texts, dtype, device)
    references = [_cache(lm, one) for one in ids]
    found: list[ServedKV] = []
    with TeacherClient(endpoint) as client:
        for codec in codecs:
            served = client.fetch(texts, codec=codec)
            if [list(one) for one in served.token_ids] != ids:
                raise ServedKVError("the server and transformers tokenise the texts differently")
            sums = _Sums(lm.config.num_hidden_layers)
            for row, reference_KLHTD in enumerate(references):
                tokens = reference_KLHTD.shape[3]
                k_LHTD = _rotated(lm, served.k_BLHMD[row, :, :, :tokens].to(device))
                v_LHTD = served.v_BLHMD[row, :, :, :tokens].to(device)
                sums.add(torch.stack([k_LHTD, v_LHTD]), reference_KLHTD)
            found.append(ServedKV(codec, sums.largest_KL.tolist(), sums.relative()))
    return found


def compare_caches(
    model: Path | str, texts: Sequence[str], one: torch.dtype, other: torch.dtype, *, device: str
) -> ServedKV:
    """The difference between transformers' own caches in two dtypes, relative to the second."""
    sides: list[list[Tensor]] = []
    layers = 0
    for dtype in (one, other):
        lm, ids = _reader(model, texts, dtype, device)
        layers = lm.config.num_hidden_layers
        sides.append([_cache(lm, text) for text in ids])
    sums = _Sums(layers)
    for one_KLHTD, other_KLHTD in zip(*sides, strict=True):
        sums.add(one_KLHTD, other_KLHTD)
    return ServedKV("none", sums.largest_KL.tolist(), sums.relative())


def _reader(model: Path | str, texts: Sequence[str], dtype: torch.dtype, device: str) -> tuple[Any, list[list[int]]]:
    """The model in transformers, and the tokens of the texts."""
    lm: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(model)
    return lm.to(device).eval(), [tokenizer(text)["input_ids"] for text in texts]


class _Sums:
    def __init__(self, layers: int) -> None:
        self.largest_KL = torch.zeros(2, layers)
        self._difference_KL = torch.zeros(2, layers, dtype=torch.float64)
        self._norm_KL = torch.zeros(2, layers, dtype=torch.float64)

    def add(self, served_KLHTD: Tensor, reference_KLHTD: Tensor) -> None:
        difference_KLN = (served_KLHTD.double() - reference_KLHTD.double()).flatten(2).cpu()
        self.largest_KL = self.largest_KL.maximum(difference_KLN.abs().amax(dim=2).float())
        self._difference_KL += difference_KLN.square().sum(dim=2)
        self._norm_KL += reference_KLHTD.double().flatten(2).square().sum(dim=2).cpu()

    def relative(self) -> list[list[float]]:
        return (self._difference_KL / self._norm_KL).sqrt().tolist()


@torch.no_grad()
def _cache(lm: Any, ids: Sequence[int]) -> Tensor:
    """[K,L,H,T,D]: the keys and values in transformers' cache after one text."""
    layers = lm.model(torch.tensor([ids], device=lm.device), use_cache=True).past_key_values.layers
    return torch.stack([torch.cat([layer.keys for layer in layers]), torch.cat([layer.values for layer in layers])])


@torch.no_grad()
def _rotated(lm: Any, k_LHTD: Tensor) -> Tensor:
    positions_1T = torch.arange(k_LHTD.shape[2], device=k_LHTD.device)[None]
    cos_1TD, sin_1TD = lm.model.rotary_emb(k_LHTD, positions_1T)
    return apply_rotary_pos_emb(k_LHTD, k_LHTD, cos_1TD, sin_1TD)[1]
