"""Token selectors by name, one file each."""

from __future__ import annotations

from kvcore.plan import Selector
from kvcore.selectors.base import TokenSelector
from kvcore.selectors.full import FULL
from kvcore.selectors.keydiff import KEYDIFF
from kvcore.selectors.r_kv import R_KV
from kvcore.selectors.random import RANDOM
from kvcore.selectors.right import RIGHT
from kvcore.selectors.uniform import UNIFORM

REGISTRY: dict[Selector, TokenSelector] = {
    "full": FULL,
    "right": RIGHT,
    "r_kv": R_KV,
    "uniform": UNIFORM,
    "random": RANDOM,
    "keydiff": KEYDIFF,
}
