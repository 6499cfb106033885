"""The commands that share a student: `kvdistill export` and `kvdistill push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcore.errors import FieldError

EXPORT_EXAMPLES = """
kvdistill export outputs/run/best_model outputs/run/backbone --plain
"""

PUSH_EXAMPLES = """
# List the files, then upload them; hf auth login stores the token
kvdistill push outputs/run/best_model you/student --dry-run
kvdistill push outputs/run/best_model you/student --private
"""


def export(
    model: Annotated[str, typer.Argument(help="A run's best_model, or a directory or hub id of a latent student.")],
    out: Annotated[Path, typer.Argument(help="Directory to write. It must not exist yet.")],
    plain: Annotated[bool, typer.Option("--plain", help="Write the backbone alone, without its latents.")] = False,
) -> None:
    """Write the backbone of a latent student as a plain transformers model.

    The result has no latents. It is for tools that do not run a model's own code, such as serving engines.
    """
    if not plain:
        raise FieldError(
            "--plain",
            "is missing. transformers can load MODEL itself, with its latents, if you set trust_remote_code=True; "
            "--plain writes its backbone without the latents",
        )
    from kvdistill.plain_export import export_plain  # noqa: PLC0415 - torch is slow to import

    typer.echo(export_plain(model, out))


def push(
    model_dir: Annotated[Path, typer.Argument(help="A run's best_model.")],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the hub. It is created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to. The default is the main branch.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the files.")] = False,
) -> None:
    """Upload a student to the Hugging Face hub, with its model card and the newest scores."""
    from kvdistill.push import push as run  # noqa: PLC0415 - slow to import

    typer.echo(run(model_dir, repo_id, private=private, revision=revision, dry_run=dry_run))
