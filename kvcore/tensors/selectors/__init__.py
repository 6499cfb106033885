"""Token selectors by name, one file each."""

from __future__ import annotations

from kvcore.plan import Selector
from kvcore.tensors.selectors.base import TokenSelector
from kvcore.tensors.selectors.full import FULL
from kvcore.tensors.selectors.keydiff import KEYDIFF
from kvcore.tensors.selectors.r_kv import R_KV
from kvcore.tensors.selectors.random import RANDOM
from kvcore.tensors.selectors.right import RIGHT
from kvcore.tensors.selectors.uniform import UNIFORM

REGISTRY: dict[Selector, TokenSelector] = {
    "full": FULL,
    "right": RIGHT,
    "r_kv": R_KV,
    "uniform": UNIFORM,
    "random": RANDOM,
    "keydiff": KEYDIFF,
}
