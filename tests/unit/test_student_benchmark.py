"""`benchmarks.student` runs and counts forward passes as the model runs them."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import student
from benchmarks.student import TINY, Side


def test_the_last_line_has_the_figures_of_every_side(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--quick", "--rounds", "1", "--batch", "1", "2", "--passes", "1", "2", "--latents", "3"]
    monkeypatch.setattr("sys.argv", ["student", *flags])
    student.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    sides = [(one["batch"], one["reasoning"], one["passes"], one["latents"]) for one in found["sides"]]
    expected = [("written", 0, 0), ("latents", 1, 3), ("latents", 2, 3)]
    assert sides == [(batch, *side) for batch in (1, 2) for side in expected]
    for one in found["sides"]:
        assert 0 < one["thought_s"] <= one["whole_s"]
        assert one["answer_tokens_per_s"] == pytest.approx(one["batch"] * TINY.answer / one["whole_s"])
    assert {one["whole_times_faster"] for one in found["sides"] if one["reasoning"] == "written"} == {1.0}


def test_forward_passes_are_those_that_the_model_runs() -> None:
    lm = student.backbone(TINY, torch.device("cpu"), torch.float32)
    sides = [Side(2), Side(2, passes=3, latents=4)]
    figures = student.measure(lm, TINY, sides, rounds=1)
    for side, figure in zip(sides, figures, strict=True):
        passes = list[None]()
        hook = lm.model.register_forward_hook(lambda *_, passes=passes: passes.append(None))
        student.answers(lm, TINY, side)()
        hook.remove()
        assert len(passes) == figure["forward_passes"]
