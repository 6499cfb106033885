"""`kvdistill push`: uploads a student to the Hugging Face hub, with its model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from kvcore.errors import FieldError
from kvcore.models.files import CARD, CARD_TAG, check_files, model_config
from kvcore.monitoring.units import in_bytes
from student_trainer.model.model_card import with_results


def push(model: Path, repo: str, *, private: bool, revision: str | None, dry_run: bool) -> str:
    """Uploads a student's folder, creates the repository if it is missing, and returns what was done.

    Scores that `kvdistill eval` wrote beside the folder replace those of the validation in the model card.

    Args:
        model: a run's best_model.
        repo: the hub's OWNER/NAME.
        private: create a private repository. One that exists stays as it is.
        revision: branch to upload to, which is created if it is missing; None for the main one.
        dry_run: upload nothing, and return the list of files.

    Raises:
        FieldError: the folder is no student, there is no token, or the hub refuses the upload.
    """
    _check_student(model)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise FieldError("REPO_ID", f"'{repo}' is not a hub id ({error}); give OWNER/NAME") from error
    files = sorted(file for file in model.rglob("*") if file.is_file())
    if dry_run:
        listed = [f"{file.relative_to(model)}  {in_bytes(file.stat().st_size)}" for file in files]
        return "\n".join([f"would upload {len(files)} files to {repo}:", *listed])
    if not huggingface_hub.get_token():
        raise FieldError(
            "HF_TOKEN",
            "is not set, and there is no login to the hub; next: create a token with write access at "
            "https://huggingface.co/settings/tokens, then run 'hf auth login' or set HF_TOKEN",
        )
    _refresh_results(model)
    try:
        return f"uploaded to {_upload(model, repo, private=private, revision=revision)}"
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())
        raise FieldError("REPO_ID", f"the hub refused the upload to '{repo}': {reason}") from error


def _upload(model: Path, repo: str, *, private: bool, revision: str | None) -> str:
    api: Any = HfApi()
    # None: as the account's settings say.
    url = api.create_repo(repo, private=private or None, exist_ok=True)
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    api.upload_folder(
        repo_id=repo, folder_path=model, revision=revision, commit_message="Upload a student of kvdistill"
    )
    return f"{url}/tree/{revision}" if revision else str(url)


def _check_student(model: Path) -> None:
    if not model.is_dir():
        raise FieldError("MODEL_DIR", f"there is no directory '{model}'; give the best_model of a run")
    model_config(model, str(model), "MODEL_DIR")
    check_files(model, "MODEL_DIR")
    card = model / CARD
    tags: Any = None
    if card.is_file():
        tags = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict().get("tags")
    if CARD_TAG not in (tags or ()):
        raise FieldError(
            "MODEL_DIR",
            f"'{model}' is not a student: it has no {CARD} with the tag '{CARD_TAG}', which `kvdistill train` writes; "
            "give the best_model of a run, or upload another model with 'hf upload'",
        )


def _refresh_results(model: Path) -> None:
    scores, card = model.parent / "eval_results.json", model / CARD
    if scores.is_file():
        results: dict[str, Any] = json.loads(scores.read_text(encoding="utf-8"))
        card.write_text(with_results(card.read_text(encoding="utf-8"), results), encoding="utf-8")
