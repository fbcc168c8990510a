"""Writes a quantized checkpoint one pipeline layer at a time: memory holds one layer, and a killed run resumes.

The manifest is rewritten after each shard and says what each was made from. A shard that would come out the same is
kept, or taken from the folder `reuse`, if its checksum is right; so after a change of plan only the changed layers are
quantized. The index and config.json come last: a folder without them is unfinished.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from hqq.core.quantize import HQQLinear
from safetensors.torch import save_file

from ds_llmpq.errors import UserError
from ds_llmpq.files import write_json
from ds_llmpq.models.checkpoint import QUANTIZED_INDEX, Checkpoint
from ds_llmpq.models.description import read_config
from ds_llmpq.models.fingerprint import MANIFEST, TEXT_FILES, fingerprint, read_manifest
from ds_llmpq.models.shape import read_shape
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.hqq import quantize_linear, quantize_rows, split_parts
from ds_llmpq.quant.packing import UNQUANTIZED_BITS, check_lm_head, cut_row_blocks, make_groups
from ds_llmpq.quant.quantized_checkpoint import FORMER_INDEX, HEAD, hash_file
from ds_llmpq.quant.recipe import FORMAT, Recipe

_RECIPE_VERSION = 3  # increased when the same settings give other weights
_COPIED = (*TEXT_FILES, "LICENSE*")


@dataclass(frozen=True)
class Written:
    """What `write_quantized` did."""

    parts: int
    reused: int
    bytes: int
    source_bytes: int
    seconds: float


@dataclass
class _Writer:
    source: Checkpoint
    recipe: Recipe
    out: Path
    device: torch.device
    reuse: Path | None
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    reused: int = 0

    def __post_init__(self) -> None:
        self.decoder = self.source.decoder
        layers = self.source.config.num_hidden_layers
        self.names = ["embedding", *(f"layer {index}" for index in range(layers)), "head"]

    def write(self, number: int) -> None:
        name = self.names[number]
        made_from = self._describe_origin(number)
        file = f"model-{number + 1:05d}-of-{len(self.names):05d}.safetensors"
        if not self._reuse_shard(name, file, made_from):
            tensors = self.tensors(number)
            # a single key, because the order of several would be random in the file
            _write_atomically(self.out / file, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
            self._note(name, file, made_from, hash_file(self.out / file), sorted(tensors))
        parts = dict(sorted(self.parts.items(), key=lambda item: item[1]["file"]))
        write_json(self.out / MANIFEST, {"format": FORMAT, "parts": parts})

    def _describe_origin(self, number: int) -> dict[str, Any]:
        """All that the content of a shard depends on."""
        made_from: dict[str, Any] = {"source": self.recipe.source_fingerprint}
        bits = [UNQUANTIZED_BITS, *self.recipe.bits, self.recipe.lm_head_bits][number]
        if self.names[number].startswith("layer"):
            made_from["bits"] = bits
        if bits < UNQUANTIZED_BITS:
            made_from |= {"bits": bits, **self._settings(bits), "recipe": _RECIPE_VERSION}
            if self.names[number] == "head":
                made_from["rows"] = list(self.recipe.head_rows)
        return made_from

    def _settings(self, bits: int) -> dict[str, Any]:
        """HQQ's settings that affect a layer at `bits`."""
        groups = self.recipe.groups
        group_size = "row" if bits in groups.per_channel_bits else groups.group_size
        fitted = {"optimize": self.recipe.optimize, "zeros": groups.zeros}
        return {"group_size": group_size, "axis": groups.axis, **fitted}

    def tensors(self, number: int) -> dict[str, torch.Tensor]:
        """Name -> tensor of one pipeline layer as stored; unquantized ones keep the dtype of the source."""
        layers = len(self.names) - 2
        embedding = list(self.decoder.embedding_tensors().values())
        if number == 0:
            return dict(self.source.tensors(embedding))
        if number > layers:
            return self._head(embedding)
        return self._layer(number - 1)

    def _head(self, embedding: list[str]) -> dict[str, torch.Tensor]:
        """Tensors of the head; a tied lm_head is left out unless it is quantized."""
        names = self.decoder.head_tensors()
        stored: dict[str, torch.Tensor] = {}
        if self.recipe.lm_head_bits < UNQUANTIZED_BITS:
            ((_, matrix),) = self.source.tensors([names.pop("lm_head.weight")])
            blocks = quantize_rows(matrix, self.recipe.lm_head_bits, self.recipe.quant, torch.float32, self.device)
            for number, block in enumerate(blocks):
                stored |= _collect_parts(block, f"{HEAD}.{number}.")
        return stored | dict(self.source.tensors([name for name in names.values() if name not in embedding]))

    def _layer(self, index: int) -> dict[str, torch.Tensor]:
        bits, linears = self.recipe.bits[index], self.decoder.spec.linears(index)
        weights = set()
        if bits < UNQUANTIZED_BITS:
            weights = {self.decoder.tensor_name(index, f"{linear.name}.weight") for linear in linears}
        stored: dict[str, torch.Tensor] = {}
        for name, tensor in self.source.tensors(list(self.decoder.layer_tensors(index).values())):
            if name not in weights:
                stored[name] = tensor
                continue
            linear = quantize_linear(tensor, None, bits, self.recipe.quant, torch.float32, self.device)
            stored |= _collect_parts(linear, name.removesuffix("weight"))
        return stored

    def _reuse_shard(self, name: str, file: str, made_from: dict[str, Any]) -> bool:
        """Lists the shard and returns True if it is here or in `reuse` as it would be made."""
        for folder in filter(None, (self.out, self.reuse)):
            part = _read_parts(folder).get(name, {})
            path = folder / str(part.get("file"))
            if part.get("made_from") != made_from or part.get("file") != file or not path.is_file():
                continue
            if hash_file(path) != part.get("sha256"):
                continue
            if folder != self.out:
                _write_atomically(self.out / file, lambda target, path=path: _link(path, target))
            self._note(name, file, made_from, part["sha256"], list(part["tensors"]))
            self.reused += 1
            return True
        return False

    def _note(self, name: str, file: str, made_from: dict[str, Any], sha256: str, tensors: list[str]) -> None:
        size = (self.out / file).stat().st_size
        self.parts[name] = {
            "file": file, "bytes": size, "sha256": sha256, "made_from": made_from, "tensors": tensors
        }  # fmt: skip

    def finish(self) -> int:
        """Writes index, configuration and tokenizer. Returns the bytes of all shards."""
        total = sum(part["bytes"] for part in self.parts.values())
        parts = (self.parts[name] for name in self.names)
        weight_map = {tensor: part["file"] for part in parts for tensor in part["tensors"]}
        config = read_config(self.source.path)
        config["quantization_config"] = self.recipe.to_json()
        config["tie_word_embeddings"] = self.source.config.tie_word_embeddings  # according to the stored tensors
        for pattern in _COPIED:
            for file in self.source.path.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, self.out / file.name)
        write_json(self.out / "config.json", config)
        write_json(self.out / QUANTIZED_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        return total


def write_quantized(
    source: str | Path,
    out: str | Path,
    bits: list[int],
    quant: QuantConfig,
    device: torch.device | str = "cpu",
    reuse: str | Path | None = None,
    on_written: Callable[[int, int], None] = lambda done, total: None,
    trust_remote_code: bool = False,
) -> Written:
    """Writes the checkpoint `source` with decoder layer i at `bits[i]` and lm_head at `quant.lm_head_bits` (16:
    unquantized) into the folder `out`.

    `on_written(done, total)` is called after each pipeline layer. `UserError`: a wrong number of bit widths, a shape
    that HQQ cannot pack, a source that is already quantized, no room.
    """
    started = time.perf_counter()
    checkpoint, folder = Checkpoint(source, trust_remote_code), Path(out)
    layers = checkpoint.config.num_hidden_layers
    if len(bits) != layers:
        raise UserError(f"{len(bits)} widths are given for the {layers} layers of {source}; give one, or one a layer.")
    if getattr(checkpoint.config, "quantization_config", None):
        raise UserError(f"{source} is quantized already; give the full-precision checkpoint as model.path.")
    if folder.resolve() == checkpoint.path.resolve():
        raise UserError(f"out={out} is the model's own folder; give another.")
    shape = read_shape(source)
    check_lm_head(shape.vocab, shape.embed_dim, quant)
    rows = cut_row_blocks(shape.vocab, shape.embed_dim) if quant.lm_head_bits < UNQUANTIZED_BITS else ()
    recipe = Recipe(
        tuple(bits), make_groups(quant), quant.optimize, fingerprint(source), quant.lm_head_bits, tuple(rows)
    )
    folder.mkdir(parents=True, exist_ok=True)
    if not _read_parts(folder) and any(folder.glob("*.safetensors")):
        raise UserError(f"out={out} holds other safetensors files; give an empty folder, or one to go on with.")
    for name in (QUANTIZED_INDEX, FORMER_INDEX, "config.json"):
        (folder / name).unlink(missing_ok=True)
    writer = _Writer(checkpoint, recipe, folder, torch.device(device), Path(reuse) if reuse else None)
    writer.parts.update(_read_parts(folder))  # so that a killed run does not forget shards
    try:
        for number in range(len(writer.names)):
            writer.write(number)
            on_written(number + 1, len(writer.names))
        total = writer.finish()
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}); make room or give another.") from None
    source_bytes = sum(file.stat().st_size for file in checkpoint.path.glob("*.safetensors"))
    return Written(len(writer.names), writer.reused, total, source_bytes, time.perf_counter() - started)


def _collect_parts(linear: HQQLinear, prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{part}": value.cpu().contiguous() for part, value in split_parts(linear).items()}


def _read_parts(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifest's parts; empty if it is missing or damaged, so that all are made again."""
    with contextlib.suppress(UserError):
        return {name: asdict(part) for name, part in read_manifest(folder).items()}
    return {}


def _write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    unfinished = path.with_name(path.name + ".part")
    unfinished.unlink(missing_ok=True)
    write(unfinished)
    os.replace(unfinished, path)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
