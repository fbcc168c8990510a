"""How a quantized checkpoint was made, as its config.json says. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_llmpq.errors import UserError, quote
from ds_llmpq.files import check_files, read_json
from ds_llmpq.models.description import QUANT_METHOD
from ds_llmpq.quant.config import ZEROS, QuantConfig, rename_former
from ds_llmpq.quant.packing import PACKED_BITS, UNQUANTIZED_BITS, Groups, make_groups
from ds_llmpq.validation import Digest, Many, Name, Positive, Some, one_of, validate

FORMAT = 1
Width = one_of(*PACKED_BITS, UNQUANTIZED_BITS)


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is quantized: bit width of each decoder layer and of lm_head, the rows of lm_head's blocks, and
    the settings of `QuantConfig`."""

    bits: tuple[int, ...]
    groups: Groups
    optimize: bool
    source_fingerprint: str
    lm_head_bits: int = UNQUANTIZED_BITS
    head_rows: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        return {
            "quant_method": QUANT_METHOD,
            "format": FORMAT,
            "bits": list(self.bits),
            "lm_head_bits": self.lm_head_bits,
            "head_rows": list(self.head_rows),
            **self.groups.to_json(),
            "optimize": self.optimize,
            "scale_dtype": "float32",
            "source_fingerprint": self.source_fingerprint,
        }

    @property
    def quant(self) -> QuantConfig:
        return QuantConfig(
            sorted(set(self.bits)), optimize=self.optimize, lm_head_bits=self.lm_head_bits, **self.groups.to_json()
        )

    def check(self, path: str | Path, bits: Sequence[int], quant: QuantConfig) -> None:
        """`UserError` unless the checkpoint in `path` has its decoder layers at these `bits`, and all that is quantized
        as `quant` says."""
        again = f"run `ds-llmpq quantize plan=PLAN out={path}` with this plan, or run the plan it was made for"
        if len(bits) != len(self.bits):
            raise UserError(f"{path} holds {len(self.bits)} layers, but {len(bits)} are asked for; {again}.")
        kept = [*((f"Layer {index}", width) for index, width in enumerate(self.bits)), ("lm_head", self.lm_head_bits)]
        for (what, here), asked in zip(kept, [*bits, quant.lm_head_bits], strict=True):
            if here != asked:
                raise UserError(f"{what} is kept at {here} bits in {path}, but {asked} are asked for; {again}.")
        if all(here == UNQUANTIZED_BITS for _, here in kept):
            return
        wanted = make_groups(quant).to_json() | {"optimize": quant.optimize}
        for name, here in (self.groups.to_json() | {"optimize": self.optimize}).items():
            if here != wanted[name]:
                raise UserError(f"{path} was quantized with {name} {here}, but {wanted[name]} is asked for; {again}.")


def read_recipe(path: str | Path) -> Recipe | None:
    """The recipe in a folder's config.json; None for a checkpoint that this package did not quantize. `UserError`:
    another format, or invalid values."""
    check_files(path, "Checkpoint file", "fetch the checkpoint again")
    file = Path(path) / "config.json"
    try:
        config = read_json(file, "config.json", "")
        noted = config.get("quantization_config")
    except (UserError, AttributeError):
        return None  # reading the model reports what is wrong
    if not isinstance(noted, dict) or noted.get("quant_method") != QUANT_METHOD:
        return None
    if noted.get("format") != FORMAT:
        raise UserError(
            f"{file} has quantization format {quote(noted.get('format'))}; this version reads {FORMAT} only."
        )
    kept = validate(_Noted, rename_former(noted), f"quantization_config of {file}", "quantize the model again")
    how = QuantConfig(
        group_size=kept.group_size, axis=kept.axis, per_channel_bits=list(kept.per_channel_bits), zeros=kept.zeros
    )
    try:
        groups = make_groups(how)
    except UserError as error:
        raise UserError(f"{file} has no usable quantization_config ({error}); quantize the model again.") from None
    return Recipe(kept.bits, groups, kept.optimize, kept.source_fingerprint, kept.lm_head_bits, kept.head_rows)


@dataclass(frozen=True)
class _Noted:
    """`Recipe.to_json`, as read from a file."""

    quant_method: Name
    format: int
    bits: Some[Width]
    group_size: Positive
    axis: int
    optimize: bool
    source_fingerprint: Digest
    scale_dtype: Name = "float32"
    lm_head_bits: Width = UNQUANTIZED_BITS
    head_rows: Many[Positive] = ()
    per_channel_bits: Many[Width] = ()
    zeros: one_of(*ZEROS) = "real"  # as in checkpoints that do not say
