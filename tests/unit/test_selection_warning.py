"""Tests of the trainer's warning about a selector that does badly on real text."""

from __future__ import annotations

import pytest

from kvcore.errors import ConfigError
from student_trainer.loop.training_context import build_context
from tests.support.training_parts import LATENTS, train_config


@pytest.mark.parametrize(
    ("selector", "rank", "warnings"), [("keydiff", 0, 1), ("keydiff", 1, 0), ("r_kv", 0, 0), ("right", 0, 0)]
)
def test_the_first_rank_warns_about_keydiff_before_it_loads_anything(
    selector: str, rank: int, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = train_config(kv={"selection": {"selector": selector, "budget": LATENTS}})
    with pytest.raises(ConfigError, match=r"none\.jsonl"):
        build_context(config, rank, 2)
    logged = [message for message in caplog.messages if "keeps few informative tokens of real text" in message]
    assert len(logged) == warnings
    assert all(message.startswith("kv.selection: selector 'keydiff'") for message in logged)
