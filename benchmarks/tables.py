"""Markdown tables of the benchmarks' results, for `benchmarks.all`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; numbers get three significant digits, or all digits before the point."""
    lines = [list(headers), ["---"] * len(headers), *([_cell(value) for value in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def serve(result: Result) -> str:
    """Both codecs, then both ways to form batches."""
    names = {
        "tokens_per_s": "tokens/s",
        "bytes_per_sample": "bytes per sample",
        "request_ms": "request, ms",
        "first_frame_ms": "first frame, ms",
        "model_ms": "model, ms",
        "encode_ms": "encoding, ms",
        "server_cpu_ms": "CPU of the server, ms",
        "client_cpu_ms": "CPU of the client, ms",
    }
    codecs = ("int8", "raw")
    served = table(
        ("per request", *codecs), [[what, *(result[c][name] for c in codecs)] for name, what in names.items()]
    )
    batches = result["batches"]
    ways = {"by_length": "of similar length", "in_order": "in order of arrival"}
    rows = [
        [what, batches[way]["tokens_per_s"], batches[way]["padding_share"], batches[way]["samples_per_batch"]]
        for way, what in ways.items()
    ]
    by_length = table(("batches", "tokens/s", "padding share", "samples per batch"), rows)
    overlap = result["overlap"]
    rates = [[f"tokens/s, {name}", value] for name, value in overlap["tokens_per_s"].items()]
    rates += [[f"`{name}`", overlap[name]] for name in ("service_over_bare", "two_over_one")]
    rates += [[f"share of encoding, `{name}`", value] for name, value in overlap["encode_share"].items()]
    return "\n".join([served, by_length, table(("bare model, one and two requests at a time", "value"), rates)])


def transport(result: Result) -> str:
    """One table for each size of frames, with one row for each arm."""
    return "\n".join(map(_transports, result["sizes"]))


def _transports(result: Result) -> str:
    ratios: dict[str, float] = result["ratios"]
    arms = ("identity", *(name.removeprefix("identity_over_") for name in ratios))
    rows = [
        [f"`{arm}`", result[arm]["megabytes_per_s"], result[arm]["cpu_s_per_gb"], ratios.get(f"identity_over_{arm}")]
        for arm in arms
    ]
    headers = ("transport", "MB/s", "CPU s per GB", "CPU of `identity` over this")
    return f"Frames of {result['frame_bytes']:,} bytes.\n\n" + table(headers, rows)


def scale(result: Result) -> str:
    """One row for each arm, then the ratios."""
    rows = [
        [arm[name] for name in ("ranks", "replicas", "teachers", "samples_per_s", "forward_share", "least_share")]
        for arm in result["arms"]
    ]
    headers = ("ranks", "replicas", "teachers", "samples/s", "share of perfect servers", "slowest over fastest rank")
    ratios = [[f"`{name}`", value] for name, value in result["ratios"].items()]
    return table(headers, rows) + "\n" + table(("ratio of samples/s", "value"), ratios)


def result_cache(result: Result) -> str:
    """One row for each epoch."""
    names = {"without": "without a cache", "first": "with a cache, first epoch", "second": "second epoch"}
    rows = [
        [what, result[name]["samples_per_s"], result[name]["server_cpu_ms_per_sample"]] for name, what in names.items()
    ]
    ratios = [[f"`{name}`", result[name]] for name in ("second_over_first", "first_over_without")]
    headers = ("epoch", "samples/s", "CPU of the server per sample, ms")
    return table(headers, rows) + "\n" + table(("ratio of samples/s", "value"), ratios)


def codec(result: Result) -> str:
    """One row for each codec."""
    rows: list[list[object]] = []
    for name, found in result["codecs"].items():
        both = [found["k"], found["v"]]
        errors = [f"{one['error']:.2%} ({one['error_of_varying']:.2%})" for one in both]
        speeds = [f"{one['encode_mb_s']:.0f}, {one['decode_mb_s']:.0f}" for one in both]
        rows.append([name, found["smaller_than_bf16"], *errors, f"{found['error_together']:.2%}", *speeds])
    speed = "MB/s encoded, decoded"
    errors = ("error of keys", "error of values", "of both together")
    headers = ("codec", "smaller than bf16", *errors, f"keys, {speed}", f"values, {speed}")
    return table(headers, rows)


def train_step(result: Result) -> str:
    """The tables that the benchmark prints too."""
    from benchmarks.train_step import table as step_tables  # noqa: PLC0415 - loads torch

    return step_tables(result)


def latent_step(result: Result) -> str:
    """Time, operations and memory of both sides."""
    times, products, memory = (result[name] for name in ("median_step_s", "matrix_tflop", "peak_mib"))
    share = result["memory_share"]
    rows = [
        ["step, s", times["kept"], times["again"], result["times_faster"]],
        ["matrix products, 10^12", products["kept"], products["again"], result["fewer_matrix_products"]],
        ["growth of memory, MiB", memory["kept"], memory["again"], 1 / share if share else None],
    ]
    return table(("", "prompt kept", "read again", "ratio"), rows)


def cross_entropy(result: Result) -> str:
    """Time and memory of both sides."""
    rows = [
        ["peak memory, MiB", result["median_peak_mib"]["chunks"], result["median_peak_mib"]["whole"]],
        ["forward and backward pass, s", result["median_s"]["chunks"], result["median_s"]["whole"]],
    ]
    return table(("", "in chunks", "whole logits"), rows)


def student(result: Result) -> str:
    """One row for each side."""
    rows = [
        [
            f"{side['latents']} latents, {side['passes']} passes" if side["passes"] else "written",
            side["batch"],
            *(side[name] for name in ("forward_passes", "thought_s", "whole_s", "answer_tokens_per_s")),
            *(side[name] for name in ("thought_times_faster", "whole_times_faster")),
        ]
        for side in result["sides"]
    ]
    times = ("thought, s", "whole answer, s", "answer tokens/s", "thought faster", "whole answer faster")
    return table(("reasoning", "prompts", "forward passes", *times), rows)


def padding(result: Result) -> str:
    """Shares of padding by order and number of ranks."""
    shares: Mapping[str, Mapping[str, float]] = result["padding_share"]
    ranks = list(next(iter(shares.values())))
    rows = [[order, *(share[count] for count in ranks)] for order, share in shares.items()]
    return table(("order", *(f"{count.removeprefix('ranks')} ranks" for count in ranks)), rows)
