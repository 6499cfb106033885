"""The command `kvdistill calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcore.early_checks import check_output
from kvcore.errors import FieldError

CALIBRATE_EXAMPLES = """
kvdistill calibrate node1:50051 --data data/train.jsonl --output ada.kvmap
# Two replicas, larger errors and fewer bytes, and only the layers that the student needs
kvdistill calibrate node1:50051 node2:50051 --data data/train.jsonl --output ada.kvmap --quality 0.2 --layers 0,9,18,27
"""


def calibrate(
    teacher: Annotated[list[str], typer.Argument(metavar="HOST:PORT", help="Teacher server, or its replicas.")],
    data: Annotated[Path, typer.Option(help="Records whose K/V are read, as for train.")],
    output: Annotated[Path, typer.Option(help="File to write, such as ada.kvmap.")],
    quality: Annotated[
        float | None, typer.Option(help="Relative error of what varies in K/V that the codec aims at. Defaults to 0.1.")
    ] = None,
    bytes_per_token: Annotated[
        float | None, typer.Option(help="Bytes of a token's keys and values in all layers, instead of --quality.")
    ] = None,
    samples: Annotated[int, typer.Option(min=8, help="Maximum number of records that are read.")] = 256,
    layers: Annotated[str | None, typer.Option(help="Teacher layers, such as 0,9,18. All by default.")] = None,
) -> None:
    """Fit the KV map of the codec `pca` to a teacher, show bytes and errors by quality, and write the map to a file."""
    chosen = None if layers is None else _layers(layers)
    check_output(output.parent, "--output")
    from data.records import load_records  # noqa: PLC0415 - slow to import
    from kvdistill.calibration import calibrate as run  # noqa: PLC0415 - torch is slow to import

    records = load_records(data, samples)
    found = run(
        teacher, [record.text for record in records], quality=quality, bytes_per_token=bytes_per_token, layers=chosen
    )
    found.write(output)
    typer.echo(found.text(output))


def _layers(text: str) -> list[int]:
    try:
        return sorted({int(layer) for layer in text.split(",")})
    except ValueError as error:
        raise FieldError("--layers", f"expected layer numbers such as 0,9,18; got '{text}'") from error
