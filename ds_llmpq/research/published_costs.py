"""Layer times as LLM-PQ published them, with its slow 3- and 4-bit kernels: to see why its planner chose what it chose.

The figures (`published_layers.json`) are of one OPT-30B layer at one size. Other sizes and models are scaled:

* 16 and 8 bits by the ratio of 16-bit rooflines, which knows when work is bound by arithmetic and when by traffic;
* 3 and 4 bits by rows and weights, (a + c x rows) x weights: prefill (4096 rows) is 350 to 510 times decode (8 rows) on
  all three devices, so those kernels read the weights once a row, and the two figures give a and c.

What was not published is filled in and says so: a missing width by the reference device's ratio to the next wider one
of its kind (8 to 16, 3 to 4), a missing device by the ratio of datasheet rates to the reference device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ds_llmpq.cluster.devices import DeviceType
from ds_llmpq.cost.latency import PassOverhead, RooflineCosts
from ds_llmpq.errors import UserError
from ds_llmpq.files import read_json
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.planner.cost_source import FurtherSource
from ds_llmpq.quant.kernels.base import Kernel
from ds_llmpq.quant.packing import UNQUANTIZED_BITS, Groups, packed_linear_bytes
from ds_llmpq.validation import AboveZero, Name, Plain, Positive, Table, TableByNumber, validate

FILE = Path(__file__).with_name("published_layers.json")
_ROW_BY_ROW = (3, 4)
_NEXT_OF_KIND = {8: 16, 3: 4}
_DTYPES = ("float16", "bfloat16")


class Fused(Kernel):
    """Any kernel that reads HQQ's packed weights once and keeps the rest in registers: for studies, nothing runs it."""

    name = "fused"
    source = "assumed: bytes of HQQ's own layout, at the roofline"

    def takes(self, out_features: int, in_features: int, bits: int, groups: Groups) -> bool:
        return bits != UNQUANTIZED_BITS

    def read_bytes(self, out_features: int, in_features: int, bits: int, groups: Groups, dtype_bytes: int) -> int:
        return packed_linear_bytes(out_features, in_features, bits, groups, dtype_bytes)


KERNEL = Fused()


class Anchor(NamedTuple):
    """Seconds of one layer of the published model at the published size; `origin`: published, or assumed and how."""

    prefill_seconds: float
    decode_seconds: float
    origin: str


@dataclass(frozen=True)
class Figures:
    """The published file: what was measured, at which size, and the device that others are derived from."""

    source: str
    shape: ModelShape
    sequences: int
    prompt_tokens: int
    anchors: Mapping[tuple[str, int], Anchor]
    reference: str
    reference_flops: float
    reference_bandwidth: float


@dataclass(frozen=True)
class _Milliseconds:
    prefill: AboveZero
    decode: AboveZero


@dataclass(frozen=True)
class _At:
    sequences: Positive
    prompt_tokens: Positive
    model: Plain


@dataclass(frozen=True)
class _Reference:
    type: Name
    flops_per_second: AboveZero
    memory_bandwidth_bytes_per_second: AboveZero


@dataclass(frozen=True)
class _PublishedFile:
    """The file."""

    source: Name
    at: _At
    milliseconds: Table[TableByNumber[_Milliseconds]]
    reference: _Reference


@cache
def read_figures(file: Path = FILE) -> Figures:
    """`UserError`: unreadable, or not of this form."""
    what, remedy = "Published layer times", "install the package again"
    record = validate(_PublishedFile, read_json(file, what, remedy), f"{what} {file}", remedy, ignore_unknown=True)
    at, reference = record.at, record.reference
    anchors = {
        (name, width): Anchor(entry.prefill / 1e3, entry.decode / 1e3, "published")
        for name, widths in record.milliseconds.items()
        for width, entry in widths.items()
    }
    return Figures(
        record.source,
        ModelShape.from_config(at.model),
        at.sequences,
        at.prompt_tokens,
        anchors,
        reference.type,
        reference.flops_per_second,
        reference.memory_bandwidth_bytes_per_second,
    )


@dataclass
class PublishedCosts:
    """`LayerCosts` of one GPU type; embedding and head are the roofline's. `notes` gather what was assumed."""

    device_type: DeviceType
    shape: ModelShape
    dtype: str
    lm_head_bits: int = UNQUANTIZED_BITS
    notes: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = self.device_type.name
        if self.device_type.kind != "cuda" or self.dtype not in _DTYPES:
            raise UserError(
                f"cost.source=published has figures of GPUs in float16 only, not of {name} in {self.dtype}; use "
                "cost.source=roofline or a profile"
            )
        self._figures = read_figures()
        self._here = RooflineCosts(
            self.device_type, self.shape, self.dtype, kernel=KERNEL, lm_head_bits=self.lm_head_bits
        )  # fmt: skip
        self._there = RooflineCosts(self.device_type, self._figures.shape, self.dtype, kernel=KERNEL)
        self._weights = self.shape.active_linear_weights / self._figures.shape.linear_weights

    @property
    def provenance(self) -> str:
        known = {name for name, _ in self._figures.anchors}
        if self.device_type.name in known:
            return f"published, scaled from one size: {self._figures.source}"
        return f"assumed: {self._figures.reference}'s published times by the ratio of datasheet rates"

    def prefill_seconds(self, bits: int, batch: int, tokens: int) -> float | None:
        anchor = self._anchor(bits)
        if anchor is None:
            return None
        if bits in _ROW_BY_ROW:
            return self._by_rows(anchor, batch * tokens)
        here = self._here.prefill_seconds(16, batch, tokens)
        there = self._there.prefill_seconds(16, self._figures.sequences, self._figures.prompt_tokens)
        return anchor.prefill_seconds * here / there

    def decode_seconds(self, bits: int, batch: int, past: float) -> float | None:
        anchor = self._anchor(bits)
        if anchor is None:
            return None
        if bits in _ROW_BY_ROW:
            return self._by_rows(anchor, batch)
        here = self._here.decode_seconds(16, batch, past)
        there = self._there.decode_seconds(16, self._figures.sequences, self._figures.prompt_tokens)
        return anchor.decode_seconds * here / there

    def embed_seconds(self, batch: int, tokens: int) -> float:
        return self._here.embed_seconds(batch, tokens)

    def head_seconds(self, batch: int) -> float:
        return self._here.head_seconds(batch)

    def pass_overhead(self, phase: str, batch: int, tokens: int) -> PassOverhead:
        return PassOverhead()

    def first_pass_seconds(self) -> float:
        return 0.0

    def _by_rows(self, anchor: Anchor, rows: int) -> float:
        few = self._figures.sequences
        many = few * self._figures.prompt_tokens
        a_row = (anchor.prefill_seconds - anchor.decode_seconds) / (many - few)
        return self._weights * (anchor.decode_seconds + a_row * (rows - few))

    def _anchor(self, bits: int) -> Anchor | None:
        """None: no figure and nothing to derive one from."""
        figures, name = self._figures, self.device_type.name
        if found := figures.anchors.get((name, bits)):
            return found
        if any(known == name for known, _ in figures.anchors):
            found = self._from_next_width(bits)
        else:
            found = self._from_reference(bits)
        if found is None:
            self.notes[f"{name}: {bits} bits is left out: it has no published time"] = None
        else:
            self.notes[f"{name}, {bits} bits: {found.origin}"] = None
        return found

    def _from_next_width(self, bits: int) -> Anchor | None:
        anchors, next_width = self._figures.anchors, _NEXT_OF_KIND.get(bits)
        own = anchors.get((self.device_type.name, next_width))
        theirs = anchors.get((self._figures.reference, bits))
        next_theirs = anchors.get((self._figures.reference, next_width))
        if own is None or theirs is None or next_theirs is None:
            return None
        return Anchor(
            own.prefill_seconds * theirs.prefill_seconds / next_theirs.prefill_seconds,
            own.decode_seconds * theirs.decode_seconds / next_theirs.decode_seconds,
            f"assumed, its published time at {next_width} bits by {self._figures.reference}'s ratio",
        )

    def _from_reference(self, bits: int) -> Anchor | None:
        figures = self._figures
        theirs = figures.anchors.get((figures.reference, bits))
        if theirs is None:
            return None
        traffic = figures.reference_bandwidth / self.device_type.memory_bandwidth_bytes_per_second
        rate = self.device_type.flops_per_second.get("float16") or self.device_type.flops_per_second[self.dtype]
        prefill = traffic if bits in _ROW_BY_ROW else figures.reference_flops / rate
        return Anchor(
            theirs.prefill_seconds * prefill,
            theirs.decode_seconds * traffic,
            f"assumed, {figures.reference}'s published time by the ratio of datasheet rates",
        )


SOURCES = {"published": FurtherSource(KERNEL, PublishedCosts)}
