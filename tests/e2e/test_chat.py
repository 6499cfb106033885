"""Tests of runs whose student and teachers read conversations in chat templates of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from data.records import load_records, write_records
from kvdistill import load_student
from tests.support.chat_templates import TINY_CHATML, TINY_LLAMA_3, with_template
from tests.support.servers import running_teacher
from tests.support.training import LOSSES, assert_same_losses, make_world, metrics, train

pytestmark = pytest.mark.slow


def test_conversations_are_recorded_and_replayed_across_templates(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    with_template(world.student, TINY_CHATML)
    with_template(world.teachers["ada"], TINY_LLAMA_3)
    for path in (world.train, world.val):
        records = [
            replace(
                record,
                prompt=f"Is {at} odd?\nYes.\n{record.prompt}",
                turns=(("user", f"Is {at} odd?"), ("assistant", "Yes."), ("user", record.prompt)),
            )
            if at % 2
            else record
            for at, record in enumerate(load_records(path))
        ]
        write_records(path, records)
    data = {"train": str(world.train), "val": str(world.val), "format": "chat", "system_prompt": "Be brief."}
    kv = {"mode": "record", "store": str(tmp_path / "store")}
    with (
        running_teacher(world.teachers["ada"], tmp_path / "ada.log") as ada,
        running_teacher(world.teachers["ben"], tmp_path / "ben.log") as ben,
    ):
        record = world.config("record", {}, data=data, kv=kv)
        # Ben has no chat template.
        record["teachers"] = [
            {"name": "ada", "endpoints": [ada.endpoint]},
            {"name": "ben", "endpoints": [ben.endpoint], "format": "plain"},
        ]
        (recorded,) = train([record], 2, tmp_path)
    nobody = [{"name": "ada"}, {"name": "ben", "format": "plain"}]
    offline = world.config("offline", {}, data=data, kv={**kv, "mode": "offline"}, teachers=nobody)
    (replayed,) = train([offline], 2, tmp_path)
    assert_same_losses(recorded, replayed, 0.0, (*LOSSES, "val/kv_loss", "val/task_metrics/accuracy"))
    assert set(metrics(recorded, "kv/missing_samples").values()) == {0}
    # Conversations are far longer than single questions; sorted, hardly any batch holds both.
    shares = metrics(recorded, "data/padding_share").values()
    assert len(shares) == 6
    assert sum(shares) / 6 < 0.1
    best = AutoTokenizer.from_pretrained(recorded / "best_model")
    assert best.eos_token == "</s>"
    assert best.chat_template == TINY_CHATML
    student = load_student(recorded / "best_model", device="cpu")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3+4?"}]
    assert student.generate("3+4?", 4) == student.generate(messages, 4) != student.generate("3+4?", 4, format="plain")
