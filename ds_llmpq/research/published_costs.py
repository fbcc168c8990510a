"""Layer times as LLM-PQ published them, with its slow 3- and 4-bit kernels, to see why its planner chose what it did.

The figures are of one OPT-30B layer at one size. Other sizes and models are scaled:

* 16 and 8 bits by the ratio of 16-bit rooflines, which tell compute-bound work from memory-bound work;
* 3 and 4 bits by rows and weights, (a + c x rows) x weights: prefill (4096 rows) takes 350 to 510 times as long as
  decode (8 rows) on all three devices, so those kernels read the weights once per row, and the two figures give a and
  c.

What was not published is filled in and says so: a missing bit width by the reference device's ratio to the next wider
one of its kind (8 to 16, 3 to 4), a missing device by the ratio of datasheet rates to the reference device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from ds_llmpq.cluster.devices import DeviceType
from ds_llmpq.cost.latency import PassOverhead, RooflineCosts
from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.planner.cost_source import FurtherSource
from ds_llmpq.quant.kernels.base import Kernel
from ds_llmpq.quant.packing import UNQUANTIZED_BITS, Groups, count_packed_linear_bytes

SOURCE = (
    "LLM-PQ (PPoPP 2024 poster, arXiv 2403.01136): measured time of one OPT-30B decoder layer with its own low-bit "
    "kernels"
)
PUBLISHED_MODEL = {
    "model_type": "opt",
    "hidden_size": 7168,
    "num_hidden_layers": 48,
    "num_attention_heads": 56,
    "ffn_dim": 28672,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "dtype": "float16",
}
SEQUENCES, PROMPT_TOKENS = 8, 512
# device type -> bits -> (prefill, decode)
_MILLISECONDS = {
    "t4": {16: (263, 7.8), 8: (174, 7.9), 4: (11204, 23.8), 3: (8891, 18.8)},
    "v100": {16: (75.6, 3.2), 8: (85.1, 8.1), 4: (2238, 5.7), 3: (1664, 4.7)},
    "p100": {16: (1131, 23.2), 4: (6756, 16.0)},
}
# the device type from which others are derived
_REFERENCE, _REFERENCE_FLOPS, _REFERENCE_BANDWIDTH = "v100", 1.25e14, 9.0e11
_ROW_BY_ROW = (3, 4)
_NEXT_OF_KIND = {8: 16, 3: 4}
_DTYPES = ("float16", "bfloat16")


class Fused(Kernel):
    """A kernel that reads HQQ's packed weights once and keeps the rest in registers. Only for studies: nothing runs
    it."""

    name = "fused"
    source = "assumed: bytes of HQQ's own layout, at the roofline"

    def takes(self, out_features: int, in_features: int, bits: int, groups: Groups) -> bool:
        return bits != UNQUANTIZED_BITS

    def read_bytes(self, out_features: int, in_features: int, bits: int, groups: Groups, dtype_bytes: int) -> int:
        return count_packed_linear_bytes(out_features, in_features, bits, groups, dtype_bytes)


KERNEL = Fused()


class Anchor(NamedTuple):
    """Seconds of one layer of the published model at the published size; `origin` says whether they are assumed."""

    prefill_seconds: float
    decode_seconds: float
    origin: str


ANCHORS = {
    (name, width): Anchor(prefill / 1e3, decode / 1e3, "published")
    for name, widths in _MILLISECONDS.items()
    for width, (prefill, decode) in widths.items()
}
PUBLISHED_SHAPE = ModelShape.from_config(PUBLISHED_MODEL)


@dataclass
class PublishedCosts:
    """`LayerCosts` of one GPU type; embedding and head take the roofline's times. `notes` collects the assumptions."""

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
        self._here = RooflineCosts(
            self.device_type, self.shape, self.dtype, kernel=KERNEL, lm_head_bits=self.lm_head_bits, captured=True
        )  # what launches cost is in the published times
        self._there = RooflineCosts(self.device_type, PUBLISHED_SHAPE, self.dtype, kernel=KERNEL, captured=True)
        self._weights = self.shape.active_linear_weights / PUBLISHED_SHAPE.linear_weights

    @property
    def provenance(self) -> str:
        if self.device_type.name in _MILLISECONDS:
            return f"published, scaled from one size: {SOURCE}"
        return f"assumed: {_REFERENCE}'s published times by the ratio of datasheet rates"

    def prefill_seconds(self, bits: int, batch: int, tokens: int) -> float | None:
        anchor = self._anchor(bits)
        if anchor is None:
            return None
        if bits in _ROW_BY_ROW:
            return self._by_rows(anchor, batch * tokens)
        here = self._here.prefill_seconds(16, batch, tokens)
        there = self._there.prefill_seconds(16, SEQUENCES, PROMPT_TOKENS)
        return anchor.prefill_seconds * here / there

    def decode_seconds(self, bits: int, batch: int, past: float) -> float | None:
        anchor = self._anchor(bits)
        if anchor is None:
            return None
        if bits in _ROW_BY_ROW:
            return self._by_rows(anchor, batch)
        here = self._here.decode_seconds(16, batch, past)
        there = self._there.decode_seconds(16, SEQUENCES, PROMPT_TOKENS)
        return anchor.decode_seconds * here / there

    def embed_seconds(self, batch: int, tokens: int) -> float:
        return self._here.embed_seconds(batch, tokens)

    def head_seconds(self, batch: int) -> float:
        return self._here.head_seconds(batch)

    def pass_overhead(self, phase: str, batch: int, tokens: int) -> PassOverhead:
        return PassOverhead()

    def first_pass_seconds(self, widths: Iterable[int]) -> float:
        return 0.0

    def alone_share(self, phase: str) -> float:
        return 1.0

    def time_error(self, phase: str) -> float | None:
        return None

    def _by_rows(self, anchor: Anchor, rows: int) -> float:
        a_row = (anchor.prefill_seconds - anchor.decode_seconds) / (SEQUENCES * (PROMPT_TOKENS - 1))
        return self._weights * (anchor.decode_seconds + a_row * (rows - SEQUENCES))

    def _anchor(self, bits: int) -> Anchor | None:
        """None if there is no figure, and nothing to derive one from."""
        name = self.device_type.name
        if found := ANCHORS.get((name, bits)):
            return found
        found = self._from_next_width(bits) if name in _MILLISECONDS else self._from_reference(bits)
        if found is None:
            self.notes[f"{name}: {bits} bits is left out: it has no published time"] = None
        else:
            self.notes[f"{name}, {bits} bits: {found.origin}"] = None
        return found

    def _from_next_width(self, bits: int) -> Anchor | None:
        next_width = _NEXT_OF_KIND.get(bits)
        own = ANCHORS.get((self.device_type.name, next_width))
        theirs, next_theirs = (ANCHORS.get((_REFERENCE, width)) for width in (bits, next_width))
        if own is None or theirs is None or next_theirs is None:
            return None
        return Anchor(
            own.prefill_seconds * theirs.prefill_seconds / next_theirs.prefill_seconds,
            own.decode_seconds * theirs.decode_seconds / next_theirs.decode_seconds,
            f"assumed, its published time at {next_width} bits by {_REFERENCE}'s ratio",
        )

    def _from_reference(self, bits: int) -> Anchor | None:
        theirs = ANCHORS.get((_REFERENCE, bits))
        if theirs is None:
            return None
        traffic = _REFERENCE_BANDWIDTH / self.device_type.memory_bandwidth_bytes_per_second
        rate = self.device_type.flops_per_second.get("float16") or self.device_type.flops_per_second[self.dtype]
        prefill = traffic if bits in _ROW_BY_ROW else _REFERENCE_FLOPS / rate
        return Anchor(
            theirs.prefill_seconds * prefill,
            theirs.decode_seconds * traffic,
            f"assumed, {_REFERENCE}'s published time by the ratio of datasheet rates",
        )


SOURCES = {"published": FurtherSource((KERNEL,), PublishedCosts)}
