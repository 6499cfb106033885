"""Keys and values of a teacher server, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

import torch

from kvcore.config import parse
from kvcore.errors import FieldError, TeacherRefusedError, TeacherUnavailableError
from kvcore.plan import KVPlan, SamplingParams, Scope, Selection, SelectionSpan
from kvcore.tensors.codec import decode_batch
from kvcore.types import EncodedSampleKV, MissingKV, Sample, TeacherInfo, Tensor
from kvcore.wire.completion import Completion
from kvdistill.describe import every_layer
from student_trainer.config import TeacherConfig
from student_trainer.kv_sources.channel import Transport
from student_trainer.kv_sources.completions import CompletedSample, CompletionSource
from student_trainer.kv_sources.failover import FailoverSource
from student_trainer.kv_sources.remote import RemoteSource

# A teacher that writes sends K/V with its text; these are the fewest.
_TEXT_ALONE = KVPlan(layers=(0,), selection=Selection(selector="right", budget=1, span="all"), values=False)


class PlanSettings(TypedDict, total=False):
    """What `TeacherClient.fetch` takes in place of a plan; see `TeacherClient.plan`."""

    layers: Sequence[int] | None
    selector: str
    budget: int
    span: SelectionSpan
    scope: Scope
    codec: str


@dataclass(frozen=True, slots=True, eq=False)
class TeacherKV:
    """What a teacher computed for B texts, padded to the M tokens of the longest selection.

    `k_BLHMD`, `v_BLHMD`: content keys (before RoPE) and values, fp32, in the order of `plan.layers`; None where the
    plan leaves them out, 0 where no token was selected. `mask_BM`: True where a slot holds a token. `positions_BLHM`:
    each slot's token, an index into that text's `token_ids`; `byte_ends_BLHM`: the byte of the text's UTF-8 at which
    the token ends; both int64 with -1 in empty slots, [B,L,H,M], [B,L,1,M] or [B,1,1,M] by the plan's scope.
    `token_ids`: all tokens of each text.
    """

    plan: KVPlan
    k_BLHMD: Tensor | None
    v_BLHMD: Tensor | None
    mask_BM: Tensor
    positions_BLHM: Tensor
    byte_ends_BLHM: Tensor
    token_ids: tuple[tuple[int, ...], ...]


class TeacherClient:
    """One teacher, behind one server or several replicas. Connects when it is first asked; for one thread.

    Args:
        endpoints: host:port of a `kvdistill serve`, or a list of replicas: when one fails, the next is asked.
        timeout_s: deadline of one request.
        patience_s: how long the teacher may be unreachable, or full, before a call gives up.
        tls_ca: PEM file with the servers' certificate: speak TLS; by default `$KVDISTILL_TLS_CA`.
        token_file: file with the token that the servers expect; by default `$KVDISTILL_TOKEN_FILE`. Needs TLS.

    Raises:
        FieldError: an endpoint is not host:port.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str],
        *,
        timeout_s: float = 120.0,
        patience_s: float = 30.0,
        tls_ca: str | Path | None = None,
        token_file: str | Path | None = None,
    ) -> None:
        listed = [endpoints] if isinstance(endpoints, str) else list(endpoints)
        if not listed:
            raise FieldError("endpoints", "names no server")
        self._endpoints = parse({"name": "teacher", "endpoints": listed}, TeacherConfig).endpoints
        self._timeout_s, self._patience_s = timeout_s, patience_s
        given = tls_ca is not None or token_file is not None
        self._transport = Transport(tls_ca, token_file) if given else None
        self._source: FailoverSource | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connections. The next call makes new ones."""
        if self._source is not None:
            self._source.close()
            self._source = None

    @property
    def info(self) -> TeacherInfo:
        """The teacher's model, geometry, limits, selectors and codecs.

        Raises:
            TeacherUnavailableError: no endpoint answers.
            TeacherMismatchError: the endpoints serve different teachers.
        """
        return self._connected(None).info

    def plan(
        self,
        *,
        layers: Sequence[int] | None = None,
        selector: str = "full",
        budget: int = 0,
        span: SelectionSpan = "all",
        scope: Scope = "sample",
        codec: str = "int8",
    ) -> KVPlan:
        """A plan for this teacher.

        Args:
            layers: ascending; None for all layers.
            selector: how tokens are chosen; `info.selectors` lists what the teacher offers.
            budget: the most tokens kept, 0 for the selector `full`.
            span: which part of a sample is chosen from; texts without spans have `all` alone.
            scope: who chooses: each `head`, each `layer`, or the whole `sample`.
            codec: how K/V travel: `int8`, `bf16` or `raw` (exact); `info.codecs` lists what the teacher offers.

        Raises:
            FieldError: a setting that is unknown or out of range.
        """
        wanted = range(self.info.layers) if layers is None else layers
        selection = {"selector": selector, "budget": budget, "span": span, "scope": scope}
        return parse({"layers": list(wanted), "selection": selection, "codec": {"name": codec}}, KVPlan)

    def fetch(
        self, texts: Sequence[str | Sample], plan: KVPlan | None = None, **settings: Unpack[PlanSettings]
    ) -> TeacherKV:
        """The teacher's keys and values for texts.

        Args:
            texts: texts, or samples with spans.
            plan: what to ask for.
            settings: in place of a plan, what `plan()` takes: all tokens of all layers by default.

        Raises:
            FieldError: `texts` is empty, two samples share an id, or a setting cannot be used.
            TeacherUnavailableError: no endpoint answers within `patience_s`.
            TeacherRefusedError: the teacher cannot serve this plan, or one of the texts.
            ProtocolError: damaged bytes, again after a retry.
        """
        if plan is not None and settings:
            raise FieldError("plan", f"a plan says it all; leave out {', '.join(settings)}")
        samples = _samples(texts)
        source = self._connected(self.plan(**settings) if plan is None else plan)
        results = source.fetch(samples)
        missing = [result for result in results if isinstance(result, MissingKV)]
        if missing:
            first = missing[0]
            counts = f"no K/V for {len(missing)} of {len(results)} texts"
            raise self._refused(f"{counts}; the first is '{first.sample_id}': {first.reason}")
        return _decoded([result for result in results if isinstance(result, EncodedSampleKV)], source.plan)

    def generate(self, prompts: Sequence[str | Sample], max_new_tokens: int, **sampling: Any) -> list[Completion]:
        """Has the teacher continue prompts. `fetch([each.sample for each in completions])` gives the K/V.

        Args:
            prompts: texts.
            max_new_tokens: the longest continuation, in the teacher's tokens.
            sampling: further fields of `SamplingParams`; greedy by default.

        Returns:
            for each prompt the whole text as a sample with spans, and why it ends there.

        Raises:
            FieldError: `prompts` is empty, two samples share an id, or `sampling` cannot be used.
            TeacherUnavailableError: no endpoint answers.
            TeacherRefusedError: the teacher does not generate, or cannot serve a prompt.
            ProtocolError: damaged bytes, again after a retry.
        """
        params = parse({"max_new_tokens": max_new_tokens, **sampling}, SamplingParams)
        answers = self._written(_samples(prompts), params)
        completions = [answer.written for answer in answers if answer.written is not None]
        if len(completions) < len(answers):
            reason = next(answer.kv for answer in answers if answer.written is None)
            raise self._refused(f"no text for {len(answers) - len(completions)} of {len(answers)} prompts: {reason}")
        return completions

    def _written(self, prompts: Sequence[Sample], params: SamplingParams) -> list[CompletedSample]:
        problems: list[str] = []
        for endpoint in self._endpoints:
            arguments = (endpoint, lambda _info: _TEXT_ALONE, params, self._timeout_s, self._patience_s)
            try:
                with closing(CompletionSource(self._name, *arguments, self._transport)) as source:
                    source.connect()
                    return source.write(prompts)
            except TeacherUnavailableError as error:
                problems.append(f"{endpoint}: {error.problem}")
        raise TeacherUnavailableError(self._name, "; ".join(problems))

    def _connected(self, plan: KVPlan | None) -> FailoverSource:
        """The source for this plan, or for any; one at a time is open."""
        if self._source is not None and plan in (None, self._source.plan):
            return self._source
        self.close()
        plan_for = every_layer if plan is None else lambda _info: plan
        remotes = [
            RemoteSource(self._name, endpoint, plan_for, self._timeout_s, self._patience_s, self._transport)
            for endpoint in self._endpoints
        ]
        source = FailoverSource(self._name, remotes, self._patience_s)
        try:
            source.connect()
        except BaseException:
            source.close()
            raise
        self._source = source
        return source

    @property
    def _name(self) -> str:
        return ", ".join(self._endpoints)

    def _refused(self, problem: str) -> TeacherRefusedError:
        return TeacherRefusedError(self._name, problem)


def _samples(texts: Sequence[str | Sample]) -> list[Sample]:
    if isinstance(texts, str) or not texts:
        raise FieldError("texts", "must be a list of at least one text or sample")
    samples = [Sample(f"text{index}", text=one) if isinstance(one, str) else one for index, one in enumerate(texts)]
    by_id: dict[str, Sample] = {}
    for sample in samples:
        if by_id.setdefault(sample.id, sample) != sample:
            raise FieldError("texts", f"two different samples have the id '{sample.id}'")
    return samples


def _decoded(samples: Sequence[EncodedSampleKV], plan: KVPlan) -> TeacherKV:
    kv = decode_batch(samples)
    positions_BLHM = torch.full_like(kv.byte_ends_BLHM, -1)
    for row, sample in enumerate(samples):
        positions_BLHM[row, ..., : sample.slots] = sample.positions
    token_ids = tuple(tuple(map(int, sample.token_ids_T)) for sample in samples)
    return TeacherKV(plan, kv.k_BLHMD, kv.v_BLHMD, kv.mask_BM, positions_BLHM, kv.byte_ends_BLHM, token_ids)
