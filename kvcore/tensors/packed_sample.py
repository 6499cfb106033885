"""The packed form in which clients and stores keep a sample of the codec `pca`: entropy-coded."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
import xxhash

from kvcore.errors import ProtocolError
from kvcore.tensors.entropy_coding import decode_codes
from kvcore.types import TENSORS, EncodedSampleKV, Tensor

# The parts of a packed sample: all coded bytes, their sizes [L,2] by layer and tensor, and the hash of all codes.
PACKED, SIZES, CODES_XXH3 = "packed", "sizes", "codes_xxh3"


@dataclass(slots=True)
class PackedSample:
    """The coded layers that have arrived of one sample."""

    coded: list[bytes] = field(default_factory=list[bytes])
    sizes: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])

    def add(self, coded: bytes, sizes: tuple[int, int]) -> None:
        """Adds the next layer's coded keys and values."""
        self.coded.append(coded)
        self.sizes.append(sizes)

    def parts(self, codes_xxh3: int) -> dict[str, Tensor]:
        """The parts of the packed sample."""
        packed = bytearray().join(self.coded)
        return {
            PACKED: torch.frombuffer(packed, dtype=torch.uint8),
            SIZES: torch.tensor(self.sizes, dtype=torch.int32),
            CODES_XXH3: torch.frombuffer(bytearray(codes_xxh3.to_bytes(8, "little")), dtype=torch.uint8),
        }


def unpacked(sample: EncodedSampleKV) -> EncodedSampleKV:
    """The sample with the codes `k.codes` and `v.codes`, int16 [L,H,M,D], in place of the packed parts.

    Raises:
        ProtocolError: the bytes do not give the codes that the teacher computed.
    """
    kv_map = sample.kv_map
    assert kv_map is not None, "a packed sample comes with its map"
    heads, head_dim = kv_map.named.heads, kv_map.named.head_dim
    packed, sizes = bytes(sample.parts[PACKED].numpy().data), sample.parts[SIZES].numpy()
    if sizes.shape != (len(sample.layers), 2) or (sizes < 0).any() or int(sizes.sum(dtype=np.int64)) != len(packed):
        raise ProtocolError(f"sample '{sample.sample_id}': {len(packed)} packed bytes do not have the stated sizes")
    codes = {kind: np.empty((len(sample.layers), sample.slots, heads * head_dim), np.int16) for kind in TENSORS}
    digest, start = xxhash.xxh3_64(), 0
    for at in range(len(sample.layers)):
        for kind, size in zip(TENSORS, sizes[at].tolist(), strict=True):
            found_MR = decode_codes(packed[start : start + size], sample.slots, kv_map.classes(at, kind))
            codes[kind][at] = found_MR
            digest.update(found_MR.astype("<i2").tobytes())
            start += size
    if digest.intdigest().to_bytes(8, "little") != bytes(sample.parts[CODES_XXH3].numpy().data):
        raise ProtocolError(
            f"sample '{sample.sample_id}': the decoded codes are not those that the teacher encoded; compare the "
            "versions of constriction on both sides, or use another codec"
        )
    tensors: dict[str, Tensor] = {}
    for kind, codes_LMR in codes.items():
        codes_LMHD = torch.as_tensor(codes_LMR.reshape(*codes_LMR.shape[:2], heads, head_dim))
        tensors[f"{kind}.codes"] = codes_LMHD.transpose(1, 2)
    return replace(sample, parts=tensors)
