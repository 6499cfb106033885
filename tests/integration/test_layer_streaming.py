"""Tests that a server sends a layer's K/V while a real model still computes later layers, for every scope that can."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from kvcore.plan import CodecSpec, KVPlan, Scope, Selection, Selector
from kvcore.types import Sample, Span
from kvcore.wire.frames import unpack_frame
from teacher_server.config import ServeConfig
from teacher_server.engines.hf import hf_engine
from tests.support.server_in_thread import ServerInThread
from tests.support.servers import TeacherClient
from tests.support.tiny_models import save_tiny_model, tiny_spec

LAYERS = 3
PARTS = ("3 + 4? ", "3 + 4 = 7, so 0; 0 x 2 = 0. ", "It is 0.")


class LastLayerGate:
    """Holds the model before its last layer once it is closed, until it is opened."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def wait(self, _module: nn.Module, _inputs: object) -> None:
        assert self._open.wait(30), "no layer has arrived, though all layers but the last are computed"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), tiny_spec("llama", layers=LAYERS))


def sample() -> Sample:
    middle, last = len(PARTS[0]), len(PARTS[0]) + len(PARTS[1])
    text = "".join(PARTS)
    spans = (Span("prompt", 0, middle), Span("reasoning", middle, last), Span("answer", last, len(text)))
    return Sample("s", text=text, spans=spans)


@pytest.mark.parametrize(
    ("selector", "scope"),
    [
        ("r_kv", "layer"),
        ("r_kv", "head"),
        ("r_kv_centred", "layer"),
        ("keydiff", "head"),
        ("right", "sample"),
        ("uniform", "sample"),
        ("random", "sample"),
        ("full", "sample"),
    ],
)
def test_the_first_layer_leaves_before_the_last_one_is_computed(selector: Selector, scope: Scope, model: Path) -> None:
    gate = LastLayerGate()

    def load(config: ServeConfig) -> hf_engine.HFEngine:
        engine = hf_engine.load(config)
        layers: Any = engine._base.layers
        layers[-1].register_forward_pre_hook(gate.wait)
        return engine

    selection = Selection(selector=selector, budget=0 if selector == "full" else 4, scope=scope)
    plan = KVPlan(layers=tuple(range(LAYERS)), selection=selection, codec=CodecSpec(name="int8"))
    server = ServerInThread(load, ServeConfig(model=str(model), device="cpu", dtype="fp32", drain_seconds=0.2))
    try:
        server.wait_ready()
        gate.close()
        with TeacherClient(server.endpoint) as client:
            arrived: list[int] = []
            for frame in client.call(plan, [sample()]):
                arrived += [record["layer"] for record in unpack_frame(frame)[0]["records"] if "layer" in record]
                if arrived:
                    assert arrived == list(range(len(arrived)))
                    gate.open()
        assert arrived == list(range(LAYERS))
    finally:
        gate.open()
        server.stop()
