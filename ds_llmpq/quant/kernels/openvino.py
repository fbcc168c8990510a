"""OpenVINO on CPUs: single products (`openvino`), and all layers of a stage as one graph (`openvino_graph`).

`openvino_graph.constants` describes the product with HQQ's weights, `openvino_graph.stage_graph` the graph of a stage.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.models.spec import DecoderSpec, ExpertsSpec
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.kernels.base import ATTENTION_INPUT, SHARED_INPUTS, Kernel
from ds_llmpq.quant.packing import UNQUANTIZED_BITS, Groups
from ds_llmpq.versions import EXTRAS

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ds_llmpq.models.ends import Head
    from ds_llmpq.quant.kernels.openvino_graph.constants import Constants
    from ds_llmpq.quant.kernels.openvino_graph.single_product import OpenVinoProduct
    from ds_llmpq.quant.unpacked_weight import UnpackedWeight

CACHE_BLOCK = 32  # positions; the only size of OpenVINO's attention on CPUs
GRAPH_TOKENS = 128  # per call of a graph: more need larger buffers, and are no faster
# Calls of a graph have these numbers of tokens, or are padded to the next. OpenVINO prepares each in 3 to 5 ms;
# a token of padding costs what any other does.
CALL_SIZES = (*range(1, 17), *range(20, 33, 4), *range(40, GRAPH_TOKENS + 1, 8))
PRODUCT_ROWS = 32  # per product: more make OpenVINO hold more memory, and are hardly faster
# Measured by resident memory over 64 to 64000 outputs and 768 to 5632 inputs: a compiled model, and for each of
# `PRODUCT_ROWS` its outputs, those of a correction and their sum, and its quantized input.
_PRODUCT_BYTES = 550_000
_PRODUCT_ROW_BYTES_OUT, _CORRECTION_ROW_BYTES_OUT = 4.2, 8.0
_PRODUCT_ROW_BYTES_IN = 1.1
# Likewise, over 32000 and 64000 outputs: a graph of an unquantized lm_head, and for each row and output the product and
# its 32-bit copy
_HEAD_BYTES, _HEAD_ROW_BYTES = 650_000, 6
# Likewise, over 1 to 12 layers of 135M and 850M at 16, 8 and 4 bits: a layer of a graph beside its weights, and the
# graph.
_GRAPH_LAYER_BYTES, _GRAPH_BYTES = 1_400_000, 12_000_000
# Likewise, over 1 to 128 tokens, 2 to 24 layers: what a graph keeps of each number of tokens that it has run, and as
# much again for corrections.
_SIZE_BYTES = 700_000
# a float32 scale and an 8-bit zero; a float32 correction if the zero was rounded
_GROUP_BYTES, _CORRECTION_BYTES = 5, 4
_FLOAT32_BYTES = 4
_REMEDY = "use quant.kernel=openvino or quant.kernel=dequantize."


class _OpenVino(Kernel):
    """What both kernels share."""

    source = "measured by resident memory on one processor with AVX-512 (docs/kernels.md)"
    library = "openvino"
    kinds = ("cpu",)
    group_sizes = (32, 64, 128, 256)
    per_channel = True
    integer_activations = True
    whole_zeros = True
    own_threads = True

    def read_bytes(self, out_features: int, in_features: int, bits: int, groups: Groups, dtype_bytes: int) -> int:
        weights = out_features * in_features
        group = _GROUP_BYTES + (0 if groups.zeros == "whole" else _CORRECTION_BYTES)
        return weights * self.storage_bits[bits] // 8 + group * (weights // groups.of(bits, in_features))


class OpenVino(_OpenVino):
    name = "openvino"
    dtypes = ("bfloat16",)
    storage_bits: ClassVar[Mapping[int, int]] = {1: 2, 2: 2, 3: 4, 4: 4, 8: 8}
    shared_inputs = SHARED_INPUTS

    def weight_bytes(self, out_features: int, in_features: int, bits: int, groups: Groups, dtype_bytes: int) -> int:
        """Includes a compiled model and its buffers."""
        output = _PRODUCT_ROW_BYTES_OUT + (0 if groups.zeros == "whole" else _CORRECTION_ROW_BYTES_OUT)
        row = output * out_features + _PRODUCT_ROW_BYTES_IN * in_features
        read = self.read_bytes(out_features, in_features, bits, groups, dtype_bytes)
        return read + _PRODUCT_BYTES + round(PRODUCT_ROWS * row)

    def workspace_bytes(self, products: Sequence[tuple[int, int]], dtype_bytes: int) -> int:
        """One buffer for inputs and one for outputs, shared by all products."""
        widest = max(out for out, _ in products) + max(into for _, into in products)
        return PRODUCT_ROWS * widest * _FLOAT32_BYTES

    def build(self, weight: UnpackedWeight, bits: int, dtype: torch.dtype) -> OpenVinoProduct:
        from ds_llmpq.quant.kernels.openvino_graph.single_product import OpenVinoProduct

        out_features, in_features = weight.codes.shape
        groups = Groups(weight.group_size, zeros="whole" if weight.has_whole_zeros else "real")
        held = self.weight_bytes(out_features, in_features, bits, groups, dtype.itemsize)
        return OpenVinoProduct(weight, self.storage_bits[bits], held)


class OpenVinoGraph(_OpenVino):
    name = "openvino_graph"
    dtypes = ("bfloat16", "float32")
    storage_bits: ClassVar[Mapping[int, int]] = {3: 4, 4: 4, 8: 8}
    # gate and up stay apart, so that OpenVINO fuses the activation into their products
    shared_inputs = (ATTENTION_INPUT,)
    cache_block = CACHE_BLOCK
    kv_scale_bytes = 2 * _FLOAT32_BYTES
    whole_stage = True
    layer_overhead_bytes = _GRAPH_LAYER_BYTES

    @property
    def product_kernel(self) -> Kernel:
        return OPENVINO

    def unsupported_reason(self, kind: str, dtype: str, quant: QuantConfig, spec: DecoderSpec | None) -> str | None:
        if reason := super().unsupported_reason(kind, dtype, quant, spec):
            return reason
        if spec is not None and spec.attention.soft_cap is not None:
            return "its attention does not cap scores, as this model's does (attn_logit_softcapping)"
        if spec is not None and any(isinstance(layer.mlp, ExpertsSpec) for layer in spec.layers):
            return "it has no mixtures of experts"
        if dtype == "float32" and quant.lm_head_bits < UNQUANTIZED_BITS:
            return f"in float32 nothing but dequantize multiplies with an lm_head of {quant.lm_head_bits} bits"
        for bits in quant.bits:
            if bits not in self.storage_bits and bits != UNQUANTIZED_BITS:
                return f"it has no layers of {bits} bits"
        return None

    def is_usable(self, dtype: str) -> bool:
        """Whether the CPU computes in `dtype`. If it has bfloat16, float32 is left to `dequantize`."""
        if not super().is_usable(dtype):
            return False
        instructions = _instructions()
        bfloat16 = bool({"avx512_bf16", "amx_bf16"} & instructions)
        return bfloat16 if dtype == "bfloat16" else "avx2" in instructions and not bfloat16

    def pad_call(self, tokens: int) -> int:
        return CALL_SIZES[bisect_left(CALL_SIZES, (tokens - 1) % GRAPH_TOKENS + 1)]

    def stage_workspace_bytes(self, shape: ModelShape, groups: Groups) -> int:
        """The graph, what it keeps of each number of tokens, and the 32-bit tensors of one layer for the tokens of one
        call."""
        sizes = len(CALL_SIZES) * _SIZE_BYTES * (1 if groups.zeros == "whole" else 2)
        width = 2 * shape.hidden + 3 * shape.intermediate + (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim
        return _GRAPH_BYTES + sizes + GRAPH_TOKENS * width * _FLOAT32_BYTES

    def takes_head(self, spec: DecoderSpec, bits: int) -> bool:
        plain = spec.width == spec.hidden and spec.logit_cap is None
        return plain and (bits == UNQUANTIZED_BITS or bits in self.storage_bits)

    def head_buffer_bytes(self, vocabulary: int, bits: int) -> int:
        """Also the memory of logits, of one call."""
        graph, row = (_HEAD_BYTES, _HEAD_ROW_BYTES) if bits == UNQUANTIZED_BITS else (0, 0)
        return graph + PRODUCT_ROWS * vocabulary * (row + _FLOAT32_BYTES)

    def check_stage(self, dtype: torch.dtype) -> None:
        """`UserError`: OpenVINO is missing or untested, or the CPU does not compute in `dtype`."""
        import torch

        from ds_llmpq.quant.onednn_linear import computes_in_bfloat16

        try:
            import ds_llmpq.quant.kernels.openvino_graph.stage_graph  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"quant.kernel={self.name} needs OpenVINO {EXTRAS['cpu']['openvino']}, which cannot be imported here "
                f"({error}); install ds_llmpq[cpu], or {_REMEDY}"
            ) from None
        if dtype == torch.bfloat16 and not computes_in_bfloat16():
            raise UserError(
                f"quant.kernel={self.name} in bfloat16 needs a processor with bfloat16 arithmetic; plan with "
                f"engine.dtype=float32, or {_REMEDY}"
            )

    def open_stage(self, first_layer: int, dtype: torch.dtype, kv_bits: int) -> nn.Module:
        from ds_llmpq.quant.kernels.openvino_graph.stage_graph import StageGraph

        return StageGraph(first_layer, dtype, kv_bits)

    def build_head(
        self, head: Head, dtype: torch.dtype, weight: Constants | None = None, held_bytes: int = 0
    ) -> nn.Module:
        from ds_llmpq.quant.kernels.openvino_graph.head_graph import HeadGraph

        return HeadGraph(head, dtype, weight, held_bytes)

    def hold(self, weight: UnpackedWeight | torch.Tensor, bits: int, in_file: bool = False) -> Constants:
        from ds_llmpq.quant.kernels.openvino_graph.constants import hold_plain, hold_quantized

        if bits == UNQUANTIZED_BITS:
            return hold_plain(weight, in_file)
        return hold_quantized(weight, self.storage_bits[bits])


@cache
def _instructions() -> frozenset[str]:
    """The CPU's instruction sets as Linux lists them; unknown, and so empty, on other systems."""
    with contextlib.suppress(OSError):
        return frozenset(Path("/proc/cpuinfo").read_text().split())
    return frozenset()


OPENVINO = OpenVino()
OPENVINO_GRAPH = OpenVinoGraph()
