"""Runs plans at the source: select, gather and encode each layer where it was computed, then copy it to the host."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kvcore.errors import FieldError, NonFiniteError
from kvcore.plan import CodecSpec, KVPlan
from kvcore.tensors.codec import Kind, encode, part_layout
from kvcore.tensors.select import needs_importance, needs_keys, needs_seeds, select, select_sample
from kvcore.tensors.selectors.random import sample_seed
from kvcore.types import TeacherInfo, Tensor
from teacher_server.engines.base import (
    SPAN_KINDS,
    Emit,
    ExecutionTimings,
    Fail,
    LayerOutput,
    LayerResult,
    LayerwiseModel,
    PlannedSample,
    SampleFailure,
    TokenizedSample,
    Wanted,
)

_POSITION_BYTES = 4


@dataclass(frozen=True, slots=True)
class PlanRow:
    """What of a sample its plan is executed on: the tokens it may choose from, ascending, and what draws start from."""

    plan: KVPlan
    candidates_N: NDArray[np.int64]
    seed: int


def check_plan(plan: KVPlan, info: TeacherInfo) -> None:
    """Refuses a plan that this teacher cannot execute.

    Raises:
        FieldError: naming the field of the plan, its value and the limit.
    """
    if plan.layers[-1] >= info.layers:
        raise FieldError("plan.layers", f"got {plan.layers[-1]}; this teacher's layers are 0 to {info.layers - 1}")
    if plan.selection.selector not in info.selectors:
        selector = plan.selection.selector
        raise FieldError("plan.selection.selector", f"got '{selector}'; known: {', '.join(info.selectors)}")
    if plan.codec.name not in info.codecs:
        raise FieldError("plan.codec.name", f"got '{plan.codec.name}'; known: {', '.join(info.codecs)}")


def check_sample(tokens: TokenizedSample, plan: KVPlan, field: str) -> None:
    """Refuses a sample that the plan cannot be executed on: no token to choose from, no answer to rank by.

    Args:
        tokens: the sample as the teacher reads it.
        plan: what is asked of it.
        field: how the caller names the sample, for example `samples[q17]`.

    Raises:
        FieldError: naming what the sample lacks.
    """
    selection = plan.selection
    if candidate_tokens(tokens, plan).size == 0:
        raise FieldError(f"{field}.spans", f"no token lies in the span '{selection.span}' (plan.selection.span)")
    if needs_importance(selection) and SPAN_KINDS.index("answer") not in tokens.span_ids:
        raise FieldError(
            f"{field}.spans",
            f"the selector '{selection.selector}' ranks tokens by the attention of the answer's tokens, and no token "
            "lies in the span 'answer'; mark the answer, or set plan.selection.importance_weight to 0",
        )


def candidate_tokens(tokens: TokenizedSample, plan: KVPlan) -> NDArray[np.int64]:
    """The token indices [N], ascending, that the plan may choose from.

    The span `all` holds every token that stands for text: not those that the tokenizer adds, such as a BOS. Where it is
    known of no token what text it stands for, as can be with token ids, `all` holds every token.
    """
    if plan.selection.span == "all":
        chosen = np.asarray(tokens.byte_ends) >= 0
        if not chosen.any():
            chosen[:] = True
    else:
        chosen = np.asarray(tokens.span_ids) == SPAN_KINDS.index(plan.selection.span)
    return np.flatnonzero(chosen)


def encoded_bytes(plan: KVPlan, tokens: TokenizedSample, info: TeacherInfo) -> int:
    """The exact size in bytes of a sample's encoded K/V, positions included, headers not."""
    candidates = candidate_tokens(tokens, plan).size
    slots = candidates if plan.selection.selector == "full" else min(plan.selection.budget, candidates)
    choosers = info.kv_heads if plan.selection.scope == "head" else 1
    per_layer = choosers * slots * _POSITION_BYTES
    for kind in _kinds(plan):
        for _, dtype, shape in part_layout(plan.codec, kind, info.kv_heads, slots, info.head_dim):
            per_layer += int(np.prod(shape)) * dtype.itemsize
    return per_layer * len(plan.layers)


def execute(
    model: LayerwiseModel, batch: Sequence[PlannedSample], emit: Emit, fail: Fail, wanted: Wanted = lambda _row: True
) -> ExecutionTimings:
    """Runs one batch, whose plans may differ, through the model and emits each layer as it finishes.

    Every sample must have passed `check_plan` and `check_sample`. A sample's layers come in ascending order, at once,
    but for selectors that read keys in scope `sample`: they choose when the plan's last layer is known, and all layers
    leave then. `fail` is called at most once for a sample, as soon as its K/V turn out to be unusable: not finite, or
    past the plan's `max_relative_error`; the others go on. What is not `wanted` any more is not encoded.
    """
    run = PlanRun([plan_row(sample) for sample in batch], fail)
    in_sink_s = encode_s = 0.0

    def sink(output: LayerOutput) -> None:
        nonlocal in_sink_s, encode_s
        _await_device(output.k_BHTD)
        entered = time.perf_counter()
        run.keep(wanted)
        results = run.receive(output)
        encode_s += time.perf_counter() - entered
        for result in results:
            emit(result)
        in_sink_s += time.perf_counter() - entered

    started = time.perf_counter()
    model.prefill([sample.tokens for sample in batch], run.layers, run.with_importance, sink)
    return ExecutionTimings(prefill_s=time.perf_counter() - started - in_sink_s, encode_s=encode_s)


def plan_row(sample: PlannedSample) -> PlanRow:
    """What a sample's plan needs to know of it."""
    selection = sample.plan.selection
    seed = sample_seed(selection.seed, sample.tokens.token_ids) if needs_seeds(selection) else 0
    return PlanRow(sample.plan, candidate_tokens(sample.tokens, sample.plan), seed)


class PlanRun:
    """The plans of one batch at work on its layers.

    Args:
        rows: the batch; `LayerOutput`s have its order.
        fail: called for a row whose K/V turn out to be unusable.
        own_heads: of the heads that layers come with, those that leave; all of them choose.
        with_norms: whether results say what their errors are relative to.
    """

    def __init__(
        self, rows: Sequence[PlanRow], fail: Fail, own_heads: slice = slice(None), *, with_norms: bool = False
    ) -> None:
        self._groups = _group(rows, own_heads, with_norms)
        self._batch_size = len(rows)
        self._fail = fail
        self.layers = sorted({layer for row in rows for layer in row.plan.layers})
        self.with_importance = any(needs_importance(row.plan.selection) for row in rows)

    def keep(self, wanted: Wanted) -> None:
        """Leaves out of what follows the rows that are not wanted."""
        for group in self._groups:
            group.keep(wanted)

    def receive(self, output: LayerOutput) -> list[LayerResult]:
        """Takes the batch's next layer and returns what is ready to leave."""
        results: list[LayerResult] = []
        for group in self._groups:
            if output.layer in group.plan.layers:
                results += group.receive(output, self._batch_size, self._fail)
        return results


def _await_device(tensor: Tensor) -> None:
    """Encoding needs the layer anyway; waiting for it here keeps the model's time out of the encoder's."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()


def _kinds(plan: KVPlan) -> list[Kind]:
    kinds: list[Kind] = []
    if plan.keys:
        kinds.append("k")
    if plan.values:
        kinds.append("v")
    return kinds


def _group(batch: Sequence[PlanRow], own_heads: slice, with_norms: bool) -> list[_Group]:
    rows: dict[tuple[KVPlan, int], list[int]] = {}
    for place, row in enumerate(batch):
        rows.setdefault((row.plan, row.candidates_N.size), []).append(place)
    groups: list[_Group] = []
    for (plan, _), members in rows.items():
        candidates_BN = torch.from_numpy(np.stack([batch[place].candidates_N for place in members]))
        seeds_B = torch.tensor([batch[place].seed for place in members], dtype=torch.int64)
        groups.append(_Group(plan, members, candidates_BN, seeds_B, own_heads, with_norms))
    return groups


@dataclass(slots=True)
class _Layer:
    """One layer of a group. T is all tokens, or N where only the candidates were kept."""

    layer: int
    k_BHTD: Tensor
    v_BHTD: Tensor
    importance_BHT: Tensor | None

    def rows(self, index_B: Tensor) -> _Layer:
        importance_BHT = None if self.importance_BHT is None else self.importance_BHT[index_B]
        return _Layer(self.layer, self.k_BHTD[index_B], self.v_BHTD[index_B], importance_BHT)

    def tokens(self, positions_BN: Tensor) -> _Layer:
        positions_B1N = positions_BN[:, None]
        importance_BHT = None
        if self.importance_BHT is not None:
            importance_BHT = self.importance_BHT.gather(2, positions_B1N.expand(-1, self.importance_BHT.shape[1], -1))
        k_BHND, v_BHND = _gather_tokens(self.k_BHTD, positions_B1N), _gather_tokens(self.v_BHTD, positions_B1N)
        return _Layer(self.layer, k_BHND, v_BHND, importance_BHT)


def _gather_tokens(x_BHTD: Tensor, positions_BGM: Tensor) -> Tensor:
    """[B,H,T,D] at positions [B,H|1,M] to [B,H,M,D]."""
    heads, head_dim = x_BHTD.shape[1], x_BHTD.shape[3]
    return x_BHTD.gather(2, positions_BGM.long().unsqueeze(-1).expand(-1, heads, -1, head_dim))


class _Group:
    """Samples of one batch with the same plan and as many candidates, so that each layer is one stack of tensors."""

    def __init__(
        self,
        plan: KVPlan,
        rows: list[int],
        candidates_BN: Tensor,
        seeds_B: Tensor,
        own_heads: slice,
        with_norms: bool,
    ) -> None:
        self.plan = plan
        self._rows = rows
        self._own_heads, self._with_norms = own_heads, with_norms
        self._candidates_BN, self._seeds_B = candidates_BN, seeds_B
        self._waits = plan.selection.scope == "sample" and needs_keys(plan.selection)
        self._held: list[_Layer] = []

    def keep(self, wanted: Wanted) -> None:
        """Leaves out the rows that are not wanted."""
        self._keep_places([place for place, row in enumerate(self._rows) if wanted(row)])

    def receive(self, output: LayerOutput, batch_size: int, fail: Fail) -> list[LayerResult]:
        """Takes the batch's next layer and returns what is ready to leave."""
        if not self._rows:
            return []
        device = output.k_BHTD.device
        self._candidates_BN, self._seeds_B = self._candidates_BN.to(device), self._seeds_B.to(device)
        importance_BHT = output.importance(self.plan.selection.importance_pool)
        layer = _Layer(output.layer, output.k_BHTD, output.v_BHTD, importance_BHT)
        if self._rows != list(range(batch_size)):
            layer = layer.rows(torch.tensor(self._rows, device=device))
        self._held.append(layer.tokens(self._candidates_BN) if self._waits else layer)
        if self._waits and output.layer != self.plan.layers[-1]:
            return []
        results = self._encode_held(fail)
        self._held.clear()
        self._enforce_error_budget(results, fail)
        return [_only(result, self._rows) for result in results] if self._rows else []

    def _encode_held(self, fail: Fail) -> list[LayerResult]:
        while self._rows:
            try:
                positions_BGM = self._choose()
                return [self._encode(layer, positions_BGM) for layer in self._held]
            except NonFiniteError as error:
                # What was encoded so far holds the bad rows too, so the others start over without them.
                layers = "layer " + " to ".join(str(n) for n in sorted({self._held[0].layer, self._held[-1].layer}))
                problem = f"keys, values or attention in {layers} are not finite, or too large for the codec"
                self._drop(dict.fromkeys(error.rows, problem), fail)
        return []

    def _choose(self) -> Tensor:
        """Which tokens stay, [B,H|1,M], as indices into the tokens that the held layers have."""
        if not self._waits:
            layer = self._held[0]
            return select(
                self.plan.selection,
                self._candidates_BN,
                layer.k_BHTD,
                layer.importance_BHT,
                layer=layer.layer,
                seeds_B=self._seeds_B,
            )
        k_BLHND = torch.stack([layer.k_BHTD for layer in self._held], dim=1)
        importances = [layer.importance_BHT for layer in self._held if layer.importance_BHT is not None]
        importance_BLHN = torch.stack(importances, dim=1) if importances else None
        places_N = torch.arange(self._candidates_BN.shape[1], device=k_BLHND.device)
        places_BN = places_N.expand(len(self._rows), -1)
        return select_sample(self.plan.selection, places_BN, k_BLHND, importance_BLHN)

    def _encode(self, layer: _Layer, positions_BGM: Tensor) -> LayerResult:
        tensors: dict[str, Tensor] = {}
        if positions_BGM.shape[1] > 1:
            positions_BGM = positions_BGM[:, self._own_heads]
        for kind in _kinds(self.plan):
            source_BHTD = (layer.k_BHTD if kind == "k" else layer.v_BHTD)[:, self._own_heads]
            chosen_BHMD = _gather_tokens(source_BHTD, positions_BGM)
            encoded = encode(chosen_BHMD, kind, self.plan.codec)
            tensors |= {f"{kind}.{name}": part for name, part in encoded.parts.items()}
            tensors[f"{kind} error"] = encoded.relative_error_B
            if self._with_norms:
                tensors[f"{kind} norm"] = chosen_BHMD.flatten(1).double().norm(dim=1)
        tensors["positions"] = self._token_indices(positions_BGM)
        tensors = to_host(tensors)
        errors = {kind: tensors.pop(f"{kind} error").tolist() for kind in _kinds(self.plan)}
        norms = {kind: tensors.pop(f"{kind} norm").tolist() for kind in _kinds(self.plan) if f"{kind} norm" in tensors}
        positions = tensors.pop("positions")
        return LayerResult(list(self._rows), layer.layer, tensors, positions, errors, norms)

    def _token_indices(self, positions_BGM: Tensor) -> Tensor:
        if not self._waits:
            return positions_BGM
        candidates_BGN = self._candidates_BN[:, None].expand(-1, positions_BGM.shape[1], -1)
        return candidates_BGN.gather(2, positions_BGM.long()).to(torch.int32)

    def _enforce_error_budget(self, results: Sequence[LayerResult], fail: Fail) -> None:
        problems: dict[int, str] = {}
        for result in results:
            for place in range(len(result.indices)):
                errors = {kind: values[place] for kind, values in result.relative_error.items()}
                problem = error_budget_problem(errors, result.layer, self.plan.codec)
                if problem is not None:
                    problems.setdefault(place, problem)
        self._drop(problems, fail)

    def _drop(self, problems: Mapping[int, str], fail: Fail) -> None:
        """Fails rows of the group, by their place in it, and goes on with the others."""
        for place, problem in problems.items():
            fail(SampleFailure(self._rows[place], problem))
        self._keep_places([place for place in range(len(self._rows)) if place not in problems])

    def _keep_places(self, places: Sequence[int]) -> None:
        if len(places) == len(self._rows):
            return
        index_B = torch.tensor(places, dtype=torch.long, device=self._candidates_BN.device)
        self._rows = [self._rows[place] for place in places]
        self._candidates_BN, self._seeds_B = self._candidates_BN[index_B], self._seeds_B[index_B]
        self._held = [layer.rows(index_B) for layer in self._held]


def _only(result: LayerResult, rows: Sequence[int]) -> LayerResult:
    """The result without the samples that have failed."""
    return result.subset([place for place, row in enumerate(result.indices) if row in rows])


def error_budget_problem(errors: Mapping[str, float], layer: int, codec: CodecSpec) -> str | None:
    """What is wrong with a sample's measured errors of one layer, by kind, if anything."""
    limit = codec.max_relative_error
    for kind, error in errors.items():
        if limit is not None and error > limit:
            where = f"'{kind}' of layer {layer} in codec '{codec.name}'"
            return f"{where} has a relative error of {error:.3g}; plan.codec.max_relative_error is {limit:.3g}"
    return None


def to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies tensors of one device to the host in one transfer."""
    if all(tensor.device.type == "cpu" for tensor in tensors.values()):
        return tensors
    packed, order = pack_bytes(tensors)
    return unpack_bytes(_pinned_copy(packed) if packed.is_cuda else packed.cpu(), order, tensors)


def _pinned_copy(packed: Tensor) -> Tensor:
    """A copy in page-locked memory, complete; made on the stream that is current."""
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    torch.cuda.current_stream(packed.device).synchronize()
    return host


def pack_bytes(tensors: Mapping[str, Tensor]) -> tuple[Tensor, list[str]]:
    """All tensors' bytes end to end, wide dtypes first so that every tensor is aligned, and their order."""
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    return torch.cat([tensors[name].contiguous().flatten().view(torch.uint8) for name in order]), order


def unpack_bytes(packed: Tensor, order: Sequence[str], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undoes `pack_bytes`, on the device of `packed`; `like` has the shapes and dtypes."""
    pieces = packed.split([like[name].nbytes for name in order])
    by_name = dict(zip(order, pieces, strict=True))
    return {name: by_name[name].view(tensor.dtype).view(tensor.shape) for name, tensor in like.items()}
