"""Seconds of one decoder layer, the embedding and the head for one micro-batch.

`LayerCosts` is what the planner's tables are filled from; the roofline here needs no measurement, a fitted model can
stand in its place. Every source of costs says what its numbers are (`provenance`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from ds_llmpq.cluster.devices import COMPUTE_DTYPES, DeviceType
from ds_llmpq.cost import arithmetic, products
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.quant.kernels.base import Kernel
from ds_llmpq.quant.kernels.dequantize import DEQUANTIZE
from ds_llmpq.quant.packing import UNQUANTIZED_BITS, Groups

# Shares of a datasheet's FLOP/s and bytes/s that real kernels reach. From compute capability 8.0 on: measured on one
# H200 (778 of 989 TFLOP/s, 4,150 of 4,800 GB/s). Others: assumed; the published prefill time of an OPT-30B layer on a
# V100 is 0.6 of the peak, those on T4 and P100 are 0.3 and 0.24. Measured rates are taken as they are.
DATASHEET_SHARES, OLDER_SHARES = (0.79, 0.86), (0.6, 0.7)
# Fitted to decode steps of an 8B model on the same H200 (`tests/cost/test_gpu_latency.py`): attention over the cache
# reaches so much of the bandwidth that products reach; and norms, rotary positions and the like take the device 75 us a
# layer, so much of what launching them one by one takes the host.
ATTENTION_BANDWIDTH_SHARE = 0.58
CAPTURED_LAUNCHES_SHARE = 0.19
PART_LAUNCHES_SHARE = 0.1  # embedding and head launch about a tenth of what a decoder layer does


@dataclass(frozen=True)
class PassOverhead:
    """Seconds of a pass outside the model's parts, by the stage's place: schedule, positions, messages, sampling.
    `contention`: what comes on top on each stage, unless it is the plan's only one."""

    first: float = 0.0
    middle: float = 0.0
    last: float = 0.0
    contention: float = 0.0


class LayerCosts(Protocol):
    """Times on one device type for one model and compute dtype. None: this combination is not available."""

    provenance: str

    def prefill_seconds(self, bits: int, batch: int, tokens: int) -> float | None:
        """One layer; `batch` sequences of `tokens` prompt tokens each."""

    def decode_seconds(self, bits: int, batch: int, past: float) -> float | None:
        """One layer; one new token for each of `batch` sequences that already have `past` tokens."""

    def embed_seconds(self, batch: int, tokens: int) -> float:
        """Embedding of `tokens` new tokens for each of `batch` sequences."""

    def head_seconds(self, batch: int) -> float:
        """Final norm, lm_head and choosing a token at the last position of each of `batch` sequences."""

    def pass_overhead(self, phase: str, batch: int, tokens: int) -> PassOverhead:
        """What a pass of `batch` x `tokens` costs a stage beside its layers, embedding and head."""

    def first_pass_seconds(self, widths: Iterable[int]) -> float:
        """What a stage's first pass of a number of tokens costs it beyond the next ones of that size;
        `widths`: its layers' bits."""

    def alone_share(self, phase: str) -> float:
        """The share of all these times that the only stage of a plan takes, while the host's other devices rest: from
        above 0 to 1."""

    def time_error(self, phase: str) -> float | None:
        """How far off the times of layers are on average, as a share of them; None: not known."""


@dataclass(frozen=True)
class RooflineCosts:
    """Sum over the kernels of a layer of max(FLOPs / rate, bytes / bandwidth), plus launches.

    Kernels run one after another: dequantization (where `kernel` needs it), matrix products, attention, and elementwise
    passes. `dtype` must be one that the device type computes in. A GPU works while the host launches, so that launches
    count only where they take longer, and not at all in decode passes that are `captured` as graphs.
    """

    device_type: DeviceType
    shape: ModelShape
    dtype: str
    groups: Groups = field(default_factory=Groups)
    kernel: Kernel = DEQUANTIZE
    lm_head_bits: int = UNQUANTIZED_BITS
    captured: bool = False

    @property
    def provenance(self) -> str:
        """`roofline`, with where its shares of the peaks come from on a GPU."""
        if not self._is_gpu:
            return "roofline"
        shares = "measured on an H200" if self._shares is DATASHEET_SHARES else "assumed"
        peaks = "" if self._is_measured else f"shares of the peaks {shares}; "
        return f"roofline ({peaks}attention and small operations fitted to an H200)"

    def prefill_seconds(self, bits: int, batch: int, tokens: int) -> float | None:
        return self._layer_seconds(bits, batch, tokens, 0)

    def decode_seconds(self, bits: int, batch: int, past: float) -> float | None:
        return self._layer_seconds(bits, batch, 1, round(past))

    def embed_seconds(self, batch: int, tokens: int) -> float:
        return self.embed_work(batch, tokens) + self._part_overhead

    def head_seconds(self, batch: int) -> float:
        return self.head_work(batch) + self._part_overhead

    def pass_overhead(self, phase: str, batch: int, tokens: int) -> PassOverhead:
        """Not known without a measurement, and small against layers worth cutting: nothing."""
        return PassOverhead()

    def first_pass_seconds(self, widths: Iterable[int]) -> float:
        """Likewise."""
        return 0.0

    def alone_share(self, phase: str) -> float:
        return 1.0

    def time_error(self, phase: str) -> float | None:
        return None

    def embed_work(self, batch: int, tokens: int) -> float:
        """Without launches."""
        rows = batch * tokens
        flops = arithmetic.embed_flops(self.shape, rows)
        return self.roof(flops, arithmetic.embed_bytes_moved(self.shape, rows, self.dtype_bytes))

    def head_work(self, batch: int) -> float:
        """Without launches."""
        shape, size = self.shape, self.dtype_bytes
        how = shape, self.lm_head_bits, self.kernel, self.groups
        speedup = products.lm_head_speedup(*how, self.device_type.kind, batch)
        read = products.lm_head_read_bytes(shape, UNQUANTIZED_BITS if speedup else self.lm_head_bits, *how[2:], size)
        moved = arithmetic.head_bytes_moved(shape, batch, size, read)
        seconds = self.roof(arithmetic.head_flops(shape, batch), moved) / (speedup or 1.0)  # logits weigh little
        return seconds + self.roof(0, products.lm_head_unpacking_bytes(*how, size))

    def _layer_seconds(self, bits: int, batch: int, new: int, past: int) -> float | None:
        if bits not in self.device_type.bits:
            return None
        shape, rows, size = self.shape, batch * new, self.dtype_bytes
        how = self.kernel, self.groups
        speedup = products.layer_speedup(shape, bits, *how, self.device_type.kind, rows)
        weights = products.layer_read_bytes(shape, UNQUANTIZED_BITS if speedup else bits, *how, size)
        touched = shape.touched_share(rows)  # below 1 where few tokens choose few experts
        moved = touched * weights + arithmetic.linear_activation_bytes(shape, rows, size)
        rates = self.device_type.flops_per_second
        number = products.product_dtype(shape, bits, *how, self.dtype, rates)
        seconds = self.roof(arithmetic.linear_flops(shape, rows) * rates[self.dtype] / rates[number], moved)
        seconds /= speedup or 1.0
        seconds += self.roof(
            arithmetic.attention_flops(shape, batch, new, past),
            arithmetic.attention_bytes(shape, batch, new, past, size)
            / (ATTENTION_BANDWIDTH_SHARE if self._is_gpu else 1.0),
        )
        seconds += self.roof(0, arithmetic.elementwise_bytes(shape, rows, size))
        seconds += self.roof(0, touched * products.layer_unpacking_bytes(shape, bits, *how, size))
        launches = products.launches_share(shape, bits, *how) * self.device_type.kernel_overhead_seconds
        if not self._is_gpu:
            return seconds + launches
        seconds += CAPTURED_LAUNCHES_SHARE * launches
        return seconds if self.captured and new == 1 else max(seconds, launches)

    def roof(self, flops: float, moved_bytes: float) -> float:
        """Seconds of a kernel: the longer of its arithmetic and its traffic."""
        of_flops, of_bandwidth = (1.0, 1.0) if self._is_measured else self._shares
        rate = self.device_type.flops_per_second[self.dtype] * of_flops
        return max(flops / rate, moved_bytes / (self.device_type.memory_bandwidth_bytes_per_second * of_bandwidth))

    @property
    def _is_gpu(self) -> bool:
        return self.device_type.kind == "cuda"

    @property
    def _is_measured(self) -> bool:
        return self.device_type.source.startswith("measured")

    @property
    def _shares(self) -> tuple[float, float]:
        return DATASHEET_SHARES if float(self.device_type.compute_capability or 0) >= 8.0 else OLDER_SHARES

    @property
    def dtype_bytes(self) -> int:
        """Of one element of the compute dtype."""
        return COMPUTE_DTYPES[self.dtype]

    @property
    def _part_overhead(self) -> float:
        share = CAPTURED_LAUNCHES_SHARE if self.captured and self._is_gpu else 1.0
        return PART_LAUNCHES_SHARE * share * self.device_type.kernel_overhead_seconds
