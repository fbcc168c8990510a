"""The interface of kernels: one way to multiply with quantized weights, and all that planning and loading must know.

A backend is one file in this package with a subclass of `Kernel`, and one line in `registry.py`; no other code depends
on its name. Plans are made without torch, so a file imports torch and its library only inside `build`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ds_llmpq.integers import round_up_coarsely
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.models.spec import DecoderSpec
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.packing import UNQUANTIZED_BITS, Groups

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ds_llmpq.quant.unpacked_weight import UnpackedWeight

Show = Callable[[str], None]  # tells the user
# linears of a decoder layer that read the same input, by the last part of their names
ATTENTION_INPUT = ("q_proj", "k_proj", "v_proj")
SHARED_BLOCK = 32  # positions of a block of a KV cache that sequences share; a kernel's own blocks are as long, or 1
SHARED_INPUTS = (ATTENTION_INPUT, ("gate_proj", "up_proj"), ("w1", "w3"))


class Product(Protocol):
    """A weight in a kernel's own layout, which takes `held_bytes` without bias. One that torch's compiler can call has
    `compiles`, which is true."""

    held_bytes: int

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[rows, in] -> [rows, out]."""


class Kernel:
    """One way to run quantized linears: what it supports, holds and reads, and how it is built.

    name: in `quant.kernel` and files. source: where its figures come from.
    library: the distribution that it needs, whose version profiles record.
    kinds, dtypes: kinds of devices, and compute dtypes, that it supports.
    storage_bits: for each bit width, the bits per stored code.
    group_sizes: along the input. per_channel: it also supports one group per row, of any length.
    out_multiple, in_multiple: features must be multiples of these.
    shared_inputs: linears with the same input that are held and run as one.
    integer_activations: inputs are rounded to 8 bits by groups, and sums are computed in integers.
    whole_zeros: products with zeros that are whole numbers are faster.
    own_threads: products run on the library's own threads.
    cache_block: positions in a block of the KV cache; slots take whole blocks.
    kv_scale_bytes: scale and zero of a key or value in a KV cache of 8 bits; None: it has no such cache.
    whole_stage: all layers of a stage, unquantized ones too, run as one graph, and sums depend on all rows of a pass.
    layer_overhead_bytes: for each layer, beside its weights.
    speedups: kind of device -> bits -> {rows: times as fast as an unquantized product}, where it was measured.
    """

    name: str
    source: str
    library: str | None = None
    kinds: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    storage_bits: Mapping[int, int] = MappingProxyType({})
    group_sizes: tuple[int, ...] = ()
    out_multiple = 1
    in_multiple = 1
    per_channel = False
    shared_inputs: Sequence[Sequence[str]] = ()
    integer_activations = False
    whole_zeros = False
    own_threads = False
    cache_block = 1
    kv_scale_bytes: int | None = None
    whole_stage = False
    layer_overhead_bytes = 0
    speedups: Mapping[str, Mapping[int, Mapping[int, float]]] = MappingProxyType({})

    def block_positions(self, paged: bool) -> int:
        """Positions in a block of the KV cache. `paged`: sequences share it."""
        return SHARED_BLOCK if paged else self.cache_block

    @property
    def product_kernel(self) -> Kernel:
        """The kernel for single weights, such as lm_head, if this one runs the layers."""
        return self

    @property
    def version(self) -> str | None:
        """Version of the installed library; None if it is missing."""
        try:
            return metadata.version(self.library).partition("+")[0] if self.library else ""
        except metadata.PackageNotFoundError:
            return None

    @property
    def label(self) -> str:
        """The name with the library's version, as in profiles."""
        return f"{self.name} ({self.library} {self.version})" if self.library else self.name

    def unsupported_reason(self, kind: str, dtype: str, quant: QuantConfig, spec: DecoderSpec | None) -> str | None:
        """Why no layer can run on it, or None. The library need not be installed here; spec: None if unknown."""
        if kind not in self.kinds:
            return f"it runs on {' and '.join(self.kinds)}, not on {kind}"
        if dtype not in self.dtypes:
            return f"it computes in {' and '.join(self.dtypes)}, not in {dtype}"
        if quant.axis != 1:
            return f"it reads groups along the input (axis 1), not axis {quant.axis}"
        if quant.group_size not in self.group_sizes:
            return f"it takes groups of {', '.join(map(str, self.group_sizes))}, not of {quant.group_size}"
        return self.unsupported_cache_reason(quant.kv_bits)

    def unsupported_cache_reason(self, kv_bits: int) -> str | None:
        """Why its KV cache cannot have so many bits, or None."""
        if kv_bits == UNQUANTIZED_BITS or self.kv_scale_bytes is not None:
            return None
        return f"its KV cache has {UNQUANTIZED_BITS} bits, not {kv_bits}"

    def unusable_reason(self, dtype: str) -> str | None:
        """Why `auto` does not choose it on this host, or None."""
        return f"{self.library} is not installed" if self.version is None else None

    def is_usable(self, dtype: str) -> bool:
        """Whether this host can run it in `dtype`, and `auto` may choose it."""
        return self.unusable_reason(dtype) is None

    def takes(self, out_features: int, in_features: int, bits: int, groups: Groups) -> bool:
        """Whether it supports such a weight; otherwise `dequantize` runs it."""
        fits = out_features % self.out_multiple == 0 and in_features % self.in_multiple == 0
        fits &= self.per_channel or bits not in groups.per_channel_bits
        return bits in self.storage_bits and fits

    def weight_bytes(self, out_features: int, in_features: int, bits: int, groups: Groups, dtype_bytes: int) -> int:
        """Bytes of a weight, or of several stacked ones, in its own layout, without bias."""
        return self.read_bytes(out_features, in_features, bits, groups, dtype_bytes)

    def read_bytes(self, out_features: int, in_features: int, bits: int, groups: Groups, dtype_bytes: int) -> int:
        """Bytes that one product reads of a weight: here codes, and scale and zero of each group."""
        weights = out_features * in_features
        size = groups.of(bits, in_features)
        return weights * self.storage_bits[bits] // 8 + 2 * dtype_bytes * (weights // size)

    def speedup(self, kind: str, bits: int, rows: int) -> float | None:
        """How many times as fast as an unquantized product one of so many rows is; None: never measured, so that it is
        computed from bytes and FLOPs."""
        table = self.speedups.get(kind, {}).get(bits)
        if not table:
            return None
        return float(np.interp(math.log2(rows), [math.log2(each) for each in table], [*table.values()]))

    def kv_vector_bytes(self, head_dim: int, kv_bits: int, dtype_bytes: int) -> int:
        """Bytes of a head's key or value of one token in the KV cache: with 8 bits, also its scale and zero."""
        if kv_bits == UNQUANTIZED_BITS:
            return head_dim * dtype_bytes
        return head_dim * kv_bits // 8 + self.kv_scale_bytes

    def workspace_bytes(self, products: Sequence[tuple[int, int]], dtype_bytes: int) -> int:
        """Bytes beside inputs, weights and outputs during any of these products (out, in features)."""
        return 0

    def pad_call(self, tokens: int) -> int:
        """Tokens of the last call of a pass of so many on a CPU, padded: a size is prepared when it is first met."""
        return round_up_coarsely(tokens)

    def stage_workspace_bytes(self, shape: ModelShape, groups: Groups) -> int:
        """Bytes of a whole stage's own buffers, for passes of any size."""
        return 0

    def takes_head(self, spec: DecoderSpec, bits: int) -> bool:
        """Whether final norm and an lm_head of so many bits run as a graph behind a whole stage, unless lm_head is the
        stage's embedding."""
        return False

    def head_buffer_bytes(self, vocabulary: int, bits: int) -> int:
        """Bytes that such a graph holds beside its weights."""
        return 0

    def unpacking_bytes(self, weights: int, bits: int, dtype_bytes: int) -> float:
        """Bytes read and written to unpack so many weights."""
        return 0.0

    def extra_launches(self, bits: int) -> int:
        """Launches of a product beyond the single one of an unquantized linear."""
        return 0

    def build(self, weight: UnpackedWeight, bits: int, dtype: torch.dtype) -> Product:
        """`weight` in its own layout, for inputs in `dtype`. ImportError: the library cannot be imported."""
        raise NotImplementedError(f"{self.name} multiplies with no weight by itself")

    def compile_products(
        self, products: Sequence[tuple[int, int, int]], group_size: int, dtype: torch.dtype, show: Show
    ) -> None:
        """Compiles, before anything is loaded, what products (out, in features, bits) need on the current device."""

    def check_stage(self, dtype: torch.dtype) -> None:
        """`UserError` if a whole stage cannot run here in `dtype`."""

    def open_stage(self, first_layer: int, dtype: torch.dtype, kv_bits: int) -> nn.Module:
        """An empty stage that begins with layer `first_layer`, and whose KV cache has so many bits; call `add` for each
        layer, then `compile`."""
        raise NotImplementedError(f"{self.name} runs no whole stages")

    def build_head(
        self, head: nn.Module, dtype: torch.dtype, weight: object | None = None, held_bytes: int = 0
    ) -> nn.Module:
        """A filled `Head` behind a whole stage, in the form that runs best there. `weight`: its quantized lm_head as
        `hold` gave it; None: it has an unquantized one. `held_bytes`: of that weight, and of the graph's buffers."""
        raise NotImplementedError(f"{self.name} runs no whole stages")

    def hold(self, weight: UnpackedWeight | torch.Tensor, bits: int, in_file: bool = False) -> object:
        """A weight in the form that a stage's `add` takes; an unquantized one is a plain tensor [out, in]. `in_file`:
        it is a view of a mapped file."""
        raise NotImplementedError(f"{self.name} runs no whole stages")
