"""One forward pass of a vLLM worker: executes the plans of the requests whose prompts end in the pass.

A request's plan is executed in the pass that computes its last prompt token. Then the cache holds all of its tokens,
whether they were computed in earlier passes, found in the prefix cache, or recomputed after a preemption.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgpack
import numpy as np
import torch
from numpy.typing import NDArray

from align.rope_scale import RoPEScaler
from kvcore.plan import CodecSpec, KVPlan
from kvcore.tensors.select import needs_importance, needs_keys, needs_seeds, select
from teacher_server.engines.base import (
    SPAN_KINDS,
    LayerOutput,
    LayerResult,
    PlannedSample,
    SampleFailure,
)
from teacher_server.engines.vllm.message_queue import FailureMessage, LayerMessage, Message
from teacher_server.plan_execution import PlanRow, PlanRun, plan_row


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """One request as the workers need it.

    `tag`: its name. `needed_N`: prompt tokens to read from the cache, ascending. `row`: its plan over indices into
    `needed_N`. `answer_A`: the answer's tokens if the plan ranks by their attention, else empty.
    """

    tag: str
    row: PlanRow
    needed_N: NDArray[np.int64]
    answer_A: NDArray[np.int64]

    def pack(self) -> bytes:
        """Serialise for the request's parameters."""
        content = (
            self.tag,
            self.row.plan.model_dump_json(),
            self.row.seed,
            *(indices.astype("<i4").tobytes() for indices in (self.row.candidates_N, self.needed_N, self.answer_A)),
        )
        return cast("bytes", msgpack.packb(content))

    @classmethod
    def unpack(cls, content: bytes) -> WorkerRow:
        """Deserialise what `pack` returned."""
        tag, plan, seed, *indices = cast("tuple[Any, ...]", msgpack.unpackb(content))
        candidates_N, needed_N, answer_A = (np.frombuffer(i, dtype="<i4").astype(np.int64) for i in indices)
        return cls(tag, PlanRow(KVPlan.model_validate_json(plan), candidates_N, seed), needed_N, answer_A)


def worker_row(tag: str, sample: PlannedSample) -> WorkerRow:
    """Determine the tokens that a worker reads: the candidates, or the selected tokens if keys do not matter.

    The server enforces the plan's error budget, because only it knows the error over all heads. It also applies the
    plan's map, because only there all heads meet: workers send what is to be mapped in fp32.
    """
    codec = sample.plan.codec.model_copy(update={"max_relative_error": None})
    if sample.plan.map is not None:
        codec = CodecSpec(name="raw")
    row = plan_row(PlannedSample(sample.tokens, sample.plan.model_copy(update={"codec": codec, "map": None})))
    selection = row.plan.selection
    if needs_importance(selection):
        answer = SPAN_KINDS.index("answer")
        answer_A = np.flatnonzero(np.asarray(sample.tokens.span_ids) == answer)
        return WorkerRow(tag, row, np.arange(len(sample.tokens.token_ids)), answer_A)
    needed_N = row.candidates_N
    if not needs_keys(selection) and not needs_seeds(selection):
        no_keys_BHTD = torch.empty(1, 1, 0, 0)
        needed_N = select(selection, torch.from_numpy(needed_N)[None], no_keys_BHTD, None)[0, 0].long().numpy()
    among_needed = PlanRow(row.plan, np.arange(needed_N.size), row.seed)
    return WorkerRow(tag, among_needed, needed_N, np.empty(0, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class HeadShare:
    """A tensor-parallel rank's KV heads, out of `total`. Of the ranks with copies of the same head, one `sends` it."""

    first: int
    count: int
    total: int
    sends: bool
    copies: int = 1

    @classmethod
    def of(cls, rank: int, ranks: int, total: int) -> HeadShare:
        """VLLM's distribution of heads: equal ranges, or copies of single heads if there are more ranks than heads."""
        if ranks <= total:
            return cls(rank * (total // ranks), total // ranks, total, sends=True)
        copies = ranks // total
        return cls(rank // copies, 1, total, sends=rank % copies == 0, copies=copies)

    def needs_others(self, plan: KVPlan) -> bool:
        """Whether this rank needs the other ranks' keys and queries to select the same tokens as they do."""
        if self.copies > 1 and needs_importance(plan.selection):
            # The query heads of one KV head are distributed over the ranks that have a copy of it.
            return True
        return self.count < self.total and needs_all_heads(plan)


def needs_all_heads(plan: KVPlan) -> bool:
    """Whether a plan selects by all KV heads together."""
    selection = plan.selection
    return needs_seeds(selection) or (needs_keys(selection) and selection.scope != "head")


class WorkerStep:
    """The requests of one pass.

    Args:
        rows: the requests.
        lengths: number of tokens in each prompt.
        rope: the model's rotary embedding.
        share: the heads that this rank computes.
        gathered: whether `messages` gets all heads instead of the share's.
    """

    def __init__(
        self, rows: Sequence[WorkerRow], lengths: Sequence[int], rope: RoPEScaler, share: HeadShare, *, gathered: bool
    ) -> None:
        assert gathered or not any(share.needs_others(row.row.plan) for row in rows), "other ranks' heads are needed"
        self.tags = [row.tag for row in rows]
        longest = max(row.needed_N.size for row in rows)
        padded = [np.pad(row.needed_N, (0, longest - row.needed_N.size)) for row in rows]
        self.needed_BT = torch.from_numpy(np.stack(padded))
        self._length = max(lengths)
        self._rope = rope
        self._share = share
        self._failures: list[SampleFailure] = []
        own = slice(share.first, share.first + share.count) if gathered else slice(None)
        own = slice(None) if share.count == share.total else own
        self._partial = share.count != share.total
        self._run = PlanRun([row.row for row in rows], self._failures.append, own, with_norms=self._partial)
        self.layers = frozenset(self._run.layers)

    def messages(self, output: LayerOutput) -> Iterator[Message]:
        """The messages to send when a layer is computed. The keys of `output` are rotated; they are un-rotated here."""
        started = time.perf_counter()
        content_BHTD = self._rope.unrotate(output.k_BHTD, self.needed_BT.to(output.k_BHTD.device), self._length)
        content = LayerOutput(
            output.layer, content_BHTD, output.v_BHTD, output.importance_BHT, output.mean_importance_BHT
        )
        results = self._run.receive(content)
        encode_s = time.perf_counter() - started
        if not self._share.sends:
            return
        for failure in self._failures:
            yield FailureMessage([self.tags[failure.index]], failure.problem)
        self._failures.clear()
        for result in results:
            yield self._message(result, encode_s / len(results))

    def _message(self, result: LayerResult, encode_s: float) -> LayerMessage:
        needed_BT = self.needed_BT[result.indices].to(torch.int32)
        index_BGM = result.positions.long()
        positions = needed_BT[:, None].expand(-1, index_BGM.shape[1], -1).gather(2, index_BGM)
        return LayerMessage(
            tags=[self.tags[row] for row in result.indices],
            layer=result.layer,
            heads_from=self._share.first,
            heads=self._share.count,
            parts=result.parts,
            positions=positions.contiguous(),
            relative_error=result.relative_error,
            norms=result.norms,
            encode_s=encode_s,
        )
