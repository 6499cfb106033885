"""Executes plans where the K/V are computed: selects, maps and encodes each layer, then copies it to host memory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kvcore.errors import FieldError, NonFiniteError
from kvcore.plan import CodecSpec, KVPlan
from kvcore.tensors.codec import encode
from kvcore.tensors.kv_map import KVMap
from kvcore.tensors.plan_size import kept_slots, sample_bytes
from kvcore.tensors.select import needs_importance, needs_keys, needs_seeds, select, select_sample
from kvcore.tensors.selectors.random import sample_seed
from kvcore.types import TENSORS, TeacherInfo, Tensor
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


@dataclass(frozen=True, slots=True)
class PlanRow:
    """A sample's plan and its map, the token indices that it may select from, ascending, and the seed of `random`."""

    plan: KVPlan
    candidates_N: NDArray[np.int64]
    seed: int
    kv_map: KVMap | None = None


def check_plan(plan: KVPlan, info: TeacherInfo) -> None:
    """Refuse a plan that this teacher cannot execute.

    Raises:
        FieldError: names the field of the plan, its value and the limit.
    """
    if plan.layers[-1] >= info.layers:
        raise FieldError("plan.layers", f"got {plan.layers[-1]}; this teacher's layers are 0 to {info.layers - 1}")
    if plan.selection.selector not in info.selectors:
        selector = plan.selection.selector
        raise FieldError("plan.selection.selector", f"got '{selector}'; known: {', '.join(info.selectors)}")
    if plan.codec.name not in info.codecs:
        raise FieldError("plan.codec.name", f"got '{plan.codec.name}'; known: {', '.join(info.codecs)}")
    if plan.map is not None and info.max_map_bytes == 0:
        raise FieldError("plan.map", f"the engine '{info.engine}' of this teacher does not support maps; leave it out")


def check_sample(tokens: TokenizedSample, plan: KVPlan) -> None:
    """Refuse a sample that the plan cannot be executed on: no token to select from, or no answer to rank by.

    Raises:
        FieldError: names the sample and what it lacks.
    """
    selection, field = plan.selection, f"samples[{tokens.sample.id}].spans"
    if candidate_tokens(tokens, plan).size == 0:
        raise FieldError(field, f"no token lies in the span '{selection.span}' (plan.selection.span)")
    if needs_importance(selection) and SPAN_KINDS.index("answer") not in tokens.span_ids:
        raise FieldError(
            field,
            f"the selector '{selection.selector}' ranks tokens by the attention of the answer's tokens, and no token "
            "lies in the span 'answer'; mark the answer, or set plan.selection.importance_weight to 0",
        )


def candidate_tokens(tokens: TokenizedSample, plan: KVPlan) -> NDArray[np.int64]:
    """The token indices [N], ascending, that the plan may select from.

    The span `all` holds every token that stands for text, so not those that the tokenizer adds, such as a BOS. If no
    token's text is known, as can be with token ids, `all` holds every token.
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
    slots = kept_slots(plan, candidate_tokens(tokens, plan).size)
    return sample_bytes(plan, info.kv_heads, info.head_dim, slots, streamed=True)


def execute(
    model: LayerwiseModel, batch: Sequence[PlannedSample], emit: Emit, fail: Fail, wanted: Wanted = lambda _row: True
) -> ExecutionTimings:
    """Run one batch, whose plans may differ, through the model, and emit each layer as it is computed.

    Every sample must have passed `check_plan` and `check_sample`. Its layers are emitted in ascending order, each as
    soon as it is computed, except for selectors that read keys in scope `sample`: they select when the plan's last
    layer is computed, and all layers are emitted then. `fail` is called at most once per sample, if its K/V are not
    finite or exceed the plan's `max_relative_error`; the other samples continue. Rows that are no longer `wanted` are
    not encoded.
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
    """The `PlanRow` of a sample."""
    selection = sample.plan.selection
    seed = sample_seed(selection.seed, sample.tokens.token_ids) if needs_seeds(selection) else 0
    return PlanRow(sample.plan, candidate_tokens(sample.tokens, sample.plan), seed, sample.kv_map)


class PlanRun:
    """Executes the plans of one batch, layer by layer.

    Args:
        rows: the batch, in the order of the rows of each `LayerOutput`.
        fail: called for a row whose K/V cannot be used.
        own_heads: the KV heads to encode; the selection is made with all heads of the `LayerOutput`. Maps need all.
        with_norms: whether results have `norms`.
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
        """Drop the rows that are not wanted."""
        for group in self._groups:
            group.keep(wanted)

    def receive(self, output: LayerOutput) -> list[LayerResult]:
        """Take the batch's next layer; returns the layers that are encoded."""
        results: list[LayerResult] = []
        for group in self._groups:
            if output.layer in group.plan.layers:
                results += group.receive(output, self._batch_size, self._fail)
        return results


def _await_device(tensor: Tensor) -> None:
    """Wait for the layer, which encoding needs anyway, so that the model's time does not count as encoding."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()


def _group(batch: Sequence[PlanRow], own_heads: slice, with_norms: bool) -> list[_Group]:
    rows: dict[tuple[KVPlan, int], list[int]] = {}
    for place, row in enumerate(batch):
        rows.setdefault((row.plan, row.candidates_N.size), []).append(place)
    groups: list[_Group] = []
    for (plan, _), members in rows.items():
        candidates_BN = torch.from_numpy(np.stack([batch[place].candidates_N for place in members]))
        seeds_B = torch.tensor([batch[place].seed for place in members], dtype=torch.int64)
        kv_map = batch[members[0]].kv_map
        assert (plan.map is None) == (kv_map is None), "a plan's map comes with the plan"
        assert kv_map is None or own_heads == slice(None), "a map needs all heads"
        groups.append(_Group(plan, kv_map, members, candidates_BN, seeds_B, own_heads, with_norms))
    return groups


@dataclass(slots=True)
class _Layer:
    """One layer of a group. T is all tokens, or N if only the candidates are kept."""

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
    """Samples of a batch with equal plans and numbers of candidates, so that each layer is one stack of tensors."""

    def __init__(
        self,
        plan: KVPlan,
        kv_map: KVMap | None,
        rows: list[int],
        candidates_BN: Tensor,
        seeds_B: Tensor,
        own_heads: slice,
        with_norms: bool,
    ) -> None:
        self.plan, self._map = plan, kv_map
        self._rows = rows
        self._own_heads, self._with_norms = own_heads, with_norms
        self._candidates_BN, self._seeds_B = candidates_BN, seeds_B
        self._waits = plan.selection.scope == "sample" and needs_keys(plan.selection)
        self._held: list[_Layer] = []

    def keep(self, wanted: Wanted) -> None:
        """Drop the rows that are not wanted."""
        self._keep_places([place for place, row in enumerate(self._rows) if wanted(row)])

    def receive(self, output: LayerOutput, batch_size: int, fail: Fail) -> list[LayerResult]:
        """Take the batch's next layer; returns the layers that are encoded."""
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
        return [result.only(self._rows) for result in results] if self._rows else []

    def _encode_held(self, fail: Fail) -> list[LayerResult]:
        while self._rows:
            try:
                positions_BGM = self._select()
                return [self._encode(layer, positions_BGM) for layer in self._held]
            except NonFiniteError as error:
                # The layers encoded so far contain the failed rows too, so encode again without them.
                layers = "layer " + " to ".join(str(n) for n in sorted({self._held[0].layer, self._held[-1].layer}))
                problem = f"keys, values or attention in {layers} are not finite, or too large for the codec"
                self._drop(dict.fromkeys(error.rows, problem), fail)
        return []

    def _select(self) -> Tensor:
        """Select tokens: [B,H|1,M] indices into the tokens of the held layers."""
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
        for kind in TENSORS:
            source_BHTD = (layer.k_BHTD if kind == "k" else layer.v_BHTD)[:, self._own_heads]
            chosen_BHMD = _gather_tokens(source_BHTD, positions_BGM)
            if self._map is not None:
                chosen_BHMD = self._map.apply(chosen_BHMD, layer.layer, kind)
            encoded = encode(chosen_BHMD, kind, self.plan.codec)
            tensors |= {f"{kind}.{name}": part for name, part in encoded.parts.items()}
            tensors[f"{kind} error"] = encoded.relative_error_B
            if self._with_norms:
                tensors[f"{kind} norm"] = chosen_BHMD.flatten(1).double().norm(dim=1)
        tensors["positions"] = self._token_indices(positions_BGM)
        tensors = to_host(tensors)
        errors = {kind: tensors.pop(f"{kind} error").tolist() for kind in TENSORS}
        norms = {kind: tensors.pop(f"{kind} norm").tolist() for kind in TENSORS if f"{kind} norm" in tensors}
        positions = tensors.pop("positions")
        return LayerResult(list(self._rows), layer.layer, tensors, positions, errors, norms)

    def _token_indices(self, positions_BGM: Tensor) -> Tensor:
        if not self._waits:
            return positions_BGM
        candidates_BGN = self._candidates_BN[:, None].expand(-1, positions_BGM.shape[1], -1)
        return candidates_BGN.gather(2, positions_BGM.long()).to(torch.int32)

    def _enforce_error_budget(self, results: Sequence[LayerResult], fail: Fail) -> None:
        problems: dict[int, str] = {}
        for result in reversed(results):
            problems |= error_budget_problems(result, [self.plan.codec] * len(result.indices))
        self._drop(problems, fail)

    def _drop(self, problems: Mapping[int, str], fail: Fail) -> None:
        """Fail rows of the group, given by their index in it, and keep the others."""
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


def map_result(result: LayerResult, kv_map: KVMap, codec: CodecSpec) -> tuple[LayerResult, str]:
    """Map and encode one layer that was sent in the codec `raw` with all heads.

    Returns:
        The layer without the samples that are not finite, and what is wrong with those.
    """
    parts: dict[str, Tensor] = {}
    errors: dict[str, list[float]] = {}
    try:
        for kind in TENSORS:
            encoded = encode(kv_map.apply(result.parts[f"{kind}.data"], result.layer, kind), kind, codec)
            parts |= {f"{kind}.{name}": part for name, part in encoded.parts.items()}
            errors[kind] = encoded.relative_error_B.tolist()
    except NonFiniteError as error:
        kept = [place for place in range(len(result.indices)) if place not in error.rows]
        problem = f"mapped keys or values in layer {result.layer} are not finite, or too large for the codec"
        return (map_result(result.subset(kept), kv_map, codec)[0] if kept else result.subset([])), problem
    return LayerResult(result.indices, result.layer, parts, result.positions, errors), ""


def error_budget_problems(result: LayerResult, codecs: Sequence[CodecSpec]) -> dict[int, str]:
    """The samples whose error exceeds their codec's `max_relative_error`, by index in `result.indices`."""
    problems: dict[int, str] = {}
    for kind, errors in result.relative_error.items():
        for place, (error, codec) in enumerate(zip(errors, codecs, strict=True)):
            limit = codec.max_relative_error
            if limit is not None and error > limit:
                where = f"'{kind}' of layer {result.layer} in codec '{codec.name}'"
                problem = f"{where} has a relative error of {error:.3g}; plan.codec.max_relative_error is {limit:.3g}"
                problems.setdefault(place, problem)
    return problems


def to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors from one device to host memory in one transfer."""
    if all(tensor.device.type == "cpu" for tensor in tensors.values()):
        return tensors
    packed, order = pack_bytes(tensors)
    return unpack_bytes(_pinned_copy(packed) if packed.is_cuda else packed.cpu(), order, tensors)


def _pinned_copy(packed: Tensor) -> Tensor:
    """A completed copy in page-locked memory, made on the current stream."""
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    torch.cuda.current_stream(packed.device).synchronize()
    return host


def pack_bytes(tensors: Mapping[str, Tensor]) -> tuple[Tensor, list[str]]:
    """Concatenate the tensors' bytes, wide dtypes first so that every tensor is aligned; returns them and the order."""
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    return torch.cat([tensors[name].contiguous().flatten().view(torch.uint8) for name in order]), order


def unpack_bytes(packed: Tensor, order: Sequence[str], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `pack_bytes` on the device of `packed`. `like` gives the shapes and dtypes."""
    pieces = packed.split([like[name].nbytes for name in order])
    by_name = dict(zip(order, pieces, strict=True))
    return {name: by_name[name].view(tensor.dtype).view(tensor.shape) for name, tensor in like.items()}
