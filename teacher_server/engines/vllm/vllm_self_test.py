"""Compares keys and values from vLLM's cache with those of the model's first layers on transformers."""

from __future__ import annotations

import torch

from kvcore.errors import UnsupportedModelError
from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.types import Sample, Tensor
from teacher_server.engines.base import LayerResult, PlannedSample, SampleFailure, TeacherEngine, TokenizedSample

REFERENCE_LAYERS = 2
# Relative error of keys and values. A scrambled cache or a wrong rotation gives an error near 1.
TOLERANCES = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.03}
# More than one block at all block sizes that vLLM uses by default.
TOKENS = 150


def check_against(reference: TeacherEngine, engine: TeacherEngine) -> None:
    """Compare some tokens' keys and values.

    Raises:
        UnsupportedModelError: keys or values differ.
    """
    layers = tuple(range(min(REFERENCE_LAYERS, reference.info.layers)))
    count = min(TOKENS, engine.info.max_sample_tokens)
    # Varied ids, without the first of the vocabulary, which are often special.
    token_ids = tuple(10 + (7 * place) % 200 for place in range(count))
    sample = reference.tokenize(Sample("cache test", token_ids=token_ids))
    expected, found = (_read(which, sample, layers) for which in (reference, engine))
    tolerance = TOLERANCES[engine.info.dtype]
    for layer in layers:
        for kind in ("k", "v"):
            want, have = expected[layer][kind], found[layer][kind]
            error = float((have - want).norm() / want.norm())
            if not error <= tolerance:
                name = "keys" if kind == "k" else "values"
                raise UnsupportedModelError(
                    f"the {name} of layer {layer} in vLLM's cache differ from those of transformers by {error:.3g} "
                    f"(relative; the limit is {tolerance:g}): this vLLM has another cache layout or rotates differently"
                )


def _read(engine: TeacherEngine, tokens: TokenizedSample, layers: tuple[int, ...]) -> dict[int, dict[str, Tensor]]:
    plan = KVPlan(layers=layers, selection=Selection(selector="full", span="all"), codec=CodecSpec(name="raw"))
    results: list[LayerResult] = []
    failures: list[SampleFailure] = []
    engine.run([PlannedSample(tokens, plan)], results.append, failures.append, lambda _row: True)
    if failures:
        raise UnsupportedModelError(f"the cache test failed: {failures[0].problem}")
    return {r.layer: {kind: r.parts[f"{kind}.data"].to(torch.float64) for kind in ("k", "v")} for r in results}
