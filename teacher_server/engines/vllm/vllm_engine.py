"""The engine on vLLM: teachers of any size, over several GPUs and nodes, with vLLM's scheduler.

Each sample is a vLLM request that generates one token. `vllm_connector` runs inside vLLM's workers: it executes the
samples' plans and sends the encoded layers to this process while vLLM computes the next ones.
"""

# vllm is an extra that is installed in its own environment.
# pyright: reportMissingModuleSource=false

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import queue
import secrets
import tempfile
import threading
from collections.abc import Collection, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

# vllm reads these when it is imported. Its log lines are not JSON, so only warnings are let through.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

import vllm
from vllm import AsyncEngineArgs
from vllm import SamplingParams as VLLMSamplingParams
from vllm.config import KVTransferConfig
from vllm.inputs import TokensPrompt
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from kvcore.errors import FieldError
from kvcore.plan import SamplingParams
from kvcore.tensors.select import needs_importance, needs_keys
from kvcore.types import Sample, TeacherInfo
from teacher_server.config import ServeConfig
from teacher_server.engines.base import (
    Emit,
    EngineLostError,
    ExecutionTimings,
    Fail,
    GeneratedText,
    PlannedSample,
    SampleFailure,
    TokenizedSample,
    Wanted,
    draw_seed,
)
from teacher_server.engines.hf.hf_engine import DtypeName, HFEngine, load_first_layers
from teacher_server.engines.hf.hf_generate import INCOMPLETE
from teacher_server.engines.vllm.assembly import Assembly
from teacher_server.engines.vllm.batch_progress import BatchProgress, Ended
from teacher_server.engines.vllm.message_queue import Address, Message, MessageReceiver
from teacher_server.engines.vllm.run_events import Events, RunEvents
from teacher_server.engines.vllm.vllm_connector import PARAMETER, KVDistillConnector
from teacher_server.engines.vllm.vllm_self_test import REFERENCE_LAYERS, check_against
from teacher_server.engines.vllm.vllm_settings import check_supported, engine_arguments, longest_sample
from teacher_server.engines.vllm.worker_step import worker_row

log = logging.getLogger(__name__)

# The cache layout may change with each release.
KNOWN_RELEASE = "0.32."
# Limit of the layers that wait in a worker; samples beyond it fail.
SENDER_BYTES = 2 << 30
SHUTDOWN_SECONDS = 30.0
POLL_SECONDS = 0.1
# While the layers of one batch are assembled and sent, vLLM computes the other one.
CONCURRENT_BATCHES = 2

ResultT = TypeVar("ResultT")


class VLLMEngine:
    """A `TeacherEngine` on a frozen model in vLLM.

    Args:
        reference: the model's first layers on transformers; tokenizes samples.
        info: of the whole model.
        config: of the server.
        arguments: of vLLM's engine.
    """

    def __init__(self, reference: HFEngine, info: TeacherInfo, config: ServeConfig, arguments: dict[str, Any]) -> None:
        self._reference = reference
        self._info = info
        self._pipeline = config.pipeline_parallel_size
        self._events = RunEvents()
        self._worker_lost = threading.Event()
        self._numbers = itertools.count()
        self._scratch = tempfile.TemporaryDirectory(prefix="kvdistill-")
        key = secrets.token_bytes(32)
        listen: Address = str(Path(self._scratch.name) / "kv.sock")
        if config.worker_address is not None:
            host, _, port = config.worker_address.rpartition(":")
            listen = host, int(port)
        try:
            self._receiver = MessageReceiver(listen, key, self._events.deliver, self._worker_lost.set)
        except OSError as error:
            raise FieldError("worker_address", f"cannot listen on {listen}: {error.strerror or error}") from error
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        transfer = KVTransferConfig(
            kv_connector=KVDistillConnector.__name__,
            kv_connector_module_path=KVDistillConnector.__module__,
            kv_role="kv_producer",
            kv_connector_extra_config={
                "address": listen,
                "key": key.hex(),
                "max_bytes": SENDER_BYTES,
            },
        )
        engine_arguments = AsyncEngineArgs(**arguments, kv_transfer_config=transfer)
        try:
            self._llm = self._on_loop(_start(engine_arguments)).result()
        except BaseException:
            self._end_threads()
            raise

    @property
    def info(self) -> TeacherInfo:
        """See `TeacherEngine.info`."""
        return self._info

    @property
    def small_batch_tokens(self) -> int | None:
        """See `TeacherEngine.small_batch_tokens`: vLLM does not pad."""
        return None

    @property
    def concurrent_batches(self) -> int:
        """See `TeacherEngine.concurrent_batches`: vLLM schedules the requests of all of them."""
        return CONCURRENT_BATCHES

    def tokenize(self, sample: Sample) -> TokenizedSample:
        """See `TeacherEngine.tokenize`."""
        return self._reference.tokenize_up_to(sample, self._info.max_sample_tokens)

    def run(self, batch: Sequence[PlannedSample], emit: Emit, fail: Fail, wanted: Wanted) -> ExecutionTimings:
        """See `TeacherEngine.run`.

        Raises:
            EngineLostError: vLLM's engine process ended.
        """
        tags = [f"kv-{next(self._numbers)}" for _ in batch]
        assembly = Assembly(tags, batch, self._info.kv_heads)
        for row, sample in enumerate(batch):
            problem = self._cannot_execute(sample)
            if problem is not None:
                assembly.drop(row)
                fail(SampleFailure(row, problem))
        with self._events.of_run(tags) as events:
            requests = {row: self._on_loop(self._prefill(tags[row], batch[row])) for row in assembly.open_rows()}
            progress = BatchProgress(assembly, emit, fail, {row: request.cancel for row, request in requests.items()})
            self._follow(progress, requests.values(), events, wanted)
        return progress.timings()

    def _follow(
        self, progress: BatchProgress, requests: Collection[Future[None]], events: Events, wanted: Wanted
    ) -> None:
        """Passes the events of a batch on until it has ended."""
        try:
            while progress.runs:
                self.check()
                progress.give_up(wanted)
                for event in _next_events(events):
                    if isinstance(event, Ended):
                        if event.problem is not None:
                            # A dead engine refuses every request: raise EngineLostError instead of failing the sample.
                            self.check()
                        progress.on_ended(event)
                    else:
                        progress.on_message(event)
        finally:
            for request in requests:
                request.cancel()

    def prefill_alone(self, batch: Sequence[TokenizedSample]) -> None:
        """Prefill prompts without plans, to measure the cost of vLLM alone; for benchmarks."""
        parameters = VLLMSamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        requests = [
            self._on_loop(self._answer(t.token_ids, parameters, f"prefill-{next(self._numbers)}")) for t in batch
        ]
        for request in requests:
            request.result()

    def generate(
        self, prompts: Sequence[TokenizedSample], sampling: SamplingParams, wanted: Wanted
    ) -> list[GeneratedText | SampleFailure]:
        """See `TeacherEngine.generate`."""
        requests = [self._on_loop(self._generate(tokens, sampling)) for tokens in prompts]
        while waiting := [row for row, request in enumerate(requests) if not request.done()]:
            for row in waiting:
                if not wanted(row):
                    requests[row].cancel()
            wait_for(requests, timeout=POLL_SECONDS)
        self.check()
        return [_outcome(row, request) for row, request in enumerate(requests)]

    def close(self) -> None:
        """See `TeacherEngine.close`."""
        with contextlib.suppress(TimeoutError):
            self._on_loop(_shut_down(self._llm)).result(timeout=SHUTDOWN_SECONDS)
        self._end_threads()
        self._reference.close()

    def _end_threads(self) -> None:
        self._receiver.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=1.0)
        if not self._loop.is_running():
            self._loop.close()
        self._scratch.cleanup()

    def _on_loop(self, work: Coroutine[Any, Any, ResultT]) -> Future[ResultT]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def check(self) -> None:
        """See `TeacherEngine.check`."""
        if self._worker_lost.is_set():
            raise EngineLostError("the engine has ended: a worker closed its connection")
        if self._llm.errored:
            raise EngineLostError("the engine has ended: vLLM's core process died")

    def _cannot_execute(self, sample: PlannedSample) -> str | None:
        selection = sample.plan.selection
        if self._pipeline > 1 and selection.scope == "sample" and needs_keys(selection):
            return (
                f"plan.selection: '{selection.selector}' in scope 'sample' needs all layers together, and this "
                f"teacher's are on {self._pipeline} pipeline stages; use scope 'layer' or 'head', or the selector "
                "'right'"
            )
        return None

    async def _prefill(self, tag: str, sample: PlannedSample) -> None:
        selection = sample.plan.selection
        parameters = VLLMSamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            # vLLM does not compute the queries of tokens that it finds in the prefix cache.
            skip_reading_prefix_cache=needs_importance(selection),
            extra_args={"kv_transfer_params": {PARAMETER: worker_row(tag, sample).pack()}},
        )
        try:
            output = await self._answer(sample.tokens.token_ids, parameters, tag)
            ended = Ended(tag, None, output.num_cached_tokens or 0)
        except Exception as error:  # noqa: BLE001  any error of vLLM on a request fails that sample alone
            ended = Ended(tag, f"vLLM refused the sample: {type(error).__name__}: {error}")
        self._events.deliver(ended)

    async def _generate(self, tokens: TokenizedSample, sampling: SamplingParams) -> GeneratedText:
        parameters = VLLMSamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p if sampling.temperature else 1.0,
            seed=draw_seed(sampling, tokens),
            stop=list(sampling.stop) or None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._answer(tokens.prompt_ids, parameters, f"generate-{next(self._numbers)}")
        (completion,) = output.outputs
        reason = "length" if completion.finish_reason == "length" else "stop"
        # A text that is cut off inside a character ends with the decoder's replacement character.
        text = completion.text.rstrip(INCOMPLETE) if reason == "length" else completion.text
        return GeneratedText(text, reason, len(completion.token_ids))

    async def _answer(self, token_ids: Sequence[int], parameters: VLLMSamplingParams, name: str) -> Any:
        output: Any = None
        prompt = TokensPrompt(prompt_token_ids=list(token_ids))
        async for output in self._llm.generate(prompt, parameters, name):  # noqa: B007  the last output is the final one
            pass
        return output


def _next_events(events: Events) -> Iterator[Message | Ended]:
    with contextlib.suppress(queue.Empty):
        yield events.get(timeout=POLL_SECONDS)
        while True:
            yield events.get_nowait()


def _outcome(row: int, request: Future[GeneratedText]) -> GeneratedText | SampleFailure:
    if request.cancelled():
        return SampleFailure(row, "cancelled: the caller has gone")
    error = request.exception()
    if error is not None:
        return SampleFailure(row, f"vLLM refused the prompt: {type(error).__name__}: {error}")
    return request.result()


async def _start(arguments: AsyncEngineArgs) -> AsyncLLM:
    """Start vLLM on the event loop that it runs on."""
    return AsyncLLM.from_engine_args(arguments)


async def _shut_down(llm: AsyncLLM) -> None:
    llm.shutdown()


def load(config: ServeConfig) -> VLLMEngine:
    """Start vLLM on a model, and compare its keys and values with those of transformers.

    Raises:
        FieldError: a model, device or option is not available on this host; names the field.
        UnsupportedModelError: keys and values cannot be read exactly, or differ from those of transformers.
    """
    if not vllm.__version__.startswith(KNOWN_RELEASE):
        raise FieldError(
            "engine",
            f"vllm {vllm.__version__} is installed; only {KNOWN_RELEASE}x is supported (docs/teachers.md)",
        )
    dtype = _dtype(config)
    reference, model = load_first_layers(config, REFERENCE_LAYERS, dtype)
    check_supported(config, model)
    longest = longest_sample(config, model)
    known = frozenset(field.name for field in fields(AsyncEngineArgs))
    text_config = model.get_text_config()
    info = replace(
        reference.info, layers=text_config.num_hidden_layers, engine="vllm", dtype=dtype, max_sample_tokens=longest
    )
    engine = VLLMEngine(reference, info, config, engine_arguments(config, dtype, longest, known))
    try:
        check_against(reference, engine)
    except BaseException:
        engine.close()
        raise
    return engine


def _dtype(config: ServeConfig) -> DtypeName:
    device = "cpu" if current_platform.is_cpu() else "cuda"
    if not config.device.startswith(("auto", device)) or ":" in config.device:
        raise FieldError(
            "device",
            f"got '{config.device}'; this vLLM runs on {device}; choose its GPUs with CUDA_VISIBLE_DEVICES",
        )
    if config.dtype == "auto":
        return "fp32" if device == "cpu" else "bf16"
    return config.dtype
