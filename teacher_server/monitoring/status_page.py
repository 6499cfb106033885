"""The HTML page of a teacher server: readiness, load, open requests, callers, errors, teacher and limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

from kvcore.monitoring.charts import Chart, Points, chart_block
from kvcore.monitoring.html_page import heading, paragraphs, stack
from kvcore.monitoring.live_page import facts, live_page, state, tiles
from kvcore.monitoring.units import in_bytes, in_time

_LINKS = ("/info", "/metrics", "/healthz", "/readyz")
_CONNECTED = ("from", "request", "samples", "tokens", "codec", "sent", "for")
_CALLED = ("from", "requests", "samples", "sent", "last")
_FAILED = ("last", "times", "status", "problem", "latest from")


def render_page(info: Mapping[str, Any], history: Mapping[str, Points]) -> str:
    """Render the page from `ServerState.describe()` and `LoadHistory.curves()`; every value is escaped."""
    readiness = "Ready" if info["ready"] else f"Not ready: {info['not_ready_reason']}"
    return live_page(
        f"{info['name']} - kvdistill teacher",
        (
            heading(info["name"], 1),
            paragraphs([_geometry(info["teacher"])], "soft") if info["teacher"] else "",
            state(f"{readiness}, up for {in_time(info['uptime_seconds'])}", good=info["ready"]),
            tiles(_figures(info)),
            chart_block(_charts(history), time=True),
            heading("Open requests"),
            _table(_CONNECTED, _connected(info["connections"]), "No request is open."),
            heading("Callers in the last minute"),
            _table(_CALLED, _called(info["callers"]), "No calls."),
            heading("Recent errors"),
            _table(_FAILED, _failed(info["recent_errors"]), "No errors since the start."),
            heading("Teacher"),
            facts({"path": info["model_path"], **_named(info["teacher"] or {})}),
            "" if info["teacher"] else paragraphs(["Not loaded."]),
            heading("Limits"),
            facts(_named({**info["limits"], "grpc_port": info["grpc_port"], "http_port": info["http_port"]})),
        ),
        _LINKS,
    )


def _geometry(teacher: Mapping[str, Any]) -> str:
    shape = f"{teacher['layers']} layers of {teacher['kv_heads']} KV heads of {teacher['head_dim']}"
    return f"{teacher['model']}: {shape}, {teacher['dtype']}, engine {teacher['engine']}"


def _figures(info: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    load, limits, flow = info["load"], info["limits"], info["throughput"]
    period = f"over the last {flow['seconds']:.0f} s" if flow["seconds"] else "not measured yet"
    return [
        ("tokens/s", f"{flow['tokens_per_second']:,.0f}", period),
        ("sent/s", in_bytes(flow["bytes_per_second"]), period),
        ("requests open", f"{load['open_streams']}", f"of at most {limits['max_streams']}"),
        ("samples waiting", f"{load['queued_samples']:,}", "for the model"),
        ("tokens queued", f"{load['queued_tokens']:,}", f"of at most {limits['max_queued_tokens']:,}"),
    ]


def _charts(history: Mapping[str, Points]) -> list[Chart]:
    megabytes = [(time, value / 1e6) for time, value in history["bytes_per_second"]]
    return [
        Chart("Tokens per second", {"tokens/s": history["tokens_per_second"]}),
        Chart("Sent per second", {"sent": megabytes}, "MB/s"),
        Chart("Open requests", {"open": history["open_requests"]}),
        Chart("Queued tokens", {"queued": history["queued_tokens"]}),
    ]


def _table(headings: Sequence[str], rows: Sequence[Sequence[object]], if_empty: str) -> str:
    return stack(headings, rows) if rows else paragraphs([if_empty])


def _connected(connections: Sequence[Mapping[str, Any]]) -> list[tuple[object, ...]]:
    return [
        (
            _peer(one["peer"]),
            one["request_id"] or one["method"],
            one["samples"],
            f"{one['tokens']:,}",
            one["codec"] or "-",
            in_bytes(one["sent_bytes"]),
            in_time(one["seconds"]),
        )
        for one in connections
    ]


def _called(callers: Sequence[Mapping[str, Any]]) -> list[tuple[object, ...]]:
    return [
        (
            _peer(one["peer"]),
            f"{one['requests']:,}",
            f"{one['samples']:,}",
            in_bytes(one["sent_bytes"]),
            f"{in_time(one['seconds'])} ago",
        )
        for one in callers
    ]


def _failed(problems: Sequence[Mapping[str, Any]]) -> list[tuple[object, ...]]:
    return [
        (_ago(one["time"]), one["count"], f"{one['code']} ({one['method']})", one["problem"], _peer(one["peer"]))
        for one in problems
    ]


def _ago(time: str) -> str:
    seconds = (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()
    return f"{in_time(max(seconds, 0.0))} ago"


def _peer(peer: str) -> str:
    """A peer's address without gRPC's `ipv4:` or `ipv6:`; gRPC percent-encodes the brackets of IPv6."""
    return unquote(peer).removeprefix("ipv4:").removeprefix("ipv6:")


def _named(rows: Mapping[str, Any]) -> dict[str, str]:
    return {name.replace("_", " "): _text(value) for name, value in rows.items()}


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={entry}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(str(entry) for entry in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value > 65535 else str(value)
