"""The settings that must stay the same when a run resumes, and a description of those that differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from data.records import content_digest
from kvcore.config import parse
from kvcore.plan import CODED, CodecConfig, KVPlan
from student_trainer.config import TrainConfig
from student_trainer.kv_sources import KVSource

_NAMES: dict[tuple[str, ...], str] = {
    ("control",): "kv.control",
    ("data", "records"): "data.train: records",
    ("data", "formats"): "teachers: formats",
}


def run_identity(config: TrainConfig, records: int, sources: Mapping[str, KVSource]) -> dict[str, Any]:
    """What must not change when a run resumes. `kv.mode` may: online, offline and record give the same run.

    Args:
        config: of the run.
        records: number of training records.
        sources: the connected source of each teacher.
    """
    settings = config.model_dump(mode="json", include={"student", "align", "fuse", "loss", "optim"})
    run = config.run.model_dump(mode="json", include={"seed", "steps", "epochs", "curriculum_epochs", "global_batch"})
    teachers = {
        name: {
            "weights": source.info.weights_digest,
            "tokenizer": source.info.tokenizer_fingerprint,
            **_plan_identity(config.kv.codec, source.plan),
        }
        for name, source in sources.items()
    }
    weights = {teacher.name: teacher.weight for teacher in config.teachers}
    # The path alone does not identify the model: an earlier stage may have been trained again.
    settings["student"]["weights"] = [
        content_digest(path) for path in sorted(Path(config.student.path).glob("*.safetensors"))
    ]
    data = config.data.model_dump(
        mode="json", include={"columns", "format", "system_prompt", "sort_by_length", "steps", "drop_last_step"}
    )
    data |= {"records": records, "content": content_digest(config.data.train)}
    data["formats"] = [teacher.format or config.data.format for teacher in config.teachers]
    if config.self_teacher:
        # Only then, so that runs of versions without the setting can resume.
        settings["self_teacher"] = {"selection": config.kv.selection.model_dump(mode="json")}
    return settings | {
        "run": run,
        "teachers": teachers,
        "weights": weights,
        "control": config.kv.control,
        "data": data,
    }


def _plan_identity(codec: CodecConfig, plan: KVPlan) -> dict[str, Any]:
    """What a plan asks for. A map is fitted in the run itself, so it may differ; the settings that fit it may not."""
    asked = plan.without_map(codec.unmapped)
    identity = {"plan_digest": asked.digest(), "plan": asked.model_dump(mode="json")}
    if codec.name == CODED:
        settings = {"quality": codec.target_error, "bytes_per_token": codec.bytes_per_token}
        identity["plan_digest"] += f" {CODED} {settings} {codec.max_relative_error}"
        identity["plan"]["codec"] = codec.spec.model_dump(mode="json") | settings
    return identity


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How two identities differ, one line each. Empty if a run may resume."""
    found = [_in_words(path, old, new) for path, old, new in _changes((), _with_defaults(then, now), now)]
    return list(dict.fromkeys(found))


def _with_defaults(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """An identity in which a setting that did not exist yet has its default, with which a run does the same."""
    least = {"student": {"path": "-"}, "data": {"train": "-"}, "run": {"output_dir": "-", "steps": 1}}
    filled = dict(then)
    for name, defaults in parse(least, TrainConfig).model_dump(mode="json").items():
        if name in then and isinstance(defaults, dict):
            new = {key: value for key, value in cast("dict[str, Any]", defaults).items() if key in now[name]}
            filled[name] = new | then[name]
    return filled


def _changes(path: tuple[str, ...], then: object, now: object) -> Iterator[tuple[tuple[str, ...], object, object]]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        old, new = cast("Mapping[str, object]", then), cast("Mapping[str, object]", now)
        # Plans with the same digest ask for the same K/V; options that do not matter may differ.
        hidden = {"plan", "plan_digest"} if old.get("plan_digest") == new.get("plan_digest") else {"plan_digest"}
        for name in dict.fromkeys([*old, *new]):
            if "plan_digest" not in old or name not in hidden:
                yield from _changes((*path, name), old.get(name), new.get(name))
    elif then != now:
        yield path, then, now


def _in_words(path: tuple[str, ...], then: object, now: object) -> str:
    match path:
        case ("data", "content"):
            return "data.train: its content has changed"
        case ("student", "weights"):
            return "student.path: its weights have changed"
        case ("teachers", name):
            return f"teachers: '{name}' is {'new' if then is None else 'missing now'}"
        case ("teachers", name, "weights" | "tokenizer" as part):
            return f"teacher '{name}': its {part} changed"
        case ("self_teacher",):
            return f"self_teacher: {then is not None} then, {now is not None} now"
        case _:
            return f"{_setting(path)}: {then!r} then, {now!r} now"


def _setting(path: tuple[str, ...]) -> str:
    match path:
        case ("teachers", name, "plan", "layers"):
            return f"layers asked of teacher '{name}'"
        case ("teachers", _, "plan", *rest):
            return f"kv.{'.'.join(rest)}"
        case ("self_teacher", *rest):
            return f"kv.{'.'.join(rest)}"
        case ("weights", name):
            return f"teachers: weight of '{name}'"
        case _:
            return _NAMES.get(path, ".".join(path))
