"""Reads keys, values and text from teacher servers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

import torch

from kvcore.config import parse
from kvcore.errors import EndpointRefusedError, FieldError, TeacherError, TeacherRefusedError, TeacherUnavailableError
from kvcore.plan import CODED, KVPlan, SamplingParams, Scope, Selection, SelectionSpan
from kvcore.tensors.codec import decode_batch
from kvcore.tensors.kv_map import KVMap, read_coded_map
from kvcore.types import EncodedSampleKV, MissingKV, Sample, TeacherInfo, Tensor
from kvcore.wire.completion import Completion
from kvdistill.describe import every_layer
from student_trainer.config import TeacherConfig
from student_trainer.kv_sources.channel import Transport
from student_trainer.kv_sources.completions import CompletedSample, CompletionSource
from student_trainer.kv_sources.failover import FailoverSource
from student_trainer.kv_sources.remote import RemoteSource

# `Generate` always sends K/V with the text. This plan asks for as few as possible.
_SMALLEST_PLAN = KVPlan(layers=(0,), selection=Selection(selector="right", budget=1, span="all"))


class PlanSettings(TypedDict, total=False):
    """The arguments that `TeacherClient.fetch` takes instead of a plan; `TeacherClient.plan` describes them."""

    layers: Sequence[int] | None
    selector: str
    budget: int
    span: SelectionSpan
    scope: Scope
    codec: str
    kv_map: str | Path | None


@dataclass(frozen=True, slots=True, eq=False)
class TeacherKV:
    """A teacher's K/V for B texts, padded to the M tokens of the longest selection.

    `k_BLHMD`, `v_BLHMD`: content keys (before RoPE) and values, fp32, in the order of `plan.layers`; 0 in slots without
    a token. `mask_BM`: True where a slot holds a token. `positions_BLHM`: the index of each slot's token in the text's
    `token_ids`. `byte_ends_BLHM`: the byte of the text's UTF-8 at which that token ends. Both are int64, -1 in slots
    without a token, and [B,L,H,M], [B,L,1,M] or [B,1,1,M], depending on the plan's scope. `token_ids`: all tokens of
    each text.
    """

    plan: KVPlan
    k_BLHMD: Tensor
    v_BLHMD: Tensor
    mask_BM: Tensor
    positions_BLHM: Tensor
    byte_ends_BLHM: Tensor
    token_ids: tuple[tuple[int, ...], ...]


class TeacherClient:
    """A client of one teacher with one or several replicas. Connects at the first call. Not thread-safe.

    Args:
        endpoints: host:port of a `kvdistill serve`, or a list of replicas. If one fails, the next one is used.
        timeout_s: deadline of one request.
        patience_s: how long the teacher may be unreachable, or its queue full, before a call fails.
        tls_ca: PEM file with the servers' certificate, which enables TLS. Defaults to `$KVDISTILL_TLS_CA`.
        token_file: file with the token that the servers expect. Needs TLS. Defaults to `$KVDISTILL_TOKEN_FILE`.
        tls_cert: PEM file with this client's certificate, for servers that ask for one. Needs TLS. Defaults to
            `$KVDISTILL_TLS_CERT`. If any of these files is given, the variables are not used.
        tls_key: PEM file with the private key of `tls_cert`. Defaults to `$KVDISTILL_TLS_KEY`.

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
        tls_cert: str | Path | None = None,
        tls_key: str | Path | None = None,
    ) -> None:
        listed = [endpoints] if isinstance(endpoints, str) else list(endpoints)
        if not listed:
            raise FieldError("endpoints", "expected at least one server")
        self._endpoints = parse({"name": "teacher", "endpoints": listed}, TeacherConfig).endpoints
        self._timeout_s, self._patience_s = timeout_s, patience_s
        files = (tls_ca, token_file, tls_cert, tls_key)
        self._transport = Transport(*files) if any(file is not None for file in files) else None
        self._source: FailoverSource | None = None
        # The maps of the plans made here, by file, time of its last change, and layers.
        self._maps: dict[tuple[Path, int, tuple[int, ...]], KVMap] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections. The next call opens new ones."""
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
        kv_map: str | Path | None = None,
    ) -> KVPlan:
        """Makes a plan for this teacher.

        Args:
            layers: ascending; None for all layers.
            selector: how tokens are selected; one of `info.selectors`.
            budget: maximum number of tokens kept. Must be 0 for the selector `full`.
            span: part of the text from which tokens are selected. Use `all` for texts without spans.
            scope: whether each `head`, each `layer` or the whole `sample` selects its own tokens.
            codec: how K/V are encoded, such as `int8`, `bf16` or `raw` (exact); one of `info.codecs`.
            kv_map: file that `kvdistill calibrate` wrote for this teacher. It sets the codec `pca`.

        Raises:
            FieldError: a setting is unknown or out of range, or the map does not fit the teacher or a layer.
            ConfigError: the map cannot be read.
        """
        wanted = list(range(self.info.layers) if layers is None else layers)
        tree: dict[str, Any] = {"layers": wanted, "codec": {"name": codec}}
        tree["selection"] = {"selector": selector, "budget": budget, "span": span, "scope": scope}
        if kv_map is None:
            return parse(tree, KVPlan)
        chosen = self._coded_map(Path(kv_map), tuple(wanted))
        return parse(tree | {"codec": {"name": CODED}, "map": chosen.named.model_dump()}, KVPlan)

    def _coded_map(self, path: Path, layers: tuple[int, ...]) -> KVMap:
        """The map of a file for these layers, read once while the file stays as it is."""
        changed_at = path.stat().st_mtime_ns if path.is_file() else 0
        key = (path, changed_at, layers)
        if key not in self._maps:
            whole = read_coded_map(path)
            whole.check_teacher(self.info)
            self._maps = {other: one for other, one in self._maps.items() if other[0] != path or other[1] == changed_at}
            self._maps[key] = whole.for_layers(layers)
        return self._maps[key]

    def fetch(
        self, texts: Sequence[str | Sample], plan: KVPlan | None = None, **settings: Unpack[PlanSettings]
    ) -> TeacherKV:
        """The teacher's keys and values for texts.

        Args:
            texts: texts, or samples with spans.
            plan: the K/V to request.
            settings: the arguments of `plan()`, instead of a plan. By default all tokens of all layers.

        Raises:
            FieldError: `texts` is empty, two samples have the same id, or a setting is invalid.
            TeacherUnavailableError: no endpoint answers within `patience_s`.
            TeacherRefusedError: the teacher cannot serve this plan or one of the texts.
            ProtocolError: damaged bytes, again after a retry.
        """
        if plan is not None and settings:
            raise FieldError("plan", f"takes no further settings; remove {', '.join(settings)}")
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
        """The teacher's completions of prompts. `fetch([each.sample for each in completions])` returns their K/V.

        Args:
            prompts: texts.
            max_new_tokens: maximum number of tokens to generate, in the teacher's tokens.
            sampling: other fields of `SamplingParams`. Greedy decoding by default.

        Returns:
            for each prompt, prompt and generated text as a sample with spans, and why the generation ended.

        Raises:
            FieldError: `prompts` is empty, two samples have the same id, or `sampling` is invalid.
            TeacherUnavailableError: no endpoint answers.
            TeacherRefusedError: the teacher cannot generate text, or cannot serve a prompt.
            ProtocolError: damaged bytes, again after a retry.
        """
        params = parse({"max_new_tokens": max_new_tokens, **sampling}, SamplingParams)
        answers = self._completed(_samples(prompts), params)
        completions = [answer.completion for answer in answers if answer.completion is not None]
        if len(completions) < len(answers):
            reason = next(answer.kv for answer in answers if answer.completion is None)
            raise self._refused(f"no text for {len(answers) - len(completions)} of {len(answers)} prompts: {reason}")
        return completions

    def _completed(self, prompts: Sequence[Sample], params: SamplingParams) -> list[CompletedSample]:
        problems: list[str] = []
        failures: list[TeacherError] = []
        for endpoint in self._endpoints:
            arguments = (endpoint, lambda _info: _SMALLEST_PLAN, params, self._timeout_s, self._patience_s)
            try:
                with closing(CompletionSource(self._name, *arguments, self._transport)) as source:
                    source.connect()
                    return source.complete(prompts)
            except (TeacherUnavailableError, EndpointRefusedError) as error:
                failures.append(error)
                problems.append(f"{endpoint}: {error.problem}")
        refused = all(isinstance(error, EndpointRefusedError) for error in failures)
        raise (EndpointRefusedError if refused else TeacherUnavailableError)(self._name, "; ".join(problems))

    def _connected(self, plan: KVPlan | None) -> FailoverSource:
        """The open source if it has this plan (or any, if None), or else a new one in its place."""
        if self._source is not None and plan in (None, self._source.plan):
            return self._source
        self.close()
        plan_for = every_layer if plan is None else lambda _info: plan
        kv_map = None
        if plan is not None and plan.map is not None:
            kv_map = next((one for one in self._maps.values() if one.named == plan.map), None)
            if kv_map is None:
                raise FieldError("plan", "names a map that this client does not have; make it with `client.plan`")
        remotes = [
            RemoteSource(self._name, endpoint, plan_for, self._timeout_s, self._patience_s, self._transport, kv_map)
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
