"""`kvdistill inspect`: describes a teacher server, a store, an extraction or a run's alignment as text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import add
from pathlib import Path
from typing import Any

from kvcore.endpoints import check_endpoint
from kvcore.errors import ConfigError, FieldError
from kvcore.monitoring.units import in_bytes
from kvcore.plan import KVPlan
from kvcore.store.journal import SampleEntry
from kvcore.store.kv_store import BYTE_ENDS, POSITIONS, SHARD_SUFFIX, TOKEN_IDS, KVStoreReader
from kvcore.store.manifest import MANIFEST_NAME
from kvdistill.columns import ENDPOINT, in_columns
from kvdistill.describe import describe, description_rows, raw_token_bytes

ALIGNMENT = "alignment.json"
# Ends the name of an extraction's report, which is beside the result.
REPORT_SUFFIX = ".report.json"
# If a plan has more layers, only their number is shown.
MAX_LISTED_LAYERS = 12


def inspect(target: str) -> str:
    """Describes `target`: HOST:PORT of a server, a store or a folder of stores, an extraction, or a run's folder.

    Raises:
        ConfigError: there is nothing to show at `target`.
        StoreError: a store is damaged.
        TeacherError: no teacher answers at this address.
    """
    path = Path(target)
    if not path.exists() and ENDPOINT.fullmatch(target):
        try:
            check_endpoint(target)
        except ValueError as error:
            raise FieldError("TARGET", f"{error}, got '{target}'") from error
        return in_columns([("teacher", target), *description_rows(describe(target))])
    found = list(_descriptions(path))
    if not found:
        raise ConfigError(
            f"{target}: not a store, .pt file of an extraction, {ALIGNMENT}, folder with one of these, or HOST:PORT of "
            "a server"
        )
    return "\n\n".join(found)


def _descriptions(path: Path) -> Iterator[str]:
    """Descriptions of all stores, extractions and alignments at a path."""
    if path.suffix == ".pt" and path.is_file():
        yield _extraction(path)
    for report in sorted(path.glob(f"*{REPORT_SUFFIX}")):
        name = report.name.removesuffix(REPORT_SUFFIX)
        if (path / f"{name}.pt").is_file():
            yield _extraction(path / f"{name}.pt")
        for manifest in sorted((path / name).glob(f"*/{MANIFEST_NAME}")):
            yield _store(manifest.parent)
    if path.name == ALIGNMENT and path.is_file():
        yield _alignment(path)
    for manifest in [*path.glob(MANIFEST_NAME), *sorted(path.glob(f"*/{MANIFEST_NAME}"))]:
        yield _store(manifest.parent)
    for alignment in [*path.glob(ALIGNMENT), *sorted(path.glob(f"*/{ALIGNMENT}"))]:
        yield _alignment(alignment)


@dataclass(slots=True)
class _Sums:
    """Totals of a store's journal. Errors are lists by layer, for K and V."""

    samples: int = 0
    kv_bytes: int = 0
    kept_tokens: int = 0
    text_tokens: int = 0
    error_sums: dict[str, list[float]] = field(default_factory=dict)
    largest_errors: dict[str, list[float]] = field(default_factory=dict)

    def add(self, entry: SampleEntry) -> None:
        self.samples += 1
        about = (POSITIONS, TOKEN_IDS, BYTE_ENDS)
        self.kv_bytes += sum(tensor.size for name, tensor in entry.tensors.items() if name not in about)
        self.kept_tokens += entry.tensors[POSITIONS].shape[-1]
        self.text_tokens += entry.tensors[TOKEN_IDS].shape[-1]
        for kind, errors in entry.relative_error.items():
            none = [0.0] * len(errors)
            sums, largest = self.error_sums.get(kind, none), self.largest_errors.get(kind, none)
            self.error_sums[kind] = list(map(add, sums, errors))
            self.largest_errors[kind] = list(map(max, largest, errors))


def _store(directory: Path) -> str:
    sums = _Sums()
    with KVStoreReader(directory) as reader:
        info, plan = reader.info, reader.plan
        for entry in reader.entries():
            sums.add(entry)
    shards = [path.stat().st_size for path in directory.glob(f"*{SHARD_SUFFIX}")]
    rows = [
        ("store", str(directory)),
        ("teacher", f"{info.model}: {info.layers} layers, {info.kv_heads} KV heads of {info.head_dim}"),
        ("weights", info.weights_digest),
        ("layers", plan_layers(plan, info.layers)),
        ("tokens", plan_tokens(plan)),
        ("codec", plan_codec(plan)),
        *([("map", f"{plan.map.digest}, to {plan.map.heads} x {plan.map.head_dim}")] if plan.map else []),
        ("samples", f"{sums.samples:,}"),
        ("on disk", f"{in_bytes(sum(shards))} in {len(shards)} shards"),
    ]
    if not sums.samples:
        return in_columns(rows)
    raw = raw_token_bytes(info.layers, info.kv_heads, info.head_dim)
    rows += [
        ("per sample", f"{sums.kv_bytes // sums.samples:,} bytes of K/V, {_mean_tokens(sums)}"),
        ("per kept token", f"{sums.kv_bytes // sums.kept_tokens:,} bytes; {raw:,} in the teacher's own cache (bf16)"),
        ("reduction", f"{raw * sums.text_tokens / sums.kv_bytes:.1f}x smaller than the full cache of these texts"),
    ]
    return f"{in_columns(rows)}\n\n{_errors(plan, sums)}"


def _mean_tokens(sums: _Sums) -> str:
    kept, text = sums.kept_tokens / sums.samples, sums.text_tokens / sums.samples
    return f"{kept:.1f} of {text:.1f} tokens kept"


def _errors(plan: KVPlan, sums: _Sums) -> str:
    """Relative error by layer, measured when the samples were encoded."""
    kinds = sorted(sums.error_sums)
    head = ["layer", *(f"{kind.upper()} error, {which}" for kind in kinds for which in ("mean", "max"))]
    rows = [head]
    for place, layer in enumerate(plan.layers):
        row = [str(layer)]
        for kind in kinds:
            row += [f"{sums.error_sums[kind][place] / sums.samples:.5f}", f"{sums.largest_errors[kind][place]:.5f}"]
        rows.append(row)
    return in_columns(rows, right=True)


def plan_layers(plan: KVPlan, of: int) -> str:
    """The layers that a plan requests."""
    if len(plan.layers) == of:
        return f"all {of}"
    named = ", ".join(map(str, plan.layers))
    return f"{len(plan.layers)} of {of}" + (f": {named}" if len(plan.layers) <= MAX_LISTED_LAYERS else "")


def plan_tokens(plan: KVPlan) -> str:
    """The tokens that a plan requests."""
    selection = plan.selection
    span = "the whole text" if selection.span == "all" else f"the {selection.span}"
    if selection.selector == "full":
        return f"all of {span}"
    return f"{selection.selector} keeps at most {selection.budget} of {span}, selected per {selection.scope}"


def plan_codec(plan: KVPlan) -> str:
    """How a plan encodes K/V."""
    codec = plan.codec
    groups = f" in groups of {codec.group_size}" if codec.name.startswith("int") else ""
    limit = "" if codec.max_relative_error is None else f", relative error at most {codec.max_relative_error:g}"
    return f"{codec.name}{groups}{limit}"


def _extraction(path: Path) -> str:
    """Describes a .pt file from its report: loading the file itself would need as much memory as its size."""
    report = path.with_name(f"{path.stem}{REPORT_SUFFIX}")
    if not report.is_file():
        raise ConfigError(f"{path}: its report {report.name} is missing; put it next to the file")
    content: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    rows = [
        ("file", str(path)),
        ("size", in_bytes(path.stat().st_size)),
        ("samples", f"{content['written']:,} of {content['samples']:,}; {report.name} lists the others"),
    ]
    for name, teacher in content["teachers"].items():
        plan = KVPlan.model_validate_json(json.dumps(teacher["plan"]))
        rows += [
            ("", ""),
            ("teacher", f"{name}: {_geometry(teacher, 'kv_heads')}"),
            ("weights", teacher["weights_digest"]),
            ("layers", plan_layers(plan, teacher["layers"])),
            ("tokens", plan_tokens(plan)),
            ("codec", plan_codec(plan)),
        ]
    return in_columns(rows)


def _geometry(side: Mapping[str, Any], heads: str = "heads") -> str:
    return f"{side['layers']} layers, {side[heads]} KV heads of {side['head_dim']}"


def _alignment(path: Path) -> str:
    teachers: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))["teachers"]
    return "\n\n".join(_one_alignment(path, name, report) for name, report in teachers.items())


def _one_alignment(path: Path, name: str, report: Mapping[str, Any]) -> str:
    rows = [
        ("alignment", f"teacher '{name}' in {path}"),
        ("geometry", f"{_geometry(report['teacher'])} to {_geometry(report['student'])}"),
        ("maps", f"layers {report['layer_strategy']}, heads {report['head_adapter']}, {report['direction']}"),
    ]
    for what, counts in (report["coverage"] or {}).items():
        rows.append((what.replace("_", " "), f"{counts['paired']:,} of {counts['seen']:,} paired"))
    return f"{in_columns(rows)}\n\n{_explained(report)}"


def _explained(report: Mapping[str, Any]) -> str:
    """Explained variance by student layer, next to the shuffled control."""
    own, other = report["explained_variance"], report["explained_variance_shuffled"]
    head = ["student layer", "K explained", "shuffled", "V explained", "shuffled"]
    rows = [
        [str(layer), *(_share(side[kind], layer) for kind in ("k", "v") for side in (own, other))]
        for layer in range(report["student"]["layers"])
    ]
    return in_columns([head, *rows], right=True)


def _share(values: Sequence[float | None], layer: int) -> str:
    value = values[layer] if layer < len(values) else None
    return "-" if value is None else f"{value:.3f}"
