"""Messages from vLLM workers to the server: encoded layers over one authenticated socket per worker.

`multiprocessing.connection` of the standard library frames the messages and checks a shared key (HMAC). Its `send` and
`recv`, which pickle, are not used. A message is MessagePack: a header and the tensors' bytes.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from typing import Any, cast

import msgpack
import torch

from kvcore.errors import ProtocolError
from kvcore.tensors.codec import PART_DTYPES
from kvcore.types import Tensor
from kvcore.wire.frames import dtype_name

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 1 << 30
# Workers that may connect at the same time.
BACKLOG = 128
CLOSING_SECONDS = 5.0
_DTYPES = {dtype_name(dtype): dtype for dtype in PART_DTYPES}

Address = str | tuple[str, int]


@dataclass(frozen=True, slots=True)
class LayerMessage:
    """One layer of some requests, with the KV heads of one worker.

    `tags`: the requests' names; the leading dimension b of every tensor follows them. `heads_from`: the worker's first
    head. `parts`, `positions`, `relative_error` and `norms`: as in `LayerResult`. `encode_s`: seconds of encoding.
    """

    tags: list[str]
    layer: int
    heads_from: int
    heads: int
    parts: dict[str, Tensor]
    positions: Tensor
    relative_error: dict[str, list[float]]
    norms: dict[str, list[float]]
    encode_s: float


@dataclass(frozen=True, slots=True)
class FailureMessage:
    """Requests that failed in the worker."""

    tags: list[str]
    problem: str


Message = LayerMessage | FailureMessage


def worker_failure(tags: Sequence[str], error: Exception) -> FailureMessage:
    """The message for requests that an unexpected error of the worker ends."""
    return FailureMessage(list(tags), f"the worker failed on them: {type(error).__name__}: {error}")


def pack(message: Message) -> bytes:
    """Serialise a message.

    Raises:
        ProtocolError: it has more than `MAX_MESSAGE_BYTES`.
    """
    header: dict[str, Any] = {entry.name: getattr(message, entry.name) for entry in fields(message)}
    if isinstance(message, LayerMessage):
        tensors = {**header.pop("parts"), "positions": header.pop("positions")}
        header["tensors"] = [
            [name, dtype_name(tensor.dtype), list(tensor.shape), _bytes_of(tensor)] for name, tensor in tensors.items()
        ]
    payload = cast("bytes", msgpack.packb(header))
    if len(payload) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"one layer takes {len(payload)} bytes, and a message at most {MAX_MESSAGE_BYTES}")
    return payload


def unpack(payload: bytes) -> Message:
    """Deserialise a message; tensors are copies.

    Raises:
        ProtocolError: the bytes are not a message.
    """
    try:
        header = cast("dict[str, Any]", msgpack.unpackb(payload))
        if "problem" in header:
            return FailureMessage(**header)
        tensors = {name: _tensor(data, dtype, shape) for name, dtype, shape, data in header.pop("tensors")}
        return LayerMessage(parts=tensors, positions=tensors.pop("positions"), **header)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, msgpack.UnpackException) as error:
        raise ProtocolError(f"a worker sent {len(payload)} bytes that are not a message: {error}") from error


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _tensor(data: bytes, dtype: str, shape: list[int]) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=_DTYPES[dtype]).view(shape)


# ---------------------------------------------------------------------------------------------------- worker


@dataclass(frozen=True, slots=True)
class PendingMessage:
    """Messages to send, which the sending thread makes. `nbytes`: the memory that they hold. `tags`: their requests."""

    nbytes: int
    make: Callable[[], Iterable[Message]]
    tags: Sequence[str]


class MessageSender:
    """Sends a worker's messages from its own thread, so that the model never waits for the server.

    Args:
        address, key: of the server's `MessageReceiver`.
        max_bytes: limit of the bytes that wait. Messages beyond it are replaced by a failure of their requests.
    """

    def __init__(self, address: Address, key: bytes, max_bytes: int) -> None:
        self._connection = Client(address, authkey=key)
        self._max_bytes = max_bytes
        self._waiting: deque[PendingMessage] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="kv sender", daemon=True)
        self._thread.start()

    def put(self, pending: PendingMessage) -> None:
        """Queue messages for sending; never blocks or raises."""
        with self._changed:
            if self._closed:
                return
            if self._bytes and self._bytes + pending.nbytes > self._max_bytes:
                problem = f"{self._bytes} bytes wait to be sent, and the limit is {self._max_bytes}"
                failure = FailureMessage(list(pending.tags), problem)
                pending = PendingMessage(0, lambda: [failure], pending.tags)
            self._bytes += pending.nbytes
            self._waiting.append(pending)
            self._changed.notify()

    def close(self) -> None:
        """Send the waiting messages, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=CLOSING_SECONDS)

    def _work(self) -> None:
        with self._connection:
            while (pending := self._next()) is not None:
                try:
                    for payload in self._payloads(pending):
                        self._connection.send_bytes(payload)
                except OSError as error:
                    log.warning("the connection to the server is broken: %s", error)
                    self._abandon()
                with self._changed:
                    self._bytes -= pending.nbytes

    def _next(self) -> PendingMessage | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return self._waiting.popleft() if self._waiting else None

    def _payloads(self, pending: PendingMessage) -> Iterator[bytes]:
        try:
            for message in pending.make():
                yield pack(message)
        except Exception as error:  # fails these requests; the engine serves the others
            log.exception("cannot encode keys and values")
            yield pack(worker_failure(pending.tags, error))

    def _abandon(self) -> None:
        with self._changed:
            self._closed = True
            self._waiting.clear()


# ---------------------------------------------------------------------------------------------------- server


class MessageReceiver:
    """Receives the messages of any number of workers.

    Args:
        address: a path for a local socket, or host and port for workers on other hosts.
        key: the shared key that workers must prove.
        receive: called with each message, from one thread per worker.
        lost: called when a worker's connection ends while the receiver is open.
    """

    def __init__(
        self, address: Address, key: bytes, receive: Callable[[Message], None], lost: Callable[[], None]
    ) -> None:
        # Each worker proves the key in its own thread, so that a silent one does not block the others.
        self._listener = Listener(address, backlog=BACKLOG)
        self.address = cast("Address", self._listener.address)
        self._key = key
        self._receive = receive
        self._lost = lost
        self._closed = False
        threading.Thread(target=self._accept, name="kv receiver", daemon=True).start()

    def close(self) -> None:
        """Stop accepting workers."""
        self._closed = True
        with contextlib.suppress(OSError):
            # Closing the socket does not wake a thread that waits in accept(); a connection does.
            Client(self.address).close()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection = self._listener.accept()
            except OSError as error:
                if not self._closed:
                    log.warning("cannot accept a worker's connection: %s", error)
            else:
                threading.Thread(target=self._serve, args=(connection,), name="kv reader", daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        with connection:
            try:
                deliver_challenge(connection, self._key)
                answer_challenge(connection, self._key)
            except (AuthenticationError, EOFError, OSError) as error:
                if not self._closed:
                    log.warning("refused a worker: %s", error)
                return
            self._read(connection)

    def _read(self, connection: Connection) -> None:
        try:
            while True:
                self._receive(unpack(connection.recv_bytes(MAX_MESSAGE_BYTES)))
        except ProtocolError:
            log.exception("closing the connection of a worker")
        except (EOFError, OSError):
            log.info("a worker ended its connection")
        if not self._closed:
            self._lost()
