"""Tests of the messages from workers to the server over real sockets: encoding, authentication, limits and failures."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcore.errors import ProtocolError
from kvcore.tensors.codec import PART_DTYPES
from teacher_server.engines.vllm import message_queue as handover
from teacher_server.engines.vllm.message_queue import (
    Address,
    FailureMessage,
    LayerMessage,
    Message,
    MessageReceiver,
    MessageSender,
    PendingMessage,
    pack,
    unpack,
)

KEY = secrets.token_bytes(32)
PLENTY = 1 << 24
DTYPES = PART_DTYPES
PATIENCE = 10.0


def layer(number: int = 0, tags: tuple[str, ...] = ("a", "b"), slots: int = 3) -> LayerMessage:
    generator = torch.Generator().manual_seed(number)
    # Not contiguous, like a slice of a larger tensor.
    parts = {
        str(dtype): torch.randint(0, 99, (len(tags), 2, 4, slots), generator=generator).to(dtype).transpose(2, 3)
        for dtype in DTYPES
    }
    positions = torch.arange(len(tags) * slots, dtype=torch.int32).view(len(tags), 1, slots)
    errors = {"k": [0.1, 1e-300][: len(tags)], "v": [0.0, 0.25][: len(tags)]}
    return LayerMessage(list(tags), number, 4, 2, parts, positions, errors, errors, 0.5)


def assert_equal(found: Message, expected: LayerMessage) -> None:
    assert isinstance(found, LayerMessage)
    for name in ("tags", "layer", "heads_from", "heads", "relative_error", "norms", "encode_s"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.parts.keys() == expected.parts.keys()
    for name, part in {**expected.parts, "positions": expected.positions}.items():
        have = found.positions if name == "positions" else found.parts[name]
        assert have.dtype == part.dtype
        assert torch.equal(have, part), name


def pending_of(*messages: Message, tags: tuple[str, ...] = ("a", "b"), nbytes: int = 100) -> PendingMessage:
    return PendingMessage(nbytes, lambda: messages, tags)


@pytest.fixture(params=["unix", "tcp"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Address:
    return str(tmp_path / "kv.sock") if request.param == "unix" else ("127.0.0.1", 0)


@pytest.fixture
def received() -> SimpleQueue[Message]:
    return SimpleQueue()


@pytest.fixture
def lost() -> threading.Event:
    return threading.Event()


@pytest.fixture
def receiver(address: Address, received: SimpleQueue[Message], lost: threading.Event) -> Iterator[MessageReceiver]:
    receiver = MessageReceiver(address, KEY, received.put, lost.set)
    yield receiver
    receiver.close()


@pytest.fixture
def senders() -> Iterator[Callable[..., MessageSender]]:
    made: list[MessageSender] = []

    def build(address: Address, max_bytes: int = PLENTY, key: bytes = KEY) -> MessageSender:
        made.append(MessageSender(address, key, max_bytes))
        return made[-1]

    yield build
    for sender in made:
        sender.close()


def eventually(is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.005)
    return is_so()


# ---------------------------------------------------------------------------------------------------- messages


def test_a_layer_message_round_trips_bit_for_bit() -> None:
    message = layer()
    message.parts["odd"] = torch.tensor([[float("nan"), -0.0, float("inf"), 1e-45]] * 2)
    found = unpack(pack(message))
    assert isinstance(found, LayerMessage)
    assert found.parts["odd"].view(torch.int32).tolist() == message.parts["odd"].view(torch.int32).tolist()
    del message.parts["odd"], found.parts["odd"]
    assert_equal(found, message)


def test_a_failure_message_round_trips() -> None:
    failure = FailureMessage(["a", "ö"], "no memory: 思考")
    assert unpack(pack(failure)) == failure


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["tags", "tensors", "x"]), inner),
    max_leaves=5,
)


@given(st.binary(max_size=40) | PLAIN.map(msgpack.packb))
def test_invalid_bytes_are_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"sent {len(payload)} bytes that are not a message"):
        unpack(payload)


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_truncated_message_is_refused(cut: int) -> None:
    with pytest.raises(ProtocolError):
        unpack(pack(layer())[:-cut])


@pytest.mark.parametrize("shape", [[2, 5], [7]])
def test_a_tensor_whose_size_differs_from_its_bytes_is_refused(shape: list[int]) -> None:
    header: Any = msgpack.unpackb(pack(layer()))
    header["tensors"][0][2] = shape
    with pytest.raises(ProtocolError):
        unpack(msgpack.packb(header))


# ---------------------------------------------------------------------------------------------------- connections


def test_messages_arrive_whole_and_in_order(
    receiver: MessageReceiver, received: SimpleQueue[Message], senders: Callable[..., MessageSender]
) -> None:
    sender = senders(receiver.address)
    # Larger than any socket buffer.
    messages = [layer(number, slots=2000 * number + 1) for number in range(20)]
    for message in messages:
        sender.put(pending_of(message, FailureMessage(["c"], str(message.layer))))
    for message in messages:
        assert_equal(received.get(timeout=PATIENCE), message)
        assert received.get(timeout=PATIENCE) == FailureMessage(["c"], str(message.layer))


def test_closing_the_sender_sends_the_waiting_messages(
    receiver: MessageReceiver, received: SimpleQueue[Message], senders: Callable[..., MessageSender]
) -> None:
    sender = senders(receiver.address)
    for number in range(5):
        sender.put(PendingMessage(1, lambda number=number: [time.sleep(0.02) or layer(number)], ("a", "b")))
    sender.close()
    for number in range(5):
        assert_equal(received.get(timeout=PATIENCE), layer(number))
    sender.put(pending_of(layer()))
    sender.close()
    with pytest.raises(Empty):
        received.get(timeout=0.05)


def test_many_workers_send_at_once(
    receiver: MessageReceiver, received: SimpleQueue[Message], senders: Callable[..., MessageSender]
) -> None:
    for rank in range(16):
        senders(receiver.address).put(pending_of(FailureMessage([str(rank)], "hello")))
    tags = {received.get(timeout=PATIENCE).tags[0] for _ in range(16)}
    assert tags == {str(rank) for rank in range(16)}


def test_a_worker_with_a_wrong_key_is_refused_and_others_continue(
    receiver: MessageReceiver, received: SimpleQueue[Message], senders: Callable[..., MessageSender]
) -> None:
    early = senders(receiver.address)
    with pytest.raises(AuthenticationError):
        senders(receiver.address, key=b"wrong")
    early.put(pending_of(layer(1)))
    assert_equal(received.get(timeout=PATIENCE), layer(1))
    senders(receiver.address).put(pending_of(layer(2)))
    assert_equal(received.get(timeout=PATIENCE), layer(2))


def test_a_worker_does_not_trust_a_server_without_the_key(address: Address) -> None:
    with Listener(address) as listener:
        threading.Thread(target=_accept_with, args=(listener, b"other"), daemon=True).start()
        with pytest.raises((AuthenticationError, EOFError)):
            MessageSender(listener.address, KEY, PLENTY)


def _accept_with(listener: Listener, key: bytes) -> None:
    with listener.accept() as connection, pytest.raises(AuthenticationError):
        handover.deliver_challenge(connection, key)


def test_a_silent_or_invalid_connection_does_not_block_workers(
    receiver: MessageReceiver, received: SimpleQueue[Message], senders: Callable[..., MessageSender]
) -> None:
    with Client(receiver.address) as silent, Client(receiver.address) as noisy, Client(receiver.address) as gone:
        noisy.send_bytes(b"GET / HTTP/1.1")
        gone.close()
        senders(receiver.address).put(pending_of(layer()))
        assert_equal(received.get(timeout=PATIENCE), layer())
        assert silent.poll(0)


@pytest.mark.parametrize("garbage", [b"", b"\xc1", msgpack.packb({"tags": ["a"]}), b"pickle"], ids=repr)
def test_an_invalid_message_closes_only_its_own_connection(
    garbage: bytes, receiver: MessageReceiver, received: SimpleQueue[Message], senders: Callable[..., MessageSender]
) -> None:
    other = senders(receiver.address)
    with Client(receiver.address, authkey=KEY) as broken:
        broken.send_bytes(garbage)
        with pytest.raises((EOFError, ConnectionResetError)):
            broken.recv_bytes()
    other.put(pending_of(layer()))
    assert_equal(received.get(timeout=PATIENCE), layer())


def test_a_closed_receiver_accepts_no_workers(receiver: MessageReceiver, senders: Callable[..., MessageSender]) -> None:
    receiver.close()
    receiver.close()
    with pytest.raises((OSError, EOFError)):
        senders(receiver.address)
    assert eventually(lambda: not any(thread.name == "kv receiver" for thread in threading.enumerate()))


# ---------------------------------------------------------------------------------------------------- failures


class SlowServer:
    """A server that accepts one worker and reads only what the test reads."""

    def __init__(self, address: Address) -> None:
        self._listener = Listener(address, authkey=KEY)
        self.address: Address = self._listener.address
        self._connections: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=lambda: self._connections.put(self._listener.accept()), daemon=True).start()

    def connection(self) -> Connection:
        return self._connections.get(timeout=PATIENCE)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def slow_server(address: Address) -> Iterator[SlowServer]:
    server = SlowServer(address)
    yield server
    server.close()


def large(tag: str) -> FailureMessage:
    """A message larger than a socket buffer."""
    return FailureMessage([tag], "x" * (8 << 20))


def test_only_messages_beyond_the_limit_fail(slow_server: SlowServer, senders: Callable[..., MessageSender]) -> None:
    sender, begun = senders(slow_server.address, max_bytes=1000), threading.Event()
    connection = slow_server.connection()
    sender.put(PendingMessage(600, lambda: (begun.set(), [large("sent")])[1], ("sent",)))
    assert begun.wait(PATIENCE)
    sender.put(pending_of(large("fits"), tags=("fits",), nbytes=400))
    started = time.monotonic()
    for number in range(100):
        sender.put(PendingMessage(1, _never, (f"too much {number}",)))
    assert time.monotonic() - started < 1.0, "put waits for nobody"
    found = [unpack(connection.recv_bytes()) for _ in range(102)]
    assert [message.tags for message in found] == [["sent"], ["fits"], *([f"too much {n}"] for n in range(100))]
    problems = {message.problem for message in found[2:] if isinstance(message, FailureMessage)}
    assert problems == {"1000 bytes wait to be sent, and the limit is 1000"}
    # Reading the messages frees space.
    sender.put(pending_of(layer(7), nbytes=1000))
    assert_equal(unpack(connection.recv_bytes()), layer(7))
    connection.close()


def _never() -> Iterable[Message]:
    raise AssertionError("what there is no room for is not made")


def test_a_message_larger_than_the_limit_is_sent_if_nothing_waits(
    receiver: MessageReceiver, received: SimpleQueue[Message], senders: Callable[..., MessageSender]
) -> None:
    senders(receiver.address, max_bytes=10).put(pending_of(layer(), nbytes=1000))
    assert_equal(received.get(timeout=PATIENCE), layer())


def test_a_worker_keeps_running_when_the_server_is_gone(
    slow_server: SlowServer, senders: Callable[..., MessageSender]
) -> None:
    sender = senders(slow_server.address)
    sender.put(pending_of(large("under way")))
    slow_server.connection().close()
    sender.put(pending_of(large("lost")))
    assert eventually(lambda: not any(thread.name == "kv sender" for thread in threading.enumerate()))
    started = time.monotonic()
    for _ in range(100):
        sender.put(PendingMessage(PLENTY, _never, ("a",)))
    sender.close()
    assert time.monotonic() - started < 1.0


@pytest.mark.parametrize("error", [ValueError, OSError, MemoryError])
def test_an_encoding_error_fails_its_requests_and_the_next_are_sent(
    error: type[Exception],
    receiver: MessageReceiver,
    received: SimpleQueue[Message],
    senders: Callable[..., MessageSender],
) -> None:
    def half() -> Iterator[Message]:
        yield layer(3)
        raise error("no room for codes")

    sender = senders(receiver.address)
    sender.put(PendingMessage(1, half, ("a", "b")))
    sender.put(pending_of(layer(4)))
    assert_equal(received.get(timeout=PATIENCE), layer(3))
    problem = f"the worker failed on them: {error.__name__}: no room for codes"
    assert received.get(timeout=PATIENCE) == FailureMessage(["a", "b"], problem)
    assert_equal(received.get(timeout=PATIENCE), layer(4))


def test_a_layer_larger_than_a_message_fails_and_the_next_are_sent(
    receiver: MessageReceiver,
    received: SimpleQueue[Message],
    senders: Callable[..., MessageSender],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handover, "MAX_MESSAGE_BYTES", 10_000)
    sender = senders(receiver.address)
    sender.put(pending_of(layer(slots=5000)))
    sender.put(pending_of(layer(2)))
    failure = received.get(timeout=PATIENCE)
    assert isinstance(failure, FailureMessage)
    assert failure.tags == ["a", "b"]
    assert "and a message at most 10000" in failure.problem
    assert_equal(received.get(timeout=PATIENCE), layer(2))


def test_a_message_larger_than_allowed_is_not_read(
    receiver: MessageReceiver, received: SimpleQueue[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "MAX_MESSAGE_BYTES", 10_000)
    with Client(receiver.address, authkey=KEY) as worker, pytest.raises((EOFError, OSError)):
        _ = worker.send_bytes(bytes(10_001)), worker.recv_bytes()
    assert received.empty()


def test_connecting_to_a_closed_port_raises() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(OSError, match="refused"):
        MessageSender(("127.0.0.1", port), KEY, PLENTY)


def test_lost_is_called_for_a_lost_worker_but_not_on_close(
    receiver: MessageReceiver, senders: Callable[..., MessageSender], lost: threading.Event
) -> None:
    sender = senders(receiver.address)
    assert not lost.is_set()
    sender.close()
    assert lost.wait(PATIENCE)
    lost.clear()
    senders(receiver.address)
    receiver.close()
    assert not lost.wait(0.2)
