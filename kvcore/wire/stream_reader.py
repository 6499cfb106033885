"""Reads the KV stream: checks every frame and assembles whole samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from kvcore.errors import ProtocolError
from kvcore.plan import CODED, KVPlan, SamplingParams
from kvcore.tensors.kv_map import KVMap
from kvcore.types import TENSORS, EncodedSampleKV, Sample, TeacherInfo
from kvcore.wire.completion import Completion, completed_sample
from kvcore.wire.frames import FAILURE_STATUSES, PROTOCOL_VERSION, unpack_frame
from kvcore.wire.packed_rows import has_positions, packed_sizes
from kvcore.wire.sample_rows import Group, RowLayout, store_rows
from kvcore.wire.sample_state import (
    UINT64_MAX,
    Incoming,
    SampleState,
    finite_number,
    seconds_of,
    timings_of,
    whole_number,
)
from kvcore.wire.shared_memory import OpenedSlots

# The longest generated text: as much as a server accepts in one request.
_MAX_COMPLETION_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class RefusedSample:
    """The teacher refused one sample; the other samples of the stream are not affected."""

    code: str
    message: str


Result = tuple[int, EncodedSampleKV | RefusedSample]


class StreamReader:
    """Reads one request's frames in the order in which they were sent.

    Token counts, slots, parts and shapes are checked against the plan and the teacher's description before memory is
    allocated for them. Samples of one stream may share memory: a sample's tensors are views into arrays of all samples
    that were sent together.

    Every record must repeat the key of the requested sample, so that K/V of another sample or plan are never accepted.

    `memory`: the shared memory that the request named; None if it named none.

    Args:
        request_id: as sent in the request.
        plan: as sent in the request; its layers and codec must be the teacher's.
        samples: as sent in the request, in that order.
        info: the teacher's answer to `Describe`.
        sampling: as sent in a request to `Generate`.
        kv_map: the plan's map.
    """

    def __init__(
        self,
        request_id: str,
        plan: KVPlan,
        samples: Sequence[Sample],
        info: TeacherInfo,
        sampling: SamplingParams | None = None,
        kv_map: KVMap | None = None,
    ) -> None:
        self.memory: OpenedSlots | None = None
        self._request_id = request_id
        self._plan = plan
        self._map = kv_map
        self._is_packed = plan.codec.name == CODED
        self._info = info
        self._states = [SampleState(sample, sample.key(info.weights_digest, plan, sampling)) for sample in samples]
        self._layouts: dict[int, RowLayout] = {}
        self._seq = 0
        self._ended = False

    def feed(self, data: bytes) -> list[Result]:
        """Reads the next frame and returns the samples that it completes, by their index in the request.

        Raises:
            ProtocolError: the frame is damaged, out of order, or does not answer the request. Samples that were
                returned before remain valid; the reader cannot be used any more.
        """
        header, body = unpack_frame(data, None if self.memory is None else self.memory.read)
        records = self._check_header(header, body)
        done: list[Result] = []
        at = 0
        for record in records:
            size = whole_number(record, "bytes", 0, len(body) - at) if "bytes" in record else 0
            self._read_record(record, body[at : at + size], done)
            at += size
        if at != len(body):
            raise ProtocolError(f"frame {self._seq}: {len(body) - at} bytes of the body belong to no record")
        self._seq += 1
        return done

    def finish(self) -> None:
        """Checks at the end of the stream that it is complete.

        Raises:
            ProtocolError: the stream's end record has not been read, so samples are missing.
        """
        if not self._ended:
            done = sum(state.done for state in self._states)
            raise ProtocolError(f"the stream ended early, after {done} of {len(self._states)} samples")

    def _check_header(self, header: dict[str, Any], body: memoryview) -> list[dict[str, Any]]:
        if header.get("v") != PROTOCOL_VERSION:
            raise ProtocolError(f"frame of protocol version {header.get('v')!r}, expected {PROTOCOL_VERSION}")
        if header.get("request") != self._request_id:
            raise ProtocolError(f"frame of request {header.get('request')!r}, expected {self._request_id!r}")
        seq = whole_number(header, "seq", 0, UINT64_MAX)
        if seq != self._seq:
            raise ProtocolError(f"got frame {seq}, expected frame {self._seq}")
        if self._ended:
            raise ProtocolError(f"frame {seq} came after the stream's end")
        if len(body) > self._info.max_frame_bytes:
            raise ProtocolError(f"frame {seq}: body of {len(body)} bytes, the limit is {self._info.max_frame_bytes}")
        if whole_number(header, "xxh3", 0, UINT64_MAX) != xxhash.xxh3_64_intdigest(body):
            raise ProtocolError(f"frame {seq}: the body does not match its xxh3")
        records = header.get("records")
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in cast("list[Any]", records)):
            raise ProtocolError(f"frame {seq}: 'records' is not a list of maps")
        return cast("list[dict[str, Any]]", records)

    def _read_record(self, record: dict[str, Any], chunk: memoryview, done: list[Result]) -> None:
        kind = record.get("kind")
        if self._ended:
            raise ProtocolError(f"record {kind!r} came after the stream's end")
        if kind == "layer":
            self._begin(record, self._open_layer(record), chunk)
        elif kind == "sample":
            self._begin(record, self._open_sample(record), chunk)
        elif kind == "more":
            self._continue(record, chunk)
        elif kind == "sample_end":
            done.append(self._end_sample(record))
        elif kind == "end":
            self._end(record)
        else:
            raise ProtocolError(f"unknown record kind {kind!r}")

    def _begin(self, record: dict[str, Any], incoming: Incoming, chunk: memoryview) -> None:
        size = whole_number(record, "size", len(chunk), UINT64_MAX) if "size" in record else len(chunk)
        if size != incoming.size:
            raise ProtocolError(f"record {record['kind']!r} has {size} bytes, its shapes need {incoming.size}")
        if len(chunk) == size:
            incoming.accept(chunk)
        elif len(incoming.states) == 1:
            incoming.chunks.append(chunk)
            incoming.missing = size - len(chunk)
            incoming.states[0].incoming = incoming
        else:
            raise ProtocolError("a layer record of several samples may not be split")

    def _continue(self, record: dict[str, Any], chunk: memoryview) -> None:
        state = self._states[whole_number(record, "index", 0, len(self._states) - 1)]
        incoming = state.incoming
        if incoming is None or not 0 < len(chunk) <= incoming.missing:
            raise ProtocolError(f"sample '{state.sample.id}': {len(chunk)} more bytes, which no record expects")
        incoming.chunks.append(chunk)
        incoming.missing -= len(chunk)
        if incoming.missing == 0:
            state.incoming = None
            incoming.accept(memoryview(b"".join(incoming.chunks)))

    def _open_sample(self, record: dict[str, Any]) -> Incoming:
        state = self._state(record.get("index"))
        if state.tokens:
            raise ProtocolError(f"sample '{state.sample.id}' was opened twice")
        state.check_identity(record)
        tokens = whole_number(record, "tokens", 1, self._info.max_sample_tokens)
        return Incoming(8 * tokens, [state], partial(self._accept_sample, state))

    def _accept_sample(self, state: SampleState, body: memoryview) -> None:
        token_ids_T, byte_ends_T = np.frombuffer(body, "<i4").reshape(2, -1).copy()
        asked = state.sample.token_ids
        if asked is not None and token_ids_T.tolist() != list(asked):
            raise ProtocolError(f"sample '{state.sample.id}' was read with other tokens than those sent")
        known_T = byte_ends_T[byte_ends_T >= 0]
        limit = UINT64_MAX if state.text_bytes is None else state.text_bytes
        if (
            byte_ends_T.min() < -1
            or token_ids_T.min() < 0
            or (known_T[1:] < known_T[:-1]).any()
            or (known_T > limit).any()
        ):
            raise ProtocolError(f"sample '{state.sample.id}': token ids or byte ends out of range")
        state.tokens = len(token_ids_T)
        state.token_ids_T, state.byte_ends_T = torch.as_tensor(token_ids_T), torch.as_tensor(byte_ends_T)
        state.hash.update(body)

    def _open_layer(self, record: dict[str, Any]) -> Incoming:
        indices = record.get("indices")
        if not isinstance(indices, list) or not indices:
            raise ProtocolError("layer record without sample indices")
        states = [self._state(index) for index in cast("list[Any]", indices)]
        if len(set(cast("list[int]", indices))) != len(states):
            raise ProtocolError("layer record names a sample twice")
        at = states[0].layers_done
        layer = record.get("layer")
        if at >= len(self._plan.layers) or layer != self._plan.layers[at] or any(s.layers_done != at for s in states):
            raise ProtocolError(f"layer {layer!r} of sample '{states[0].sample.id}' is not the next layer of the plan")
        layout = self._layout(record, min(state.tokens for state in states))
        if at and any(state.group.layout is not layout for state in states):
            raise ProtocolError(f"sample '{states[0].sample.id}': layer {layer} has another number of slots")
        errors = self._errors(record, len(states))
        if self._is_packed:
            head = layout.position_bytes if has_positions(self._plan, at) else 0
            sizes = packed_sizes(record, len(states), max(layout.sizes))
            accept = partial(self._accept_packed_layer, states, layout, errors, sizes)
            return Incoming(len(states) * head + sum(map(sum, sizes)), states, accept)
        accept = partial(self._accept_layer, states, layout, errors)
        return Incoming(len(states) * layout.row_bytes, states, accept)

    def _layout(self, record: dict[str, Any], tokens: int) -> RowLayout:
        if tokens == 0:
            raise ProtocolError("layer record of a sample that has not been opened")
        limit = min(tokens, self._plan.selection.budget or tokens)
        slots = whole_number(record, "slots", 1, limit)
        layout = self._layouts.get(slots)
        if layout is None:
            layout = self._layouts[slots] = RowLayout(self._plan, self._info, slots)
        if record.get("codec") != self._plan.codec.name or record.get("parts") != layout.described:
            raise ProtocolError(f"layer record has parts {record.get('parts')!r}, the plan needs {layout.described}")
        return layout

    def _errors(self, record: dict[str, Any], count: int) -> dict[str, list[float]]:
        errors = record.get("errors")
        if not isinstance(errors, dict) or set(cast("dict[Any, Any]", errors)) != set(TENSORS):
            raise ProtocolError(f"layer record has the errors {errors!r}, expected one list for each of {TENSORS}")
        for values in cast("dict[str, Any]", errors).values():
            if not isinstance(values, list) or len(cast("list[Any]", values)) != count:
                raise ProtocolError(f"layer record does not have one error for each of {count} samples")
            for value in cast("list[Any]", values):
                finite_number(value, "errors")
        return cast("dict[str, list[float]]", errors)

    def _accept_layer(
        self, states: list[SampleState], layout: RowLayout, errors: dict[str, list[float]], body: memoryview
    ) -> None:
        at = states[0].layers_done
        rows = np.frombuffer(body, np.uint8).reshape(len(states), layout.row_bytes)
        positions_BHM = layout.positions(rows)
        self._put(states, at, layout, rows, positions_BHM)
        for row, state in enumerate(states):
            state.add_layer(body[row * layout.row_bytes : (row + 1) * layout.row_bytes], errors, row)

    def _accept_packed_layer(
        self,
        states: list[SampleState],
        layout: RowLayout,
        errors: dict[str, list[float]],
        sizes: list[tuple[int, int]],
        body: memoryview,
    ) -> None:
        at = states[0].layers_done
        head = layout.position_bytes if has_positions(self._plan, at) else 0
        ends = np.cumsum([head + sum(each) for each in sizes]).tolist()
        rows = [body[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        if head:
            heads = np.stack([np.frombuffer(row[:head], np.uint8) for row in rows])
            self._put(states, at, layout, None, layout.positions(heads))
        for row, state in enumerate(states):
            state.packed.add(bytes(rows[row][head:]), sizes[row])
            state.add_layer(rows[row], errors, row)

    def _put(
        self,
        states: list[SampleState],
        at: int,
        layout: RowLayout,
        rows: NDArray[np.uint8] | None,
        positions_BHM: NDArray[np.int32],
    ) -> None:
        """Checks a layer's positions and keeps its rows."""
        tokens_B = np.array([state.tokens for state in states])
        if (positions_BHM[..., 0] < 0).any() or (positions_BHM[..., -1] >= tokens_B[:, None]).any():
            raise ProtocolError(f"layer {self._plan.layers[at]}: positions outside the sample")
        if (positions_BHM[..., 1:] <= positions_BHM[..., :-1]).any():
            raise ProtocolError(f"layer {self._plan.layers[at]}: positions are not ascending")
        if at == 0:
            shared = self._plan.selection.scope == "sample"
            group = Group(layout, len(states), len(self._plan.layers), shared_positions=shared, packed=self._is_packed)
            for row, state in enumerate(states):
                state.group, state.row = group, row
        store_rows([(state.group, state.row) for state in states], at, rows, positions_BHM)

    def _end_sample(self, record: dict[str, Any]) -> Result:
        index = record.get("index")
        state = self._state(index)
        state.check_key(record)
        status, message = record.get("status"), record.get("message")
        if status == "ok":
            result = self._complete(state, record)
        elif isinstance(status, str) and status in FAILURE_STATUSES and isinstance(message, str):
            result = RefusedSample(status, message)
        else:
            problem = f"ended with the status {status!r} and the message {message!r}, which is not a known status"
            raise ProtocolError(f"sample '{state.sample.id}' {problem}")
        state.close()
        return cast("int", index), result

    def _complete(self, state: SampleState, record: dict[str, Any]) -> EncodedSampleKV:
        sample, plan = state.sample, self._plan
        if state.layers_done != len(plan.layers):
            missing = list(plan.layers[state.layers_done :])
            raise ProtocolError(f"sample '{sample.id}' ended without its layers {missing}")
        sent = {"tokens": state.tokens, "slots": state.group.layout.slots, "layers": state.layers_done}
        for name, count in sent.items():
            if record.get(name) != count:
                raise ProtocolError(f"sample '{sample.id}' ended with {name} {record.get(name)!r}, but {count} arrived")
        if record.get("digest") != state.hash.intdigest():
            raise ProtocolError(f"sample '{sample.id}' does not match its digest")
        parts, positions = state.group.take(state.row)
        if self._is_packed:
            parts = state.packed.parts(whole_number(record, "codes_xxh3", 0, UINT64_MAX))
        return EncodedSampleKV(
            sample_id=sample.id,
            key=sample.key(self._info.weights_digest, plan),
            layers=plan.layers,
            codec=plan.codec,
            parts=parts,
            positions=positions,
            token_ids_T=state.token_ids_T,
            byte_ends_T=state.byte_ends_T,
            relative_error=state.errors,
            timings=timings_of(record.get("timings")),
            kv_map=self._map if self._is_packed else None,
        )

    def _end(self, record: dict[str, Any]) -> None:
        done = sum(state.done for state in self._states)
        if done != len(self._states) or record.get("samples") != done:
            raise ProtocolError(
                f"the stream ended after {done} of {len(self._states)} samples, naming {record.get('samples')!r}"
            )
        self._ended = True

    def _state(self, index: object) -> SampleState:
        """Returns the sample at an index from a record, after checking that a record for it may begin."""
        if type(index) is not int or not 0 <= index < len(self._states):
            raise ProtocolError(f"record of sample {index!r}, the request has {len(self._states)}")
        state = self._states[index]
        if state.done or state.incoming is not None:
            raise ProtocolError(f"sample '{state.sample.id}': a record after its end, or inside another record")
        return state


class CompletionReader(StreamReader):
    """Reads the answer to a `Generate` request: each sample's generated text, then its K/V.

    `completions` holds the texts received so far, by the sample's index in the request.

    Args:
        request_id, plan, info, kv_map: as for `StreamReader`.
        samples: the prompts as sent in the request.
        sampling: as sent in the request.
    """

    def __init__(
        self,
        request_id: str,
        plan: KVPlan,
        samples: Sequence[Sample],
        info: TeacherInfo,
        sampling: SamplingParams,
        kv_map: KVMap | None = None,
    ) -> None:
        super().__init__(request_id, plan, samples, info, sampling, kv_map)
        self.completions: dict[int, Completion] = {}
        self._sampling = sampling

    def _read_record(self, record: dict[str, Any], chunk: memoryview, done: list[Result]) -> None:
        if record.get("kind") == "written" and not self._ended:
            self._begin(record, self._open_completion(record, len(chunk)), chunk)
        else:
            super()._read_record(record, chunk, done)

    def _open_completion(self, record: dict[str, Any], first_bytes: int) -> Incoming:
        state = self._state(record.get("index"))
        index = cast("int", record["index"])
        if index in self.completions or state.tokens:
            raise ProtocolError(f"sample '{state.sample.id}' has two texts, or a text after it was opened")
        state.check_identity(record)
        size = whole_number(record, "size", first_bytes, _MAX_COMPLETION_BYTES) if "size" in record else first_bytes
        return Incoming(size, [state], partial(self._accept_completion, state, index, record))

    def _accept_completion(self, state: SampleState, index: int, record: dict[str, Any], body: memoryview) -> None:
        try:
            text = str(body, "utf-8")
        except UnicodeDecodeError as error:
            raise ProtocolError(f"sample '{state.sample.id}': the generated text is not UTF-8: {error}") from error
        sample = completed_sample(state.sample, text, self._sampling.answer_marker)
        spans = [[span.kind, span.start, span.end] for span in sample.spans]
        if record.get("spans") != spans:
            raise ProtocolError(f"sample '{sample.id}' has the spans {record.get('spans')!r}, expected {spans}")
        reason = record.get("finish_reason")
        if reason not in ("stop", "length"):
            raise ProtocolError(f"sample '{sample.id}' has the finish reason {reason!r}")
        tokens = whole_number(record, "tokens", 0, self._sampling.max_new_tokens)
        queue_s, generate_s = seconds_of(record.get("timings"), ("queue", "write"))
        self.completions[index] = Completion(sample, reason, tokens, queue_s, generate_s)
        state.sample = sample

    def _open_sample(self, record: dict[str, Any]) -> Incoming:
        incoming = super()._open_sample(record)
        if record["index"] not in self.completions:
            raise ProtocolError(f"sample '{incoming.states[0].sample.id}' was opened before its text")
        return incoming
