"""How a worker process hands encoded layers to the server: one authenticated socket each, bytes only.

The standard library's `multiprocessing.connection` frames messages and proves a shared key (HMAC); its pickling halves,
`send` and `recv`, are not used. A message is MessagePack: a header and the tensors' bytes.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from typing import Any, cast

import msgpack
import torch

from kvcore.errors import ProtocolError
from kvcore.types import Tensor

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 1 << 30
# Workers that may connect at the same moment.
BACKLOG = 128
CLOSING_SECONDS = 5.0
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.int32)
}

Address = str | tuple[str, int]


@dataclass(frozen=True, slots=True)
class LayerMessage:
    """One layer of some requests, of the KV heads of one worker.

    `tags` name the requests; every tensor's leading b follows them. `heads_from`: the worker's first head. `parts`,
    `positions`, `relative_error` and `norms` as in `LayerResult`. `encode_s`: seconds spent on it.
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
    """Requests whose K/V will not come, and why."""

    tags: list[str]
    problem: str


Message = LayerMessage | FailureMessage


def pack(message: Message) -> bytes:
    """A message as bytes.

    Raises:
        ProtocolError: more than `MAX_MESSAGE_BYTES`.
    """
    if isinstance(message, FailureMessage):
        return cast("bytes", msgpack.packb({"tags": message.tags, "problem": message.problem}))
    tensors = {**message.parts, "positions": message.positions}
    header = {
        "tags": message.tags,
        "layer": message.layer,
        "heads_from": message.heads_from,
        "heads": message.heads,
        "relative_error": message.relative_error,
        "norms": message.norms,
        "encode_s": message.encode_s,
        "tensors": [
            [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), _bytes_of(tensor)]
            for name, tensor in tensors.items()
        ],
    }
    payload = cast("bytes", msgpack.packb(header))
    if len(payload) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"one layer takes {len(payload)} bytes, and a message at most {MAX_MESSAGE_BYTES}")
    return payload


def unpack(payload: bytes) -> Message:
    """Undoes `pack`; tensors are copies.

    Raises:
        ProtocolError: it is no such message.
    """
    try:
        header = cast("dict[str, Any]", msgpack.unpackb(payload))
        if "problem" in header:
            return FailureMessage(header["tags"], header["problem"])
        tensors = {name: _tensor(data, dtype, shape) for name, dtype, shape, data in header.pop("tensors")}
        return LayerMessage(parts=tensors, positions=tensors.pop("positions"), **header)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, msgpack.UnpackException) as error:
        raise ProtocolError(f"a worker sent {len(payload)} bytes that are no message: {error}") from error


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _tensor(data: bytes, dtype: str, shape: list[int]) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=_DTYPES[dtype]).view(shape)


# ---------------------------------------------------------------------------------------------------- worker


@dataclass(frozen=True, slots=True)
class PendingMessage:
    """What waits to be sent: `make` is called by the sending thread; `failure` says what to send where it cannot be."""

    nbytes: int
    make: Callable[[], Iterable[Message]]
    tags: Sequence[str]


class MessageSender:
    """Sends a worker's parcels from a thread of its own, so that the model never waits for a reader.

    Args:
        address, key: of the server's `MessageReceiver`.
        max_bytes: the most that may wait. A parcel beyond it fails its requests, and theirs alone.
    """

    def __init__(self, address: Address, key: bytes, max_bytes: int) -> None:
        self._connection = Client(address, authkey=key)
        self._max_bytes = max_bytes
        self._waiting: deque[PendingMessage] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="kv outbox", daemon=True)
        self._thread.start()

    def put(self, parcel: PendingMessage) -> None:
        """Takes a parcel; never blocks, never raises."""
        with self._changed:
            if self._closed:
                return
            if self._bytes and self._bytes + parcel.nbytes > self._max_bytes:
                problem = f"{self._bytes} bytes wait to be sent, and the limit is {self._max_bytes}"
                failure = FailureMessage(list(parcel.tags), problem)
                parcel = PendingMessage(0, lambda: [failure], parcel.tags)
            self._bytes += parcel.nbytes
            self._waiting.append(parcel)
            self._changed.notify()

    def close(self) -> None:
        """Sends what waits, then ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=CLOSING_SECONDS)

    def _work(self) -> None:
        with self._connection:
            while (parcel := self._next()) is not None:
                try:
                    for payload in self._payloads(parcel):
                        self._connection.send_bytes(payload)
                except OSError as error:
                    log.warning("the server no longer takes keys and values: %s", error)
                    self._abandon()
                with self._changed:
                    self._bytes -= parcel.nbytes

    def _next(self) -> PendingMessage | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return self._waiting.popleft() if self._waiting else None

    def _payloads(self, parcel: PendingMessage) -> Iterator[bytes]:
        try:
            for message in parcel.make():
                yield pack(message)
        except Exception as error:  # the engine serves other requests; these fail by name
            log.exception("cannot encode keys and values")
            problem = f"the worker failed on them: {type(error).__name__}: {error}"
            yield pack(FailureMessage(list(parcel.tags), problem))

    def _abandon(self) -> None:
        with self._changed:
            self._closed = True
            self._waiting.clear()


# ---------------------------------------------------------------------------------------------------- server


class MessageReceiver:
    """Takes the messages of any number of workers.

    Args:
        address: a path for a local socket, or host and port where workers are on other nodes.
        key: what workers have to know.
        receive: called with each message, from a thread per worker.
        lost: called when a worker's connection has ended while this is open.
    """

    def __init__(
        self, address: Address, key: bytes, receive: Callable[[Message], None], lost: Callable[[], None]
    ) -> None:
        # Workers prove the key in threads of their own: one that says nothing keeps nobody waiting.
        self._listener = Listener(address, backlog=BACKLOG)
        self._address = cast("Address", self._listener.address)
        self._key = key
        self._receive = receive
        self._lost = lost
        self._closed = False
        threading.Thread(target=self._accept, name="kv inbox", daemon=True).start()

    @property
    def address(self) -> Address:
        """Where it listens."""
        return self._address

    def close(self) -> None:
        """Takes no more workers."""
        self._closed = True
        with contextlib.suppress(OSError):
            # A thread that waits for a connection is woken by one, not by the end of the socket.
            Client(self._address).close()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection = self._listener.accept()
            except OSError as error:
                if not self._closed:
                    log.warning("a worker's connection broke: %s", error)
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
