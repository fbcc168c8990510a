"""Sensitivity (omega in the docs) and its file: what each layer is predicted to lose at each bit width."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import MaxLen

from ds_llmpq.errors import UserError
from ds_llmpq.files import read_json, write_json
from ds_llmpq.validation import Amount, Bits, Label, Many, Plain, Some, one_of, validate
from ds_llmpq.wording import format_number

SCHEMA = 1
FILE, FORMER_FILE = "sensitivity.json", "omega.json"  # the latter is read for one more version
UNIT = "nats per token"
PROVENANCES = ("assumed", "estimated", "fitted", "measured")


@dataclass(frozen=True)
class Sensitivity:
    """Predicted increase of the loss, in nats per token, if one layer is kept at one width.

    table: layers x bits, non-negative; columns in the order of `bits`. 16 bits costs nothing and may be left out.
    head: the same for lm_head, by width; widths that are missing are unknown.
    provenance: assumed (no data seen), estimated (an indicator), fitted (scaled to measurements), measured.
    """

    method: str
    provenance: str
    bits: tuple[int, ...]
    table: tuple[tuple[float, ...], ...]
    model_fingerprint: str | None = None
    calibration_hash: str | None = None
    details: Mapping[str, Any] | None = None  # how it was made: plain JSON values
    unit: str = UNIT
    head: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.provenance not in PROVENANCES:
            raise UserError(
                f"sensitivity has provenance {self.provenance!r}; it must be one of {', '.join(PROVENANCES)}"
            )
        if self.unit != UNIT:
            raise UserError(f"sensitivity is in {self.unit!r}; this version reads {UNIT!r} only")
        if not self.bits or len(set(self.bits)) != len(self.bits):
            raise UserError(f"sensitivity lists bits {list(self.bits)}; list each width once, at least one")
        if not self.table:
            raise UserError("sensitivity has no layers; it needs one row for each decoder layer")
        for layer, row in enumerate(self.table):
            if len(row) != len(self.bits):
                raise UserError(
                    f"sensitivity row {layer} has {len(row)} entries; it needs {len(self.bits)}, one per width"
                )
            for width, value in zip(self.bits, row, strict=True):
                if not (math.isfinite(value) and value >= 0):
                    raise UserError(
                        f"sensitivity of layer {layer} at {width} bits is {value}; it must be finite and >= 0"
                    )
        for width, value in self.head.items():
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"sensitivity of the head at {width} bits is {value}; it must be finite and >= 0")

    @property
    def layers(self) -> int:
        return len(self.table)

    def select_bits(self, bits: Sequence[int]) -> tuple[tuple[float, ...], ...]:
        """Layers x `bits`, in that order. UserError: a width that the table lacks."""
        for width in bits:
            if width not in self.bits and width != 16:
                has = ", ".join(map(str, self.bits))
                raise UserError(
                    f"sensitivity has no column for {width} bits (it has {has}); make it again for these widths"
                )
        columns = [self.bits.index(width) if width in self.bits else None for width in bits]
        return tuple(tuple(0.0 if column is None else row[column] for column in columns) for row in self.table)

    def head_loss(self, bits: int) -> float:
        """What lm_head loses at `bits`; nothing at 16. UserError: the width is unknown."""
        if bits == 16:
            return 0.0
        if bits not in self.head:
            raise UserError(
                f"sensitivity does not say what an lm_head at {bits} bits loses; make it again with "
                f"quant.lm_head_bits={bits}"
            )
        return self.head[bits]

    def interval(self, loss: float) -> tuple[float, float] | None:
        """What another text is expected (95 %) to lose if `loss` is predicted; None if no texts were compared."""
        spread = (self.details or {}).get("text_spread")
        if not isinstance(spread, (int, float)):  # details are free text
            return None
        return loss - spread * loss**0.5, loss + spread * loss**0.5

    def describe_confidence(self, loss: float) -> str:
        """A sentence on how certain an expected loss is."""
        if self.provenance == "assumed":
            return (
                "That is assumed from published models of 1 to 3 billion parameters, not measured on this: it may be "
                "half or twice as much; `ds-llmpq sensitivity` measures it."
            )
        details, interval = self.details or {}, self.interval(loss)
        tokens = details.get("tokens")
        count = f"{tokens:,}" if isinstance(tokens, int) else "some"  # details are free text
        origin = "measured" if self.provenance == "measured" else "fitted to losses measured"
        known = f"That was {origin} on {count} tokens"
        if interval is None:
            return f"{known}; another text may lose more."
        low, high = map(format_number, interval)
        return f"{known} ({details.get('text')}); of other texts 95 % should lose {low} to {high}."

    def check_model(self, layers: int, fingerprint: str | None = None) -> None:
        """UserError if the table was made for another model. Fingerprints are compared if both sides have one."""
        if layers != self.layers:
            raise UserError(
                f"sensitivity is for {self.layers} layers, but the model has {layers}; make it again for this model"
            )
        if fingerprint and self.model_fingerprint and fingerprint != self.model_fingerprint:
            raise UserError(
                f"sensitivity is for the model with fingerprint {self.model_fingerprint}, but this one has "
                f"{fingerprint}; make it again for this model"
            )


def write_sensitivity(path: str | Path, sensitivity: Sensitivity) -> None:
    record = {"schema": SCHEMA, **asdict(sensitivity)}
    if not sensitivity.head:
        del record["head"]
    write_json(path, record)


def read_sensitivity(path: str | Path) -> Sensitivity:
    """UserError: unreadable, another schema, a missing or unknown key, a value out of range.

    A file with the former name is read too, also if the present name is given but only the former file exists.
    """
    path = Path(path)
    if path.name == FILE and not path.exists() and path.with_name(FORMER_FILE).is_file():
        path = path.with_name(FORMER_FILE)
    if path.name == FORMER_FILE:
        print(f"note: {path}: this file is now called {FILE}; the next version reads that only.", file=sys.stderr)
    where, remedy = f"sensitivity file {path}", "make it with the sensitivity command"
    record = validate(_SensitivityFile, read_json(path, "sensitivity file", remedy), where, remedy)
    head = {int(width): value for width, value in record.head.items()}
    kept = {name: getattr(record, name) for name in Sensitivity.__dataclass_fields__ if name != "head"}
    try:
        return Sensitivity(**kept, head=head)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


@dataclass(frozen=True)
class _SensitivityFile:
    """What `write_sensitivity` writes."""

    schema: one_of(SCHEMA)
    method: Label
    provenance: one_of(*PROVENANCES)
    unit: one_of(UNIT)
    bits: Some[Bits]
    table: Annotated[Some[Many[Amount]], MaxLen(10_000)]
    model_fingerprint: Label | None
    calibration_hash: Label | None
    details: Plain | None
    head: dict[one_of(*map(str, range(1, 16))), Amount] = field(default_factory=dict)
