"""`kvdistill calibrate`: fits the codec `pca` to a teacher's K/V, and measures it on other records."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from align.teacher_basis import BasisStatistics
from kvcore.config import parse
from kvcore.errors import FieldError
from kvcore.files import replace_file
from kvcore.monitoring.progress import Meter
from kvcore.monitoring.units import in_bytes
from kvcore.plan import CODED, CodecConfig, CodecSpec
from kvcore.tensors.codec import encode
from kvcore.tensors.entropy_coding import encode_codes
from kvcore.tensors.kv_map import KVMap
from kvcore.types import TENSORS, BatchKV, Sample, TeacherInfo, Tensor, TensorKind
from kvdistill.client import TeacherClient, TeacherKV
from kvdistill.columns import in_columns
from kvdistill.describe import raw_token_bytes

# Qualities that are measured beside the one that is asked for.
QUALITIES = (0.02, 0.05, 0.1, 0.2, 0.4)
# One record of so many is measured, and the others are fitted to.
MEASURED_SHARE = 8
BATCH = 8
# The first token is an attention sink, whose K/V are unlike all others.
SINK_TOKENS = 1


@dataclass(frozen=True, slots=True)
class Figures:
    """What one quality costs: the bytes per token, and the errors of keys and values over what varies in them."""

    quality: float
    token_bytes: float
    errors: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Calibration:
    """The map of the quality that was asked for, and figures of several on records that it was not fitted to."""

    info: TeacherInfo
    kv_map: KVMap
    fitted_tokens: int
    measured_tokens: int
    figures: list[Figures]

    def write(self, path: str | Path) -> None:
        """Writes the map to a file, for `teachers[].kv_map` and `TeacherClient.fetch`.

        Raises:
            OSError: the file cannot be written.
        """
        replace_file(Path(path), self.kv_map.content())

    def text(self, path: Path) -> str:
        """A description for the terminal."""
        info, layers = self.info, len(self.kv_map.layers)
        raw = raw_token_bytes(layers, info.kv_heads, info.head_dim)
        counts = f"fitted to {self.fitted_tokens:,} tokens, measured on {self.measured_tokens:,} others"
        head = [
            ("teacher", f"{info.model}, {layers} of {info.layers} layers, {info.kv_heads} KV heads of {info.head_dim}"),
            ("calibration", counts),
            ("written", f"{path}, {in_bytes(self.kv_map.nbytes)}"),
        ]
        rows = [["quality", "bytes per token", "smaller than bf16", "error of keys", "of values"]]
        for each in self.figures:
            ratio = f"{raw / each.token_bytes:.2f}x"
            errors = [f"{error:.1%}" for error in each.errors]
            rows.append([f"{each.quality:.3g}", f"{each.token_bytes:,.0f}", ratio, *errors])
        next_step = f"Next: set kv.codec.name to '{CODED}', and the teacher's `kv_map` to {path}."
        return "\n\n".join([in_columns(head), in_columns(rows, right=True), next_step])


def calibrate(
    endpoints: str | Sequence[str],
    texts: Sequence[str | Sample],
    *,
    quality: float | None = None,
    bytes_per_token: float | None = None,
    layers: Sequence[int] | None = None,
) -> Calibration:
    """Fits the codec `pca` to a teacher's K/V of texts.

    Args:
        endpoints: host:port of the teacher's server, or of its replicas.
        texts: one of eight is measured, the others are fitted to.
        quality: the relative error that the codec aims at; 0.1 by default.
        bytes_per_token: of a token's keys and values in all these layers, instead of a quality.
        layers: of the teacher; all by default.

    Raises:
        FieldError: too few texts, or a quality that is not between 0 and 1.
        TeacherError: the teacher does not answer, or refuses a text.
    """
    codec = parse({"name": CODED, "quality": quality, "bytes_per_token": bytes_per_token}, CodecConfig)
    if len(texts) < MEASURED_SHARE:
        raise FieldError("texts", f"expected at least {MEASURED_SHARE} to fit and to measure; got {len(texts)}")
    with TeacherClient(endpoints) as client, Meter({"calibrating": len(texts)}, brief=True) as meter:
        info = client.info
        chosen = tuple(range(info.layers)) if layers is None else tuple(layers)
        whole = (info.kv_heads, info.head_dim)
        sums, tokens = BasisStatistics(chosen, math.prod(whole)), 0
        for kv in _read(client, [text for at, text in enumerate(texts) if at % MEASURED_SHARE], chosen, meter):
            mask_BM = _beyond_sinks(kv)
            sums.add(kv, mask_BM)
            tokens += int(mask_BM.sum())
        sums.check(1)
        basis, _ = sums.basis(math.prod(whole))
        wanted = codec.target_error
        if bytes_per_token is not None:
            wanted = sums.quality_for(basis, bytes_per_token)
        measured = [_Measured(each, sums.coded(basis, each, whole)) for each in sorted({*QUALITIES, wanted})]
        for kv in _read(client, texts[::MEASURED_SHARE], chosen, meter):
            for one in measured:
                one.add(kv)
    kv_map = next(one.kv_map for one in measured if one.quality == wanted)
    return Calibration(info, kv_map, tokens, measured[0].tokens, [one.figures() for one in measured])


class _Measured:
    """Sums of the bytes and errors of one quality."""

    def __init__(self, quality: float, kv_map: KVMap) -> None:
        self.quality, self.kv_map = quality, kv_map
        self.tokens = self._sent = 0
        self._square, self._norm = dict.fromkeys(TENSORS, 0.0), dict.fromkeys(TENSORS, 0.0)

    def add(self, kv: BatchKV) -> None:
        """Adds a batch. Bytes are those of all tokens; errors leave out the attention sinks."""
        for row, slots in enumerate(kv.mask_BM.sum(dim=1).tolist()):
            self.tokens += slots
            for kind in TENSORS:
                x_BLHMD = kv.k_BLHMD if kind == "k" else kv.v_BLHMD
                for at, layer in enumerate(self.kv_map.layers):
                    self._add(kind, at, self.kv_map.apply(x_BLHMD[row : row + 1, at, :, :slots], layer, kind))

    def _add(self, kind: TensorKind, at: int, y_BHMD: Tensor) -> None:
        codes_BHMD = encode(y_BHMD, kind, CodecSpec(name=CODED)).parts["codes"]
        codes_MR = codes_BHMD[0].transpose(0, 1).flatten(1).contiguous().numpy()
        self._sent += len(encode_codes(codes_MR, self.kv_map.classes(at, kind)))
        square_step = float(self.kv_map.tensors[f"{kind}.step"][at]) ** 2
        exact_BHMD = y_BHMD[:, :, SINK_TOKENS:].double()
        self._square[kind] += square_step * float((codes_BHMD[:, :, SINK_TOKENS:] - exact_BHMD).square().sum())
        self._norm[kind] += square_step * float(exact_BHMD.square().sum())

    def figures(self) -> Figures:
        """The figures of all batches."""
        k, v = (math.sqrt(self._square[kind] / self._norm[kind]) if self._norm[kind] else 0.0 for kind in TENSORS)
        return Figures(self.quality, self._sent / max(1, self.tokens), (k, v))


def _read(
    client: TeacherClient, texts: Sequence[str | Sample], layers: tuple[int, ...], meter: Meter
) -> Iterator[BatchKV]:
    """The K/V of all tokens, in batches."""
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        yield _batch(client.fetch(batch, layers=layers, codec="bf16"))
        meter.advance("calibrating", len(batch))


def _batch(kv: TeacherKV) -> BatchKV:
    return BatchKV(kv.k_BLHMD, kv.v_BLHMD, kv.mask_BM, kv.byte_ends_BLHM)


def _beyond_sinks(kv: BatchKV) -> Tensor:
    mask_BM = kv.mask_BM.clone()
    mask_BM[:, :SINK_TOKENS] = False
    return mask_BM
