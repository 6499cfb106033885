"""Checks that the keys and values of a text do not depend on the texts beside it in a batch."""

from __future__ import annotations

from collections.abc import Mapping

from kvcore.errors import KVDistillError
from kvcore.tensors.projections import unsupported
from kvcore.types import TENSORS, Sample, TeacherInfo, Tensor
from teacher_server.engines.base import TeacherEngine, TokenizedSample

SHORT, LONG = "1 + 2 =", "1 + 2 = 3, 4 + 5 = 9. "
# Relative error of a token's keys or values, by data type; the coarse one for bf16 and quantised weights. Rounding
# depends on the shape of a batch; attention to padding or to later tokens gives an error near 1.
TOLERANCES = {"fp32": 1e-3, "fp16": 0.03}
COARSE, TINY = 0.1, 1e-30

# By layer: keys and values of one text, each [H,T,D].
LayersKV = Mapping[int, tuple[Tensor, Tensor]]


def short_and_long(engine: TeacherEngine) -> list[TokenizedSample]:
    """Two texts, the first one shorter."""
    return [engine.tokenize(Sample("self-test", text=text)) for text in (SHORT, LONG)]


class NonFiniteLayerError(KVDistillError):
    """A model computes keys or values that are NaN or infinite."""

    next_step = "check the model's files, or serve it with --dtype fp32 or bf16, which have a larger range than fp16"


def check_finite(name: str, layer: int, *tensors: Tensor) -> None:
    """Refuse a model whose keys and values in a layer are not finite; layers must be checked in ascending order.

    Raises:
        NonFiniteLayerError: names the layer.
    """
    if not all(tensor.isfinite().all() for tensor in tensors):
        before = f", or of the end of layer {layer - 1}" if layer else ""
        raise NonFiniteLayerError(
            f"{name}: keys or values of layer {layer} are NaN or infinite; a weight of it{before} may be damaged"
        )


def check_same(info: TeacherInfo, alone: LayersKV, beside: LayersKV, padding: str) -> None:
    """Compare the short text's keys and values alone with those beside the long text.

    The median over tokens is compared, because rounding may route a single token to another expert.

    Args:
        info: of the teacher.
        alone, beside: of the short text, without padding.
        padding: the side on which the batch was padded.

    Raises:
        NonFiniteLayerError: they are not finite.
        UnsupportedModelError: they differ.
    """
    tolerance = TOLERANCES.get(info.dtype, COARSE)
    for layer, pair in sorted(alone.items()):
        check_finite(f"'{info.model}'", layer, *pair)
        for kind, want, have in zip(TENSORS, pair, beside[layer], strict=True):
            want_HTD, have_HTD = want.double(), have.double()
            error_T = (have_HTD - want_HTD).norm(dim=(0, 2)) / want_HTD.norm(dim=(0, 2)).clamp(min=TINY)
            error = float(error_T.median())
            if not error <= tolerance:
                changed = (
                    f"the {'keys' if kind == 'k' else 'values'} of a short text in layer {layer} change by {error:.3g}"
                )
                raise unsupported(
                    f"'{info.model}'",
                    f"{changed} (relative; the limit is {tolerance:g}) beside a longer text, with padding on the "
                    f"{padding}: its tokens see padding or the text after them",
                )
