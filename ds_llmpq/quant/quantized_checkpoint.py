"""Reads a quantized checkpoint, as `ds-llmpq quantize` writes it (`quant.writer`).

It is a Hugging Face folder: safetensors shards with an index, `quantization_config` in config.json, the tokenizer. The
index has another name than usual, because transformers would load a model of random weights instead of failing. One
shard holds one pipeline layer, so a rank opens only its own. A quantized linear `NAME` is stored as `NAME.W_q` (HQQ's
packing), `NAME.scale` and `NAME.zero` (float32, so that one checkpoint serves every compute dtype), and `NAME.bias`. A
quantized lm_head, even a tied one, is stored in blocks of `head_rows`: `lm_head.0`, `lm_head.1`, ...
"""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import torch
from hqq.core.quantize import HQQLinear

from ds_llmpq.errors import UserError
from ds_llmpq.models.checkpoint import QUANTIZED_INDEX, Checkpoint
from ds_llmpq.models.fingerprint import MANIFEST, read_manifest
from ds_llmpq.quant.hqq import STORED_PARTS, restore_linear
from ds_llmpq.quant.recipe import Recipe, read_recipe

HEAD = "lm_head"
FORMER_INDEX = "model.safetensors.index.json"  # of a former version
_READ_BYTES = 1 << 22


class QuantizedCheckpoint(Checkpoint):
    """A checkpoint quantized as `recipe` says. Shards are verified when first opened. `UserError`: a missing, damaged
    or exchanged shard."""

    def __init__(self, path: str | Path, recipe: Recipe, trust_remote_code: bool = False):
        if not any((Path(path) / name).is_file() for name in (QUANTIZED_INDEX, FORMER_INDEX)):
            raise UserError(f"{path} is not finished: start `ds-llmpq quantize` with out={path} again, it goes on.")
        super().__init__(path, trust_remote_code)
        self.recipe = recipe
        self._checksums = read_checksums(self.path)
        self._verified: set[str] = set()
        self._verifying = threading.Lock()

    def linear(
        self,
        name: str,
        shape: tuple[int, int],
        bias: torch.Tensor | None,
        bits: int,
        dtype: torch.dtype,
        device: torch.device,
        copy: bool = True,
    ) -> HQQLinear:
        """The quantized linear `name` of [out, in] features, computing in `dtype` on `device`. `copy`: as `tensors` has
        it."""
        prefix = f"{name}."
        tensors = self.tensors([prefix + part for part in STORED_PARTS], copy)
        parts = {stored.removeprefix(prefix): tensor for stored, tensor in tensors}
        return restore_linear(parts, shape, bias, bits, self.recipe.quant, dtype, device)

    def lm_head(
        self, shape: tuple[int, int], bits: int, dtype: torch.dtype, device: torch.device, copy: bool = True
    ) -> list[HQQLinear]:
        """The blocks of the quantized lm_head [vocabulary, features]."""
        blocks = [
            self.linear(f"{HEAD}.{number}", (rows, shape[1]), None, bits, dtype, device, copy)
            for number, rows in enumerate(self.recipe.head_rows)
        ]
        if sum(self.recipe.head_rows) != shape[0]:
            raise UserError(
                f"{self.path} has {sum(self.recipe.head_rows)} rows of lm_head instead of {shape[0]}; "
                "quantize the model again."
            )
        return blocks

    def _open(self, shard: str):
        with self._verifying:  # `read_ahead` may have begun to
            if shard not in self._verified:
                self._verify(shard)
                self._verified.add(shard)
        return super()._open(shard)

    def _verify(self, shard: str) -> None:
        wanted = self._checksums.get(shard)
        if wanted is None:
            raise UserError(f"{self.path / MANIFEST} does not list the shard {shard}; quantize the model again.")
        found = hash_file(self.path / shard)
        if found != wanted:
            raise UserError(
                f"Shard {self.path / shard} has checksum {found[:12]} instead of {wanted[:12]}: it is damaged or "
                f"from elsewhere; run `ds-llmpq quantize` with out={self.path} again, it repairs this shard alone."
            )


def open_checkpoint(path: str | Path, trust_remote_code: bool = False) -> Checkpoint:
    """A full-precision or a quantized checkpoint, whichever the folder holds."""
    recipe = read_recipe(path)
    return QuantizedCheckpoint(path, recipe, trust_remote_code) if recipe else Checkpoint(path, trust_remote_code)


def read_checksums(path: Path) -> dict[str, str]:
    """Shard name -> sha256. `UserError`: the manifest is missing or unreadable."""
    return {part.file: part.sha256 for part in read_manifest(path).values()}


def hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as stream:
            while block := stream.read(_READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise UserError(f"Shard {path} cannot be read ({error.strerror}); quantize the model again.") from None
    return digest.hexdigest()
