"""Tests of `kvdistill inspect` on stores, extractions and alignments."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kvcore.errors import ConfigError, StoreError
from kvcore.plan import KVPlan
from kvcore.store.kv_store import KVStoreWriter
from kvcore.store.manifest import keep_map
from kvdistill.inspection import inspect
from tests.support.kv_maps import random_map
from tests.support.stores import SENT, fill
from tests.support.streams import INFO, PLAN

TOKENS = 9


def field(shown: str, name: str) -> str:
    (found,) = re.findall(rf"^{name}  +(.*)$", shown, re.MULTILINE)
    return found


def test_store_shows_teacher_plan_and_sizes(tmp_path: Path) -> None:
    shown = inspect(str(fill(tmp_path / "ada")))
    assert field(shown, "teacher") == "fake: 5 layers, 2 KV heads of 4"
    assert field(shown, "layers") == "3 of 5: 0, 2, 4"
    assert field(shown, "tokens") == "right keeps at most 3 of the reasoning, selected per head"
    assert field(shown, "codec") == "int8 in groups of 2"
    assert field(shown, "samples") == str(len(SENT))
    shards = list((tmp_path / "ada").glob("*.safetensors"))
    size = sum(path.stat().st_size for path in shards)
    assert field(shown, "on disk") == f"{size / 1000:.1f} kB in {len(shards)} shards"


def test_store_shows_the_map_of_its_plan(tmp_path: Path) -> None:
    kv_map = random_map((0, 2), INFO.kv_heads * INFO.head_dim)
    keep_map(tmp_path, kv_map)
    KVStoreWriter(tmp_path, INFO, KVPlan(layers=(0, 2), map=kv_map.named), "rank0").close()
    shown = inspect(str(tmp_path))
    assert field(shown, "map") == f"{kv_map.named.digest}, to 1 x 3"
    assert field(shown, "on disk") == "0.0 kB in 0 shards", "a map is no shard"


def test_store_shows_bytes_and_reduction(tmp_path: Path) -> None:
    shown = inspect(str(fill(tmp_path)))
    kv_bytes, slots = sum(kv.nbytes for kv in SENT), sum(kv.slots for kv in SENT)
    raw = 2 * 2 * INFO.layers * INFO.kv_heads * INFO.head_dim
    kept = f"{slots / len(SENT):.1f} of {TOKENS:.1f} tokens kept"
    assert field(shown, "per sample") == f"{kv_bytes // len(SENT):,} bytes of K/V, {kept}"
    assert field(shown, "per kept token").startswith(f"{kv_bytes // slots:,} bytes; {raw:,} in the teacher's own cache")
    assert field(shown, "reduction").startswith(f"{raw * TOKENS * len(SENT) / kv_bytes:.1f}x smaller")


def test_store_shows_mean_and_max_error_by_layer(tmp_path: Path) -> None:
    shown = inspect(str(fill(tmp_path)))
    for place, layer in enumerate(PLAN.layers):
        expected = [str(layer)]
        for kind in ("k", "v"):
            errors = [kv.relative_error[kind][place] for kv in SENT]
            expected += [f"{sum(errors) / len(errors):.5f}", f"{max(errors):.5f}"]
        assert expected in [line.split() for line in shown.splitlines()]


def test_stores_in_a_folder_are_shown_one_after_the_other(tmp_path: Path) -> None:
    for name in ("ben", "ada"):
        fill(tmp_path / name)
    shown = inspect(str(tmp_path))
    assert re.findall(r"^store +.*/(\w+)$", shown, re.MULTILINE) == ["ada", "ben"]


def test_a_store_without_samples_is_shown_as_empty(tmp_path: Path) -> None:
    assert field(inspect(str(fill(tmp_path, []))), "samples") == "0"


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    shard = min(fill(tmp_path).glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(StoreError, match=f"{shard.name}: truncated"):
        inspect(str(tmp_path))


def test_pt_file_is_described_from_its_report(tmp_path: Path) -> None:
    (tmp_path / "kv.pt").write_bytes(bytes(2_500_000))
    teacher = {"model": "a", "weights_digest": "ff", "layers": 5, "kv_heads": 2, "head_dim": 4}
    teacher["plan"] = PLAN.model_dump(mode="json")
    report = {"settings": {}, "samples": 9, "written": 7, "bytes": 1, "left_out": [], "teachers": {"ada": teacher}}
    with pytest.raises(ConfigError, match=r"kv\.report\.json is missing"):
        inspect(str(tmp_path / "kv.pt"))
    (tmp_path / "kv.report.json").write_text(json.dumps(report))
    shown = inspect(str(tmp_path / "kv.pt"))
    assert field(shown, "size") == "2.5 MB"
    assert field(shown, "samples").startswith("7 of 9; ")
    assert field(shown, "teacher") == "ada: 5 layers, 2 KV heads of 4"
    assert field(shown, "layers") == "3 of 5: 0, 2, 4"
    assert inspect(str(tmp_path)) == shown


def test_folder_of_an_extraction_into_a_store_shows_its_stores(tmp_path: Path) -> None:
    fill(tmp_path / "train_kv" / "ada")
    (tmp_path / "train_kv.report.json").write_text("{}")
    assert field(inspect(str(tmp_path)), "store") == str(tmp_path / "train_kv" / "ada")


def test_alignment_shows_explained_variance_by_student_layer(tmp_path: Path) -> None:
    report = {
        "direction": "to_student",
        "head_adapter": "ridge",
        "layer_strategy": "ratio",
        "teacher": {"layers": 3, "heads": 2, "head_dim": 16},
        "student": {"layers": 2, "heads": 1, "head_dim": 16},
        "coverage": {"teacher_slots": {"seen": 1440, "paired": 1439}},
        "explained_variance": {"k": [1.0, 0.5], "v": [0.25, None]},
        "explained_variance_shuffled": {"k": [], "v": []},
    }
    (tmp_path / "alignment.json").write_text(json.dumps({"teachers": {"ada": report}}))
    shown = inspect(str(tmp_path))
    assert field(shown, "geometry") == "3 layers, 2 KV heads of 16 to 2 layers, 1 KV heads of 16"
    assert field(shown, "teacher slots") == "1,439 of 1,440 paired"
    assert ["0", "1.000", "-", "0.250", "-"] in [line.split() for line in shown.splitlines()]
    assert ["1", "0.500", "-", "-", "-"] in [line.split() for line in shown.splitlines()]


@pytest.mark.parametrize("target", ["nowhere", "."])
def test_unknown_target_error_lists_what_can_be_shown(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="HOST:PORT of a server"):
        inspect(target)
