"""Tests of the folder of demo models and data that other machines and containers mount."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.demo import prepare
from experiments.demo.pretrain import MODELS, Pretrained
from experiments.demo.run_demo import Demo


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces training: each call creates models in folders with the last name in the list."""
    names = ["first"]

    def models(demo: Demo) -> dict[str, Pretrained]:
        homes = {name: demo.paths.cache / f"{name}-{names[-1]}" / "model" for name in MODELS}
        for name, home in homes.items():
            home.mkdir(parents=True)
            (home / "config.json").write_text(f"{name} {names[-1]}", encoding="utf-8")
        return {name: Pretrained(home, 1.0) for name, home in homes.items()}

    monkeypatch.setattr(Demo, "models", models)
    return names


def test_links_to_models_survive_moving_the_folder(tmp_path, trained):
    prepare.main(tmp_path / "made")
    (tmp_path / "made").rename(tmp_path / "mounted")
    for name in MODELS:
        assert (tmp_path / "mounted" / name / "config.json").read_text("utf-8") == f"{name} first"


def test_link_points_to_the_newest_model(tmp_path, trained):
    prepare.main(tmp_path)
    trained.append("second")
    prepare.main(tmp_path)
    assert (tmp_path / "teacher_a" / "config.json").read_text("utf-8") == "teacher_a second"
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["cache", *sorted(MODELS)]
