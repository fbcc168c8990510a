"""Fingerprints of checkpoints, so that a plan or table made for one is not used with another.

A quantized checkpoint has the fingerprint of the one that it was made from.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from ds_llmpq.errors import UserError, quote
from ds_llmpq.files import check_files, open_regular, parse_json, read_json
from ds_llmpq.models.description import QUANT_METHOD
from ds_llmpq.models.index import MOST_HEADER_BYTES
from ds_llmpq.validation import Count, Many, Name, Plain, Table, validate

MANIFEST = "quantized.json"
_DIGEST = re.compile("[0-9a-f]{64}")
# files that decide how prompts become tokens, and the defaults of sampling
TEXT_FILES = (
    "*.jinja", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
    "generation_config.json",
)  # fmt: skip


def _digest(text: str) -> str:
    if not _DIGEST.fullmatch(text):
        raise ValueError("must be a SHA-256 digest")
    return text


def fingerprint(path: str | Path) -> str:
    """SHA-256 over config.json and the sizes and headers (names, types, shapes, offsets) of the safetensors files.

    Takes milliseconds for any size. Copies have the same fingerprint; so do other weights in the same layout.
    OSError: there is no config.json. `UserError` as in `find_quantized_source`.
    """
    folder = Path(path)
    check_files(folder, "Checkpoint file", "fetch the checkpoint again")
    config = (folder / "config.json").read_bytes()
    if source := find_quantized_source(folder, config):
        return source
    digest = hashlib.sha256(config)
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name}:{file.stat().st_size}:".encode())
        with open_regular(file, "shard", "fetch it again") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(min(header_bytes, MOST_HEADER_BYTES)))
    return digest.hexdigest()


def fingerprint_text(path: str | Path) -> str:
    """SHA-256 over the `TEXT_FILES` of a checkpoint; a quantized folder holds copies, so its value is the same."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in TEXT_FILES for file in Path(path).glob(pattern) if file.is_file()):
        with open_regular(file, "checkpoint file", "fetch the checkpoint again") as stream:
            digest.update(f"{file.name}:{hashlib.sha256(stream.read()).hexdigest()}:".encode())
    return digest.hexdigest()


def find_quantized_source(folder: Path, config: bytes) -> str | None:
    """The fingerprint of the checkpoint that `ds-llmpq quantize` read; None if it did not write this folder.

    `UserError`: the source in config.json is no fingerprint, or not the one that the shards were made from.
    """
    try:
        noted = parse_json(config, "", "").get("quantization_config")
    except (UserError, AttributeError):
        return None  # reading the model reports what is wrong
    if not isinstance(noted, dict) or noted.get("quant_method") != QUANT_METHOD:
        return None
    claimed = noted.get("source_fingerprint")
    if not isinstance(claimed, str) or not _DIGEST.fullmatch(claimed):
        raise UserError(
            f"{folder / 'config.json'} has source_fingerprint {quote(claimed)}, which is no fingerprint of a "
            "checkpoint; quantize the model again."
        )
    for name, part in read_manifest(folder).items():
        if part.made_from.get("source") != claimed:
            made = quote(part.made_from.get("source"))
            raise UserError(
                f"{folder / 'config.json'} says that it was quantized from {claimed[:12]}, but its {name} was from "
                f"{made}; quantize the model again."
            )
    return claimed


@dataclass(frozen=True)
class Part:
    """One shard in the manifest of a quantized checkpoint; `made_from`: all that its content depends on."""

    file: Name
    sha256: Annotated[str, AfterValidator(_digest)]
    made_from: Plain
    bytes: Count = 0
    tensors: Many[Name] = ()


@dataclass(frozen=True)
class _Manifest:
    parts: Table[Part]
    format: int = 1


def read_manifest(folder: Path) -> dict[str, Part]:
    """Shards by the name of their pipeline layer. `UserError`: the manifest is missing or damaged."""
    file, remedy = folder / MANIFEST, "quantize the model again"
    return validate(_Manifest, read_json(file, "manifest", remedy), f"manifest {file}", remedy).parts
