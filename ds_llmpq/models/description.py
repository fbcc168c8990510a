"""The config.json of a checkpoint folder, and what it describes. No torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ds_llmpq.errors import UserError
from ds_llmpq.files import check_files, read_json
from ds_llmpq.models.families import describe
from ds_llmpq.models.family import REMEDY, Description
from ds_llmpq.models.tying import stores_own_head
from ds_llmpq.validation import Plain, validate


def read_description(path: str | Path) -> Description:
    """Of the checkpoint in folder `path`; its weights say whether lm_head is the embedding. `UserError`: no folder, no
    config.json, not JSON, not supported."""
    config = read_config(path)
    try:
        described = describe(config)
    except UserError as error:
        raise UserError(f"Model folder {path}: {error}") from None
    if described.spec.tied and stores_own_head(path, described.family):
        return replace(described, spec=replace(described.spec, tied=False))
    return described


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of the folder `path`, as it stands there. `UserError`: no folder, no config.json, no JSON object."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist; give a local folder in Hugging Face format")
    check_files(folder, "Checkpoint file", "fetch the checkpoint again")
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"model folder {folder} has no config.json; give a local folder in Hugging Face format")
    what = "Model configuration"
    return validate(Plain, read_json(file, what, REMEDY), f"{what} {file}", REMEDY)
