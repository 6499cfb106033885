"""Tests of the router: equal initial weights, learning from prompts, independence of samples, layers and teachers."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch.nn import functional

from fuse.fuse_kv import fuse
from fuse.router import Router, RouterKind
from fuse.routing import Choose, entropy, to_weights
from kvcore.errors import FieldError

N, B, L, E, F, WIDTH = 3, 64, 2, 6, 5, 16
KINDS: tuple[RouterKind, ...] = get_args(RouterKind)
every_kind = pytest.mark.parametrize("kind", KINDS)


def router(kind: RouterKind, teachers: int = N) -> Router:
    torch.manual_seed(0)
    return Router(kind, teachers, E, WIDTH, F)


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    summary = torch.randn(1, N, F, generator=generator) + 0.1 * torch.randn(B, N, F, generator=generator)
    return torch.randn(B, E, generator=generator), summary


def trained(kind: RouterKind, wanted: torch.Tensor, steps: int = 60) -> tuple[Router, float]:
    """A router fitted to `wanted` teachers [B], and its accuracy on the same prompts."""
    module, (prompt, summary) = router(kind), inputs()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(module(prompt, summary), wanted).backward()
        optimizer.step()
    return module, float((module(prompt, summary).argmax(dim=-1) == wanted).float().mean())


def randomised(module: Router) -> Router:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(7))
    return module


@every_kind
@pytest.mark.parametrize("teachers", [1, N])
def test_initial_weights_are_exactly_equal(kind: RouterKind, teachers: int) -> None:
    prompt, summary = inputs()
    logits = router(kind, teachers)(prompt, summary[:, :teachers])
    assert logits.shape == (B, teachers)
    assert logits.dtype == torch.float32
    weights = to_weights(logits, torch.ones(B, teachers, dtype=torch.bool), 0.5)
    assert (weights == weights.flatten()[0]).all()


@every_kind
def test_router_learns_the_best_teacher_for_a_prompt(kind: RouterKind) -> None:
    prompt, _ = inputs()
    _, accuracy = trained(kind, prompt[:, :N].argmax(dim=-1))
    assert accuracy > 0.9


def test_only_the_mlp_learns_a_nonlinear_boundary() -> None:
    prompt, _ = inputs()
    wanted = (prompt[:, 0] * prompt[:, 1] > 0).long()
    assert trained("mlp", wanted, steps=100)[1] > 0.95
    assert trained("gate", wanted, steps=100)[1] < 0.85


@every_kind
def test_every_parameter_is_trained(kind: RouterKind) -> None:
    prompt, _ = inputs()
    module, _ = trained(kind, prompt[:, : N - 1].argmax(dim=-1), steps=3)
    start = dict(router(kind).named_parameters())
    untrained = [name for name, parameter in module.named_parameters() if torch.equal(parameter, start[name])]
    assert not untrained


@every_kind
def test_samples_are_routed_independently(kind: RouterKind) -> None:
    module, (prompt, summary) = randomised(router(kind)), inputs()
    together = module(prompt, summary)
    alone = torch.cat([module(prompt[b : b + 1], summary[b : b + 1]) for b in range(B)])
    torch.testing.assert_close(together, alone)


def test_attention_scores_each_teacher_independently() -> None:
    module, (prompt, summary) = randomised(router("attention")), inputs()
    logits, order = module(prompt, summary), [2, 0, 1]
    torch.testing.assert_close(module(prompt, summary[:, order]), logits[..., order])
    torch.testing.assert_close(module(prompt, summary[:, :2]), logits[..., :2])


def test_attention_is_a_scaled_dot_product() -> None:
    module, (prompt, summary) = randomised(router("attention")).double(), inputs()
    weight = {name: parameter.detach().tolist() for name, parameter in module.named_parameters()}
    b, prompt_E = 3, prompt[3].tolist()
    expected = torch.zeros(N, dtype=torch.float64)
    for n in range(N):
        for w in range(WIDTH):
            query = weight["from_prompt.bias"][w]
            query += sum(weight["from_prompt.weight"][w][e] * prompt_E[e] for e in range(E))
            key = weight["key.bias"][w]
            key += sum(weight["key.weight"][w][f] * float(summary[b, n, f]) for f in range(F))
            expected[n] += query * key / math.sqrt(WIDTH)
    torch.testing.assert_close(module(prompt, summary)[b].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mlp", "gate"])
def test_routers_without_attention_read_only_the_prompt(kind: RouterKind) -> None:
    module, (prompt, summary) = randomised(router(kind)), inputs()
    logits = module(prompt, torch.full_like(summary, math.nan))
    assert torch.equal(logits, module(prompt, summary))
    assert not torch.equal(logits, module(prompt + 1, summary))


@every_kind
@pytest.mark.parametrize("choose", get_args(Choose))
def test_fused_target_trains_the_router_without_nan_from_empty_slots(kind: RouterKind, choose: Choose) -> None:
    module, (prompt, summary) = randomised(router(kind)), inputs()
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(N, B, 4, generator=generator) < 0.5
    mask[:, 0], mask[1, 1:9] = False, False  # a sample that no teacher has, and samples that one teacher lacks
    x = torch.randn(N, B, L, 1, 4, 2, generator=generator).masked_fill(~mask[:, :, None, None, :, None], math.nan)
    present = mask.any(dim=2).T
    logits = module(prompt, summary.masked_fill(~present[..., None], 0.0))
    fused, slots = fuse(x, mask, to_weights(logits, present, 0.5, choose))
    spread = entropy(to_weights(logits, present, 0.5), present)
    (fused[slots[:, None, None].expand(fused.shape[:-1])].square().mean() - 0.01 * spread).backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.any()


@every_kind
def test_bf16_router_returns_fp32_logits(kind: RouterKind) -> None:
    prompt, summary = inputs()
    assert randomised(router(kind)).bfloat16()(prompt, summary).dtype == torch.float32


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(FieldError, match=r"fuse\.router: .*'oracle'"):
        router("oracle")  # pyright: ignore[reportArgumentType]
