"""What the service does for `Generate`: has prompts written on, reads the results as samples, and queues those."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import grpc

from kvcore.errors import FieldError
from kvcore.monitoring import tracing
from kvcore.plan import KVPlan, SamplingParams
from kvcore.tensors.select import needs_importance
from kvcore.types import Sample, TeacherInfo
from kvcore.wire.completion import Completion, completed_sample
from teacher_server.answer_stream import AnswerStream
from teacher_server.engines.base import (
    GeneratedText,
    GenerateOptions,
    PlannedSample,
    SampleFailure,
    TeacherEngine,
    TokenizedSample,
)
from teacher_server.monitoring.request_tracing import add_writing
from teacher_server.plan_execution import check_sample, encoded_bytes
from teacher_server.sample_queue import ClientStream, Job
from teacher_server.state import Backend


def check_sampling(sampling: SamplingParams, plan: KVPlan, samples: Sequence[Sample], info: TeacherInfo) -> None:
    """Refuses a request that no writing can serve.

    Raises:
        FieldError: naming the request's field.
    """
    if sampling.max_new_tokens >= info.max_sample_tokens:
        raise FieldError(
            "sampling.max_new_tokens",
            f"got {sampling.max_new_tokens}; a sample of this teacher, prompt included, has at most "
            f"{info.max_sample_tokens} tokens (max_sample_tokens)",
        )
    by_answer = plan.selection.span == "answer" or needs_importance(plan.selection)
    if by_answer and not sampling.answer_marker:
        raise FieldError("sampling.answer_marker", "is empty, and the plan needs to know which tokens are the answer")
    for index, sample in enumerate(samples):
        if sample.token_ids is not None:
            raise FieldError(f"samples.{index}.token_ids", "a prompt to write on from must be text")
        for at, span in enumerate(sample.spans):
            if span.kind != "prompt":
                raise FieldError(f"samples.{index}.spans.{at}.kind", f"must be prompt (got {span.kind})")


def read_prompts(
    engine: TeacherEngine, samples: Sequence[Sample], sampling: SamplingParams
) -> list[TokenizedSample | FieldError]:
    """Reads every prompt as the teacher does; one that cannot be read or leaves too little room harms no other."""
    read: list[TokenizedSample | FieldError] = []
    for sample in samples:
        try:
            tokens = engine.tokenize(sample)
            _check_room(tokens, sampling.max_new_tokens, engine.info.max_sample_tokens)
            read.append(tokens)
        except FieldError as error:
            read.append(error)
    return read


def _check_room(tokens: TokenizedSample, new: int, limit: int) -> None:
    count = len(tokens.token_ids)
    if count + new > limit:
        raise FieldError(
            f"samples[{tokens.sample.id}].text",
            f"has {count} tokens, and {new} may be written (sampling.max_new_tokens); together this teacher takes at "
            f"most {limit} (max_sample_tokens)",
        )


class Generation:
    """The samples of one request on their way from prompts to K/V. For the event loop's thread alone.

    Args:
        plan: of the request.
        sampling: of the request.
        backend: the teacher.
        stream: where texts, K/V and failures go.
        tokenizing: the thread that reads texts.
        count_tokens: called with how many tokens were written, and how many the samples have that they make.
    """

    def __init__(
        self,
        plan: KVPlan,
        sampling: SamplingParams,
        backend: Backend,
        stream: AnswerStream,
        tokenizing: Executor,
        count_tokens: Callable[[int, int], None],
    ) -> None:
        self._plan = plan
        self._sampling = sampling
        self._backend = backend
        self._stream = stream
        self._tokenizing = tokenizing
        self._count_tokens = count_tokens
        self._prompts = ClientStream(stream, self._on_written)
        self.samples = ClientStream(stream)
        self._tasks: set[asyncio.Task[None]] = set()
        self._span = tracing.current()

    def admit(self, prompts: Sequence[TokenizedSample | FieldError]) -> None:
        """Queues what can be written.

        Raises:
            BusyError: it does not fit into the queue at the moment.
        """
        options = _options(self._sampling)
        jobs = [
            # Texts are small: no window holds them back.
            Job(self._prompts, index, PlannedSample(tokens, self._plan), 0, options)
            for index, tokens in enumerate(prompts)
            if not isinstance(tokens, FieldError)
        ]
        if jobs:
            self._backend.scheduler.queue.admit(self._prompts, jobs)

    def close(self) -> None:
        """Leaves the queue; what the engine still writes has no receiver any more."""
        for lane in (self._prompts, self.samples):
            self._backend.scheduler.queue.remove(lane)
        for task in self._tasks:
            task.cancel()

    def _on_written(
        self, jobs: Sequence[Job], outcomes: Sequence[GeneratedText | SampleFailure], seconds: float
    ) -> None:
        add_writing(self._span, jobs, seconds)
        task = asyncio.create_task(self._go_on(jobs, outcomes, seconds))
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            self._stream.on_crash(error)

    async def _go_on(
        self, jobs: Sequence[Job], outcomes: Sequence[GeneratedText | SampleFailure], seconds: float
    ) -> None:
        """Sends what was written, and queues it for its K/V."""
        loop = asyncio.get_running_loop()
        read = await loop.run_in_executor(self._tokenizing, self._read_written, jobs, outcomes, seconds)
        following: list[Job] = []
        for job, (text, outcome) in zip(jobs, read, strict=True):
            if isinstance(text, Completion):
                self._stream.announce(job.index, job.planned.tokens.sample, text)
                self._count_tokens(text.tokens, 0)
            if isinstance(outcome, Job):
                following.append(outcome)
                self._count_tokens(0, outcome.tokens)
            else:
                self._stream.refuse(job.index, grpc.StatusCode.FAILED_PRECONDITION.name, self._explain(text, outcome))
        self._stream.settle()
        self._backend.scheduler.queue.extend(self.samples, following)

    def _read_written(
        self, jobs: Sequence[Job], outcomes: Sequence[GeneratedText | SampleFailure], seconds: float
    ) -> list[tuple[Completion | str, Job | str]]:
        """What was written, and what follows from it; or what is wrong with either. In the tokenizer's thread."""
        read: list[tuple[Completion | str, Job | str]] = []
        for job, outcome in zip(jobs, outcomes, strict=True):
            text = self._text(job, outcome, seconds)
            read.append((text, text if isinstance(text, str) else self._following(job, text.sample)))
        return read

    def _following(self, prompt: Job, sample: Sample) -> Job | str:
        engine = self._backend.engine
        try:
            tokens = engine.tokenize(sample)
            check_sample(tokens, self._plan, f"samples[{sample.id}]")
        except FieldError as error:
            return str(error)
        nbytes = encoded_bytes(self._plan, tokens, engine.info)
        return Job(self.samples, prompt.index, PlannedSample(tokens, self._plan), nbytes)

    def _text(self, job: Job, outcome: GeneratedText | SampleFailure, seconds: float) -> Completion | str:
        if isinstance(outcome, SampleFailure):
            return outcome.problem
        sample = completed_sample(job.planned.tokens.sample, outcome.text, self._sampling.answer_marker)
        return Completion(sample, outcome.finish_reason, outcome.tokens, job.waited, seconds)

    def _explain(self, text: Completion | str, problem: str) -> str:
        if isinstance(text, str):
            return problem
        kinds = {span.kind for span in text.sample.spans}
        marker = self._sampling.answer_marker
        lacks = f", with no answer behind a marker {marker!r}" if marker and "answer" not in kinds else ""
        return f"{problem}; the teacher wrote {text.tokens} tokens (finish_reason: {text.finish_reason}){lacks}"


def _options(sampling: SamplingParams) -> GenerateOptions:
    return GenerateOptions(
        sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.seed, tuple(sampling.stop)
    )
