"""The KV connector that runs inside vLLM; vLLM imports it by its module path.

In vLLM's scheduler it tracks which requests carry a plan, and tells the workers in which pass a prompt ends. In a
worker it copies those requests' tokens from each layer's cache as soon as the layer is computed; a thread un-rotates,
selects, encodes and sends them. Nothing here blocks or raises: an exception would end vLLM's engine for all requests.
"""

# vllm is an extra that is installed in its own environment.
# pyright: reportMissingModuleSource=false

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from vllm import _custom_ops
from vllm.distributed import get_pp_group, get_tp_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

from align.rope_scale import RoPEScaler
from kvcore.errors import UnsupportedModelError
from kvcore.types import Tensor
from teacher_server.engines.base import LayerOutput
from teacher_server.engines.vllm.answer_queries import AnswerQueries, Segment
from teacher_server.engines.vllm.message_queue import Address, MessageSender, PendingMessage, worker_failure
from teacher_server.engines.vllm.paged_cache import CacheLayout, ReadTokens, layout_of
from teacher_server.engines.vllm.worker_step import HeadShare, WorkerRow, WorkerStep

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

log = logging.getLogger(__name__)

PARAMETER = "kvdistill"
NULL_BLOCK = 0


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One request in a pass, which computes its prompt tokens `start` to `end` out of `length`.

    `content`: its packed `WorkerRow`. `blocks`: the cache blocks of all its tokens so far.
    """

    content: bytes
    start: int
    end: int
    length: int
    blocks: list[int]

    @property
    def is_last(self) -> bool:
        """Whether the prompt ends in this pass."""
        return self.end == self.length


@dataclass
class StepMetadata(KVConnectorMetadata):
    """The scheduler's message to the workers about one pass. `ended`: requests that finished or were aborted."""

    scheduled: list[tuple[str, Scheduled]] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)


class KVDistillConnector(KVConnectorBase_V1):
    """vLLM's connector interface; see the module."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if kv_cache_config is not None and len(kv_cache_config.kv_cache_groups) != 1:
            raise UnsupportedModelError("vLLM keeps this model's layers in several cache groups; only one is supported")
        self._requests: dict[str, tuple[bytes, int]] = {}
        if role == KVConnectorRole.WORKER:
            self._worker = Worker(vllm_config, self._kv_transfer_config.kv_connector_extra_config)

    @property
    def requires_kv_delivery(self) -> bool:
        """No: blocks are copied while their pass runs, so nothing is pending when a request ends."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:  # noqa: ARG003
        """Yes: replaying a full CUDA graph would skip `save_kv_layer`."""
        return True

    # ------------------------------------------------------------------------------------------------ scheduler

    def on_new_request(self, request: Request) -> None:
        """Track a request that carries a plan."""
        content = (request.kv_transfer_params or {}).get(PARAMETER)
        if content is not None:
            self._requests[request.request_id] = (content, request.num_prompt_tokens)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:  # noqa: ARG002
        """This connector never loads KV."""
        return 0, False

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """This connector never loads KV."""

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepMetadata:
        """Describe the prompts of this pass to the workers."""
        cached = scheduler_output.scheduled_cached_reqs
        starts = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        state = scheduler_output.kv_connector_block_state
        metadata = StepMetadata(ended=[name for name in scheduler_output.finished_req_ids if name in self._requests])
        for name, start in starts.items():
            content, length = self._requests.get(name, (b"", 0))
            if start < length and state is not None:
                (blocks,) = state.get_block_ids(name) or ([],)
                end = min(start + scheduler_output.num_scheduled_tokens[name], length)
                metadata.scheduled.append((name, Scheduled(content, start, end, length, list(blocks))))
        for name in metadata.ended:
            del self._requests[name]
        return metadata

    # ------------------------------------------------------------------------------------------------ worker

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Pass the layers' caches to the worker."""
        self._worker.register(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Begin a pass."""
        super().bind_connector_metadata(connector_metadata)
        self._worker.begin(cast("StepMetadata", connector_metadata))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """This connector never loads KV."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """This connector never loads KV."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Called when a layer's cache is written."""
        self._worker.on_layer(layer_name, kv_layer, attn_metadata)

    def wait_for_save(self) -> None:
        """Nothing to wait for: the worker has copied what it needs."""

    def shutdown(self) -> None:
        """Send the waiting messages."""
        if self.role == KVConnectorRole.WORKER:
            self._worker.close()


@dataclass(slots=True)
class _Pass:
    """The requests whose prompts end in a pass, and the function that copies their tokens from a cache."""

    step: WorkerStep
    rows: list[WorkerRow]
    names: list[str]
    read: ReadTokens


class Worker:
    """The connector in one worker."""

    def __init__(self, vllm_config: VllmConfig, extra: dict[str, Any]) -> None:
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        self._rope = RoPEScaler.from_config(model.hf_config)
        total = model.get_total_num_kv_heads()
        self._ranks = parallel.tensor_parallel_size
        self._share = HeadShare.of(get_tp_group().rank_in_group, self._ranks, total)
        self._modules = cast("dict[str, Any]", vllm_config.compilation_config.static_forward_context)
        self._block_size = cast("int", vllm_config.cache_config.block_size)
        address: Address = extra["address"] if isinstance(extra["address"], str) else tuple(extra["address"])
        self._sender = MessageSender(address, bytes.fromhex(extra["key"]), int(extra["max_bytes"]))
        self._queries = AnswerQueries(self._block_size)
        self._layout: CacheLayout | None = None
        self._layers: dict[str, int] = {}
        self._scales: dict[str, float] = {}
        self._pass: _Pass | None = None
        log.info("kvdistill: rank %s of stage %s", get_tp_group().rank_in_group, get_pp_group().rank_in_group)

    def close(self) -> None:
        """Send the waiting messages."""
        self._sender.close()

    def register(self, caches: dict[str, Tensor]) -> None:
        """Find the layers' indices, and hook their attention to see its queries."""
        for name in caches:
            found = re.findall(r"\blayers\.(\d+)\.", name)
            self._layers[name] = int(found[0])
            module = self._modules[name]
            self._scales[name] = float(module.impl.scale)
            module.register_forward_pre_hook(self._query_hook(name, module.num_heads, module.head_size))

    def _query_hook(self, name: str, heads: int, head_dim: int) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(_module: Any, arguments: tuple[Tensor, ...]) -> None:
            if self._queries.needed and arguments:
                self._queries.observe(name, arguments[0].view(-1, heads, head_dim))

        return hook

    def begin(self, metadata: StepMetadata) -> None:
        """Prepare a pass. If that fails, the requests whose prompts end in it fail, and the engine continues."""
        self._pass = None
        self._queries.begin(metadata.ended)
        rows: list[tuple[str, WorkerRow, Scheduled]] = []
        for name, scheduled in metadata.scheduled:
            row = WorkerRow.unpack(scheduled.content)
            if row.answer_A.size:
                layers = frozenset(n for n, layer in self._layers.items() if layer in row.row.plan.layers)
                segment = Segment(row.answer_A, scheduled.start, scheduled.end, scheduled.blocks, layers)
                self._guard([row.tag], partial(self._queries.add, name, segment))
            if scheduled.is_last:
                rows.append((name, row, scheduled))
        if rows:
            self._guard([row.tag for _, row, _ in rows], lambda: self._begin_pass(rows))

    def _begin_pass(self, rows: Sequence[tuple[str, WorkerRow, Scheduled]]) -> None:
        if any(NULL_BLOCK in scheduled.blocks for _, _, scheduled in rows):
            raise RuntimeError("vLLM has freed blocks of the prompt, as it does beyond a sliding window")
        gathered = any(self._share.needs_others(row.row.plan) for _, row, _ in rows)
        step = WorkerStep(
            [row for _, row, _ in rows],
            [scheduled.length for _, _, scheduled in rows],
            self._rope,
            self._share,
            gathered=gathered,
        )
        longest = max(len(scheduled.blocks) for _, _, scheduled in rows)
        blocks_Bn = torch.tensor([[*s.blocks, *[s.blocks[0]] * (longest - len(s.blocks))] for _, _, s in rows])
        block_BT = blocks_Bn.gather(1, step.needed_BT // self._block_size)
        offset_BT = step.needed_BT % self._block_size
        layout, device = self._known_layout(), self._device
        read = layout.reader(block_BT.flatten().to(device), offset_BT.flatten().to(device))
        self._pass = _Pass(step, [row for _, row, _ in rows], [name for name, _, _ in rows], read)
        self._gathered = gathered

    def _known_layout(self) -> CacheLayout:
        if self._layout is None:
            name = next(iter(self._layers))
            module = self._modules[name]
            cache = module.kv_cache
            self._device = cache.device
            geometry = {
                "kv_heads": module.num_kv_heads,
                "block_size": self._block_size,
                "head_dim": module.head_size,
            }
            isa = getattr(module, "isa", None)

            def write(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
                _custom_ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, cast("str", isa))

            backend = module.attn_backend.get_name()
            self._layout = layout_of(backend, cache, geometry, write if isa is not None else None)
        return self._layout

    def on_layer(self, name: str, cache: Tensor, attention: Any) -> None:
        """Copy the tokens that the pass needs from a layer, on the compute stream, and queue them for sending."""
        current = self._pass
        if name not in self._layers:
            return
        # An error here fails the requests when their prompts end, because their queries are incomplete.
        self._guard([], lambda: self._queries.keep(name, attention.slot_mapping))
        if current is None or self._layers[name] not in current.step.layers:
            return
        self._guard(current.step.tags, lambda: self._send(current, name, cache))

    def _send(self, current: _Pass, name: str, cache: Tensor) -> None:
        k_NHD, v_NHD = current.read(cache)
        batch = len(current.rows)
        k_BHTD, v_BHTD = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (k_NHD, v_NHD))
        layer, scale = self._layers[name], self._scales[name]
        answers = [row.answer_A[: row.answer_A.size * (layer in row.row.plan.layers)] for row in current.rows]
        queries = self._queries.take(name, current.names, answers)
        if self._gathered:
            k_BHTD, v_BHTD = self._all_heads(k_BHTD), self._all_heads(v_BHTD)
            queries = None if queries is None else queries.with_all_heads(self._all_queries)
        ready = torch.cuda.Event() if k_BHTD.is_cuda else None
        if ready is not None:
            ready.record()

        def make() -> Any:
            read = (k_BHTD, v_BHTD) if queries is None else (k_BHTD, v_BHTD, queries.q_bQAD)
            with _after(ready, read):
                importance = (None, None) if queries is None else queries.importance(layer, k_BHTD, scale)
                yield from current.step.messages(LayerOutput(layer, k_BHTD, v_BHTD, *importance))

        self._sender.put(PendingMessage(k_BHTD.nbytes + v_BHTD.nbytes, make, current.step.tags))

    def _all_heads(self, x_BHTD: Tensor) -> Tensor:
        """All ranks' heads, without the copies."""
        gathered = get_tp_group().all_gather(x_BHTD.contiguous(), dim=1)
        copies = self._ranks * self._share.count // self._share.total
        return gathered[:, ::copies] if copies > 1 else gathered

    def _all_queries(self, q_BQAD: Tensor) -> Tensor:
        return get_tp_group().all_gather(q_BQAD.contiguous(), dim=1)

    def _guard(self, tags: Sequence[str], work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # an exception here would end vLLM's engine for all requests
            log.exception("cannot read keys and values")
            failure = worker_failure(tags, error)
            if tags:
                self._sender.put(PendingMessage(0, lambda: [failure], list(tags)))


_side_streams: dict[torch.device, Any] = {}


@contextlib.contextmanager
def _after(event: Any, tensors: Sequence[Tensor]) -> Iterator[None]:
    """On a GPU: run on a side stream after `event`, so that the compute stream is not blocked."""
    if event is None:
        yield
        return
    device = tensors[0].device
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)
    stream = _side_streams[device]
    stream.wait_event(event)
    for tensor in tensors:
        # They were allocated on the compute stream, which must not reuse their memory too early.
        tensor.record_stream(stream)
    with torch.cuda.stream(stream):
        yield
