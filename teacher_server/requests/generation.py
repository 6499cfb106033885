"""Serves `Generate`: queues prompts, tokenizes the completed texts, and queues those as samples."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import grpc

from kvcore.errors import FieldError
from kvcore.monitoring import tracing
from kvcore.plan import KVPlan, SamplingParams
from kvcore.tensors.kv_map import KVMap
from kvcore.wire.completion import Completion, completed_sample
from teacher_server.engines.base import GeneratedText, PlannedSample, SampleFailure, TokenizedSample
from teacher_server.fair_share import Caller
from teacher_server.monitoring.request_tracing import add_generation
from teacher_server.plan_execution import check_sample, encoded_bytes
from teacher_server.requests.answer_stream import AnswerStream
from teacher_server.requests.work_thread import WorkThread
from teacher_server.sample_queue import ClientStream, Job
from teacher_server.state import Backend


class Generation:
    """The samples of one `Generate` request, from prompts to K/V. Used on the event loop's thread only.

    Args:
        plan, kv_map, sampling: of the request; the map is the plan's.
        backend: the teacher.
        answer: receives completions, K/V and failures.
        caller: of the request.
        work: the tokenizer's thread.
        count_tokens: called with the numbers of generated tokens, and of tokens in completed samples.
    """

    def __init__(
        self,
        plan: KVPlan,
        kv_map: KVMap | None,
        sampling: SamplingParams,
        backend: Backend,
        answer: AnswerStream,
        caller: Caller,
        work: WorkThread,
        count_tokens: Callable[[int, int], None],
    ) -> None:
        self._plan, self._map = plan, kv_map
        self._sampling = sampling
        self._backend = backend
        self._answer = answer
        self._caller = caller
        self._work = work
        self._count_tokens = count_tokens
        self._prompts = ClientStream(answer, self._on_generated, caller)
        self.samples = ClientStream(answer, caller=caller)
        self._tasks: set[asyncio.Task[None]] = set()
        self._span = tracing.current()

    def queue(self, prompts: Sequence[TokenizedSample | FieldError]) -> None:
        """Queue the prompts that are valid."""
        # The engine does not use the marker. Without it, requests that differ in the marker alone share batches.
        sampling = self._sampling.model_copy(update={"answer_marker": ""})
        jobs = [
            # Texts are small, so they do not count against the stream's window.
            Job(self._prompts, index, PlannedSample(tokens, self._plan), 0, sampling)
            for index, tokens in enumerate(prompts)
            if not isinstance(tokens, FieldError)
        ]
        self._backend.scheduler.queue.extend(self._prompts, jobs)

    def close(self) -> None:
        """Leave the queue; outcomes that the engine still computes are discarded."""
        for stream in (self._prompts, self.samples):
            self._backend.scheduler.queue.remove(stream)
        for task in self._tasks:
            task.cancel()

    def _on_generated(
        self, jobs: Sequence[Job], outcomes: Sequence[GeneratedText | SampleFailure], seconds: float
    ) -> None:
        add_generation(self._span, jobs, seconds)
        task = asyncio.create_task(self._queue_completions(jobs, outcomes, seconds))
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            self._answer.on_crash(error)

    async def _queue_completions(
        self, jobs: Sequence[Job], outcomes: Sequence[GeneratedText | SampleFailure], seconds: float
    ) -> None:
        """Send the completions of a batch, and queue the completed samples for their K/V."""

        def complete() -> list[tuple[Completion | None, Job | str]]:
            return [self._complete(job, outcome, seconds) for job, outcome in zip(jobs, outcomes, strict=True)]

        size = sum(len(outcome.text) for outcome in outcomes if isinstance(outcome, GeneratedText))
        completed = await self._work.run(self._caller, id(jobs), size, complete)
        samples: list[Job] = []
        for job, (completion, sample) in zip(jobs, completed, strict=True):
            if completion is not None:
                self._answer.announce(job.index, job.planned.tokens.sample, completion)
                self._count_tokens(completion.tokens, 0)
            if isinstance(sample, Job):
                samples.append(sample)
                self._count_tokens(0, sample.tokens)
            else:
                self._answer.refuse(job.index, grpc.StatusCode.FAILED_PRECONDITION.name, sample)
        self._answer.settle()
        self._backend.scheduler.queue.extend(self.samples, samples)

    def _complete(
        self, prompt: Job, outcome: GeneratedText | SampleFailure, seconds: float
    ) -> tuple[Completion | None, Job | str]:
        """The completion of a prompt, and the job for its K/V or why there is none. Runs in the tokenizer's thread."""
        if isinstance(outcome, SampleFailure):
            return None, outcome.problem
        sample = completed_sample(prompt.planned.tokens.sample, outcome.text, self._sampling.answer_marker)
        completion = Completion(sample, outcome.finish_reason, outcome.tokens, prompt.waited, seconds)
        engine = self._backend.engine
        try:
            tokens = engine.tokenize(sample)
            check_sample(tokens, self._plan)
        except FieldError as error:
            return completion, self._explain(completion, error)
        nbytes = encoded_bytes(self._plan, tokens, engine.info)
        return completion, Job(self.samples, prompt.index, PlannedSample(tokens, self._plan, self._map), nbytes)

    def _explain(self, completion: Completion, error: FieldError) -> str:
        marker = self._sampling.answer_marker
        has_answer = any(span.kind == "answer" for span in completion.sample.spans)
        ending = f"(finish_reason: {completion.finish_reason})"
        detail = f", with no answer after the marker {marker!r}" if marker and not has_answer else ""
        return f"{error}; the teacher generated {completion.tokens} tokens {ending}{detail}"
