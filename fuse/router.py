"""The router: weights of the teachers, computed from the prompt."""

from __future__ import annotations

import math
from typing import Literal, get_args

from torch import nn

from kvcore.errors import FieldError
from kvcore.types import Tensor

RouterKind = Literal["mlp", "gate", "attention"]


class Router(nn.Module):
    """Computes logits over teachers. The last layer starts at zero, so all teachers start with equal weights.

    `mlp`: Linear, GELU, Linear on the prompt. `gate`: one Linear on the prompt. `attention`: a query from the prompt
    and a key from each teacher's K/V summary, as a scaled dot product (arXiv 1706.03762); its parameters do not depend
    on the number or the order of teachers.

    Args:
        kind: `mlp`, `gate` or `attention`.
        teachers: N.
        prompt_width: E, of the prompt's representation.
        width: of the hidden layer (`mlp`) or of query and key (`attention`).
        summary_width: F, of a teacher's summary (`attention`).

    Raises:
        FieldError: an unknown kind.
    """

    def __init__(self, kind: RouterKind, teachers: int, prompt_width: int, width: int, summary_width: int) -> None:
        super().__init__()
        if kind not in get_args(RouterKind):
            raise FieldError("fuse.router", f"must be one of {', '.join(get_args(RouterKind))}; got '{kind}'")
        self.key: nn.Linear | None = None
        if kind == "mlp":
            last = nn.Linear(width, teachers)
            self.from_prompt: nn.Module = nn.Sequential(nn.Linear(prompt_width, width), nn.GELU(), last)
        elif kind == "gate":
            self.from_prompt = last = nn.Linear(prompt_width, teachers)
        else:
            self.from_prompt = last = nn.Linear(prompt_width, width)
            self.key = nn.Linear(summary_width, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, prompt_BE: Tensor, summary_BNF: Tensor) -> Tensor:
        """Logits [B,N], fp32.

        Args:
            prompt_BE: the student's representation of the prompt.
            summary_BNF: a summary of each teacher's K/V; only `attention` reads it. That of an absent teacher must be
                finite, such as zeros: its logit is masked later, but NaN would reach the key's gradient.
        """
        dtype = next(self.parameters()).dtype
        out_BX = self.from_prompt(prompt_BE.to(dtype)).float()
        if self.key is None:
            return out_BX
        key_BNW = self.key(summary_BNF.to(dtype)).float()
        return (key_BNW @ out_BX[:, :, None])[:, :, 0] / math.sqrt(key_BNW.shape[-1])
