"""`kvdistill calibrate` against a real server, and its file in the client and in a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save
from typer.testing import CliRunner

from kvcore.errors import ConfigError, FieldError
from kvcore.tensors.kv_map import KVMap, read_coded_map
from kvcore.tensors.packed_sample import SIZES
from kvcore.types import EncodedSampleKV, Sample
from kvdistill import TeacherClient
from kvdistill.calibration import calibrate
from kvdistill.cli import app
from student_trainer.kv_sources.remote import RemoteSource
from tests.support.kv_maps import coded_map, random_map
from tests.support.mapped_runs import fetched, mapped_run
from tests.support.training import World

pytestmark = pytest.mark.usefixtures("one_rank")

TEXTS = [f"{number} + {number * 7 % 13} = {number + number * 7 % 13}, and so on for a while" for number in range(48)]
TO_TEACHER: dict[str, Any] = {"direction": "to_teacher"}


@pytest.fixture(scope="module")
def kv_maps(teachers: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("kv_maps")
    found: dict[str, Path] = {}
    for name, endpoints in teachers.items():
        found[name] = directory / f"{name}.kvmap"
        found[name].write_bytes(calibrate(endpoints, TEXTS, quality=0.05).kv_map.content())
    return found


def test_the_command_writes_a_file_and_shows_bytes_and_errors_that_fall_and_rise_with_the_quality(
    world: World, teachers: dict[str, list[str]], tmp_path: Path
) -> None:
    output = tmp_path / "ada.kvmap"
    arguments = [*teachers["ada"], "--data", str(world.train), "--output", str(output), "--quality", "0.3"]
    result = CliRunner().invoke(app, ["calibrate", *arguments])
    assert result.exit_code == 0, result.output
    rows = re.findall(r"^(0\.\d+) +([\d,]+) +([\d.]+)x +([\d.]+)% +([\d.]+)%$", result.output, re.MULTILINE)
    assert [float(row[0]) for row in rows] == [0.02, 0.05, 0.1, 0.2, 0.3, 0.4]
    sizes = [int(row[1].replace(",", "")) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    for quality, _, _, *errors in rows:
        assert all(float(error) / 100 == pytest.approx(float(quality), rel=0.6) for error in errors)
    assert read_coded_map(output).layers == (0, 1, 2, 3)
    assert "kv.codec.name to 'pca'" in result.output


def test_the_shown_bytes_are_those_that_a_client_receives(teachers: dict[str, list[str]], tmp_path: Path) -> None:
    found = calibrate(teachers["ada"], TEXTS, quality=0.05)
    found.write(tmp_path / "ada.kvmap")
    (shown,) = [each for each in found.figures if each.quality == 0.05]
    with TeacherClient(teachers["ada"]) as client:
        plan = client.plan(kv_map=tmp_path / "ada.kvmap")
    source = RemoteSource("ada", teachers["ada"][0], lambda _info: plan, kv_map=found.kv_map)
    source.connect()
    results = source.fetch([Sample(text, text=text) for text in TEXTS[::8]])
    source.close()
    received = [one for one in results if isinstance(one, EncodedSampleKV)]
    assert len(received) == len(results) == 6
    sent = sum(int(one.parts[SIZES].sum()) for one in received)
    assert shown.token_bytes == pytest.approx(sent / sum(one.slots for one in received), rel=0.01)
    assert found.measured_tokens == sum(one.slots for one in received)


def test_a_client_reads_with_a_kv_map(teachers: dict[str, list[str]], kv_maps: dict[str, Path]) -> None:
    with TeacherClient(teachers["ada"]) as client:
        exact = client.fetch(TEXTS[:4], layers=[1, 3], codec="raw")
        kv = client.fetch(TEXTS[:4], layers=[1, 3], kv_map=kv_maps["ada"])
        assert kv.plan.codec.name == "pca"
        for found, expected in ((kv.k_BLHMD, exact.k_BLHMD), (kv.v_BLHMD, exact.v_BLHMD)):
            assert found.shape == expected.shape
            varying = float((expected - expected.mean(dim=(0, 3), keepdim=True)).norm())
            assert float((found - expected).norm()) / varying < 0.1
    with TeacherClient(teachers["ada"]) as other, pytest.raises(FieldError, match="this client does not have"):
        other.fetch(TEXTS[:1], kv.plan)


def test_a_run_uses_kv_maps_instead_of_fitting(
    world: World, teachers: dict[str, list[str]], kv_maps: dict[str, Path]
) -> None:
    context = mapped_run(world, teachers, "calibrated", TO_TEACHER, kv_maps=kv_maps, codec={"name": "pca"})
    for name, path in kv_maps.items():
        source = context.sources[name]
        assert context.maps[name].named == read_coded_map(path).for_layers(source.plan.layers).named
        assert source.plan.map == context.maps[name].named
        assert len(fetched(context, name)) == 4
    context.close()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("other teacher", r"teachers: 'ada': kv_map.*features; this teacher has"),
        ("other heads", r"teachers: 'ada': kv_map.*map.whole: is \[4, 4\]; this teacher has 2 KV heads of 8"),
        ("few layers", r"teachers: 'ada': kv_map.*has no layer"),
        ("missing", r"cannot be read"),
        ("damaged", r"make it anew with kvdistill calibrate"),
        ("not coded", r"holds no KV map"),
        ("components", r"holds no KV map"),
    ],
)
def test_an_unusable_kv_map_is_refused_with_its_path(
    world: World,
    teachers: dict[str, list[str]],
    kv_maps: dict[str, Path],
    tmp_path: Path,
    given: str,
    problem: str,
) -> None:
    whole = read_coded_map(kv_maps["ada"])
    contents = {
        "other teacher": kv_maps["ben"].read_bytes(),
        "other heads": coded_map((0, 1, 2, 3), 4, 4).content(),
        "few layers": whole.for_layers([0]).content(),
        "damaged": kv_maps["ada"].read_bytes()[:-9],
        "not coded": random_map((0, 1, 2, 3), 16).content(),
        "components": coded_map((0, 1, 2, 3), 2, 8, restores=False).content(),
    }
    path = tmp_path / "ada.kvmap"
    if given in contents:
        path.write_bytes(contents[given])
    used = kv_maps | {"ada": path}
    with pytest.raises((ConfigError, FieldError), match=problem) as caught:
        mapped_run(world, teachers, "refused", TO_TEACHER, kv_maps=used, codec={"name": "pca"})
    assert str(path) in str(caught.value)


def test_a_store_or_a_checkpoint_with_another_map_refuses_a_given_one(
    world: World, teachers: dict[str, list[str]], kv_maps: dict[str, Path], tmp_path: Path
) -> None:
    store = {"mode": "record", "store": str(tmp_path / "store"), "codec": {"name": "pca"}}
    mapped_run(world, teachers, "recorded", TO_TEACHER, kv_maps=kv_maps, **store).close()
    mapped_run(world, teachers, "again", TO_TEACHER, kv_maps=kv_maps, **store).close()
    other = tmp_path / "other.kvmap"
    calibrate(teachers["ada"], TEXTS, quality=0.3).write(other)
    with pytest.raises(FieldError, match=r"'ada': kv_map: .*other.kvmap is another map than that of the store"):
        mapped_run(world, teachers, "other", TO_TEACHER, kv_maps=kv_maps | {"ada": other}, **store)


@pytest.mark.parametrize(
    ("align", "codec", "problem"),
    [
        (TO_TEACHER, {"name": "int8"}, "the kv_map of teacher 'ada' needs kv.codec.name 'pca'; got 'int8'"),
        (TO_TEACHER | {"basis_rank": 3}, {"name": "pca"}, "align.basis_rank"),
        (TO_TEACHER, {"name": "pca", "quality": 0.1}, "kv.codec.quality"),
        (TO_TEACHER, {"name": "pca", "bytes_per_token": 90.0}, "kv.codec.bytes_per_token"),
    ],
)
def test_settings_that_a_kv_map_excludes_are_refused(
    world: World,
    teachers: dict[str, list[str]],
    kv_maps: dict[str, Path],
    align: dict[str, Any],
    codec: dict[str, Any],
    problem: str,
) -> None:
    with pytest.raises((FieldError, ValueError), match=problem):
        mapped_run(world, teachers, "refused", align, kv_maps=kv_maps, codec=codec)


def test_bytes_per_token_are_met(teachers: dict[str, list[str]]) -> None:
    found = calibrate(teachers["ada"], TEXTS, bytes_per_token=30.0)
    chosen = [each for each in found.figures if abs(each.token_bytes - 30.0) < 3.0]
    assert chosen, found.figures
    with pytest.raises(FieldError, match="bytes_per_token: conflicts with quality"):
        calibrate(teachers["ada"], TEXTS, bytes_per_token=30.0, quality=0.1)


def test_too_few_texts_are_refused(teachers: dict[str, list[str]]) -> None:
    with pytest.raises(FieldError, match="at least 8"):
        calibrate(teachers["ada"], TEXTS[:7])


@pytest.mark.parametrize("name", ["k.weight", "v.step", "v.class", "whole"])
def test_a_coded_map_with_a_changed_tensor_is_refused_by_its_name(name: str) -> None:
    tensors = dict(coded_map((0, 2), 2, 4).tensors)
    tensors[name] = tensors[name] * 3 if name != "v.step" else -tensors[name]
    if name == "v.class":
        tensors[name] = tensors[name] * 0 + 200
    with pytest.raises(FieldError, match=rf"map\.{name}"):
        KVMap.read(save(tensors))
