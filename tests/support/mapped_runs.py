"""Runs of one rank whose two fake teachers apply maps to their K/V."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvcore.config import parse
from kvcore.types import EncodedSampleKV
from student_trainer.config import TrainConfig
from student_trainer.loop.training_context import TrainingContext, build_context
from teacher_server.config import ServeConfig
from teacher_server.engines import load_engine
from tests.support.server_in_thread import ServerInThread
from tests.support.training import Endpoints, World

MODELS = {"ada": "fake:layers=4,heads=2,dim=8", "ben": "fake:layers=3,heads=1,dim=6"}
SAMPLES = 48


def serving(model: str, **settings: Any) -> ServerInThread:
    """A ready server of a fake teacher, which the caller stops."""
    server = ServerInThread(load_engine, ServeConfig(model=model, engine="fake", drain_seconds=0.2, **settings))
    server.wait_ready()
    return server


@contextlib.contextmanager
def both_serving() -> Iterator[Endpoints]:
    """Servers of both teachers inside the block."""
    servers = {name: serving(model) for name, model in MODELS.items()}
    try:
        yield {name: [server.endpoint] for name, server in servers.items()}
    finally:
        for server in servers.values():
            server.stop()


def mapped_run(
    world: World,
    teachers: Endpoints,
    name: str,
    align: dict[str, Any],
    *,
    kv_maps: Mapping[str, Path] | None = None,
    **kv: Any,
) -> TrainingContext:
    """The parts of a run that selects three tokens per sample and sends them as fp32."""
    settings = {"codec": {"name": "raw"}, "selection": {"selector": "keydiff", "budget": 3}} | kv
    tree = world.config(name, teachers, align={"calibration_samples": SAMPLES} | align, kv=settings)
    if kv.get("mode") == "offline":
        tree["teachers"] = [{"name": teacher} for teacher in teachers]
    if kv_maps is not None:
        for teacher in tree["teachers"]:
            teacher["kv_map"] = str(kv_maps[teacher["name"]])
    return build_context(parse(tree, TrainConfig), 0, 1)


def fetched(context: TrainingContext, teacher: str) -> list[EncodedSampleKV]:
    """The K/V of four training samples, as a teacher sent them."""
    results = context.sources[teacher].fetch([record.sample() for record in context.train[:4]])
    assert all(isinstance(result, EncodedSampleKV) for result in results)
    return [result for result in results if isinstance(result, EncodedSampleKV)]
