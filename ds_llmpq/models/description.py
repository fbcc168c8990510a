"""Reads the config.json of a checkpoint folder as a `Description`. No torch."""

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
    """Describes the checkpoint in folder `path`; its weights decide whether lm_head is tied. `UserError`: no folder, no
    config.json, no JSON, or not supported."""
    config = read_config(path)
    try:
        described = describe(config)
    except UserError as error:
        raise UserError(f"Model folder {path}: {error}") from None
    if described.spec.tied and stores_own_head(path, described.family):
        return replace(described, spec=replace(described.spec, tied=False))
    return described


def read_config(path: str | Path) -> dict[str, Any]:
    """The object in the folder's config.json. `UserError`: no folder, no config.json, or no JSON object."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist; give a local folder in Hugging Face format")
    check_files(folder, "Checkpoint file", "fetch the checkpoint again")
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"model folder {folder} has no config.json; give a local folder in Hugging Face format")
    what = "Model configuration"
    return validate(Plain, read_json(file, what, REMEDY), f"{what} {file}", REMEDY)


# a name of our own, because transformers' HQQ loader would quantize again, at one bit width for all layers
QUANT_METHOD = "ds_llmpq_hqq"
# compressed-tensors formerly wrote the second
_KEYS = ("quantization_config", "compression_config")


def refuse_foreign(path: str | Path) -> None:
    """`UserError` if config.json declares a quantization that is not ours (GPTQ, AWQ, bitsandbytes, FP8, ...) and needs
    its own loader, or if a file of the folder is not a regular file. An unreadable config.json is reported later, when
    the model is read."""
    noted = _read_quantization(path)
    if noted is not None and not _is_ours(noted):
        raise UserError(
            f"{path} is quantized by {_method(noted)}, which is not read here; give the full-precision checkpoint as "
            "model.path (`ds-llmpq quantize` makes quantized ones)."
        )


def refuse_quantized(path: str | Path) -> None:
    """`refuse_foreign`, and `UserError` for our own too: bits are chosen for a checkpoint at full precision."""
    refuse_foreign(path)
    if _is_ours(_read_quantization(path)):
        raise UserError(
            f"{path} is quantized already, so its bits cannot be chosen anew; give the full-precision checkpoint as "
            "model.path, or run the plan that it was made for (`ds-llmpq run plan=FILE quantized=DIR`)."
        )


def _read_quantization(path: str | Path) -> Any:
    """What config.json says of a quantization; None if nothing, or if it cannot be read."""
    check_files(path, "Checkpoint file", "fetch the checkpoint again")
    try:
        config = read_json(Path(path) / "config.json", "Model configuration", "fetch the file again")
    except UserError:
        return None
    return next((config[key] for key in _KEYS if config.get(key)), None) if isinstance(config, dict) else None


def _is_ours(noted: Any) -> bool:
    return isinstance(noted, dict) and noted.get("quant_method") == QUANT_METHOD


def _method(noted: Any) -> str:
    """Name of the method; bitsandbytes formerly left it out."""
    name = noted.get("quant_method") if isinstance(noted, dict) else None
    if isinstance(noted, dict) and not name and (noted.get("load_in_8bit") or noted.get("load_in_4bit")):
        return "bitsandbytes"
    return repr(str(name)[:40]) if name else "a method it does not name"
