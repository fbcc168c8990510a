"""Which library multiplies with a quantized weight: a table of kernels, what each can take, and what each holds.

HQQ quantizes; a kernel runs the very same codes, scales and zeros (`quant.kernel_linear`). `dequantize` is HQQ's own
forward and takes everything; the others are gates: device kind, compute type, width, axis, group size, shape, and the
library being installed. Imports no torch: plans are made from this table alone. `docs/kernels.md` has the measurements.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path

from ds_llmpq.errors import UserError
from ds_llmpq.models.spec import DecoderSpec, ExpertsSpec
from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.packing import UNQUANTIZED_BITS, Groups, packed_linear_bytes, row_blocks

AUTO = "auto"
DEQUANTIZE = "dequantize"
# Linears of a decoder layer that read the same input, by the last part of their names: where a kernel can, they are one
# matrix product.
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))

CACHE_BLOCK = 32  # positions: attention inside of OpenVINO's graph knows no other size on a processor
GRAPH_TOKENS = 128  # that run through such a graph at a time: its buffers grow with them, its speed no longer does
OPENVINO_ROWS = 32  # multiplied at a time: what OpenVINO keeps for itself grows with them, speed hardly does
# Measured by resident memory over 64 to 10752 outputs and 1536 to 5632 inputs: a compiled model as such, and, for each
# of `OPENVINO_ROWS`, its outputs (of the product, of the correction, their sum) and its quantized input.
_OPENVINO_MODEL_BYTES = 550_000
_OPENVINO_ROW_BYTES_OUT = 12.2
_OPENVINO_ROW_BYTES_IN = 1.1
# Likewise, over 1 to 12 layers of 135M and 850M at 16, 8 and 4 bits: a layer of a stage's graph beside its weights, and
# the graph as such.
_GRAPH_LAYER_BYTES, _GRAPH_BYTES = 1_400_000, 12_000_000


@dataclass(frozen=True)
class Kernel:
    """One way to run quantized linears. `carried`: width -> bits in which its codes are held.

    integer_activations: inputs are rounded to 8 bits by groups, and sums are taken in integers.
    per_channel: it also takes one group a row, of any length. fused: linears of one input are held and run as one.
    whole_stage: it runs all layers of a stage as one graph, unquantized ones too; a layer by itself multiplies with the
    kernel `alone`.
    """

    name: str
    library: str | None
    kinds: tuple[str, ...]
    dtypes: tuple[str, ...]
    carried: Mapping[int, int]
    group_sizes: tuple[int, ...]
    out_multiple: int = 1
    in_multiple: int = 1
    per_channel: bool = False
    integer_activations: bool = False
    fused: bool = False
    whole_stage: bool = False
    alone: str | None = None


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            "openvino_graph", "openvino", ("cpu",), ("bfloat16", "float32"), {3: 4, 4: 4, 8: 8}, (32, 64, 128, 256),
            per_channel=True, integer_activations=True, fused=True, whole_stage=True,
            alone="openvino",
        ),
        Kernel(
            "openvino", "openvino", ("cpu",), ("bfloat16",), {1: 2, 2: 2, 3: 4, 4: 4, 8: 8}, (32, 64, 128, 256),
            per_channel=True, integer_activations=True, fused=True,
        ),
        Kernel(
            "torch_int4", "torch", ("cpu",), ("bfloat16",), {1: 4, 2: 4, 3: 4, 4: 4}, (32, 64, 128, 256),
            out_multiple=16, fused=True,
        ),
        Kernel(
            "gemlite", "gemlite", ("cuda",), ("float16", "bfloat16"), {1: 1, 2: 2, 3: 4, 4: 4, 8: 8},
            (16, 32, 64, 128, 256), out_multiple=32, in_multiple=32,
        ),
    )
}  # fmt: skip
NAMES = (DEQUANTIZE, *KERNELS)


def check_name(name: str) -> str:
    """`UserError` for a name that is no kernel's."""
    if name not in NAMES:
        raise UserError(f"kernel {name!r} is not known; use {AUTO} or one of {', '.join(NAMES)}")
    return name


def version(name: str) -> str | None:
    """Version of the kernel's library as installed here; None where it is missing."""
    library = KERNELS[name].library if name in KERNELS else "hqq"
    try:
        return metadata.version(library).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def problem(name: str, kind: str, dtype: str, quant: QuantConfig, spec: DecoderSpec | None) -> str | None:
    """Why no layer can run on this kernel, or None. The library need not be installed here."""
    if name == DEQUANTIZE:
        return None
    kernel = KERNELS[name]
    if kind not in kernel.kinds:
        return f"it runs on {' and '.join(kernel.kinds)}, not on {kind}"
    if dtype not in kernel.dtypes:
        return f"it computes in {' and '.join(kernel.dtypes)}, not in {dtype}"
    if quant.axis != 1:
        return f"it reads groups along the input (axis 1), not axis {quant.axis}"
    if quant.group_size not in kernel.group_sizes:
        return f"it takes groups of {', '.join(map(str, kernel.group_sizes))}, not of {quant.group_size}"
    if kernel.whole_stage and spec is not None and (reason := _graph_problem(spec)):
        return reason
    if kernel.whole_stage and dtype == "float32" and quant.lm_head_bits < UNQUANTIZED_BITS:
        return f"in float32 nothing but {DEQUANTIZE} multiplies with an lm_head of {quant.lm_head_bits} bits"
    for bits in quant.bits if kernel.whole_stage else ():
        if bits not in kernel.carried and bits != UNQUANTIZED_BITS:
            return f"it has no layers of {bits} bits"
    return None


def resolved(
    quant: QuantConfig,
    kinds: Sequence[str],
    dtype: str,
    linears: Sequence[tuple[str, int, int]] = (),
    measured: str | None = None,
    spec: DecoderSpec | None = None,
    batch_invariant: bool = False,
) -> QuantConfig:
    """`quant` with `auto` replaced by what will run on all of these device kinds.

    linears: those of one decoder layer. measured: the kernel that a profile found fastest. Without one, the first of
    the table that takes this setting, whose library is installed here, and under which quantizing a layer still makes
    it smaller; the table is in the order of what measured fastest. batch_invariant: sums may not depend on which rows
    run together, so no whole stages. `UserError`: a kernel was asked for that cannot run so.
    """
    name = quant.kernel
    if name != AUTO:
        check_name(name)
        for kind in kinds:
            if reason := problem(name, kind, dtype, quant, spec):
                raise UserError(f"quant.kernel={name} cannot be used: {reason}; set quant.kernel={AUTO}.")
        check_invariant(name, batch_invariant)
        return quant
    there = [measured] if measured else [name for name in KERNELS if runs_here(name, dtype) and shrinks(name, linears)]
    for candidate in there:
        if batch_invariant and is_whole_stage(check_name(candidate)):
            candidate = alone(candidate)
        if all(problem(check_name(candidate), kind, dtype, quant, spec) is None for kind in kinds):
            return replace(quant, kernel=candidate)
    return replace(quant, kernel=DEQUANTIZE)


def _graph_problem(spec: DecoderSpec) -> str | None:
    """Why a model's layers cannot be a graph, or None."""
    if spec.attention.soft_cap is not None:
        return "its attention does not cap scores, as this model's does (attn_logit_softcapping)"
    if any(isinstance(layer.mlp, ExpertsSpec) for layer in spec.layers):
        return "it has no mixtures of experts"
    return None


def is_whole_stage(name: str | None) -> bool:
    return name in KERNELS and KERNELS[name].whole_stage


def alone(name: str) -> str:
    """What multiplies with a weight by itself, outside of a stage's graph, where kernel `name` is chosen."""
    return KERNELS[name].alone if is_whole_stage(name) else name


def cache_block(name: str | None) -> int:
    """Positions in a block of the key/value cache under this kernel; slots take whole blocks."""
    return CACHE_BLOCK if is_whole_stage(name) else 1


def check_invariant(name: str | None, batch_invariant: bool) -> None:
    """`UserError` for a kernel whose sums depend on which rows run together."""
    if batch_invariant and is_whole_stage(name):
        raise UserError(
            f"engine.batch_invariant=true cannot be had with quant.kernel={name}, whose sums depend on all "
            f"rows of a pass; plan with quant.kernel={alone(name)}."
        )


def runs_here(name: str, dtype: str) -> bool:
    """Whether this host could run the kernel in `dtype`, and would by itself: its library is installed, and for whole
    stages its processor has arithmetic for `dtype`. Where it has bfloat16, float32 is asked for to be exact, which
    inputs rounded to 8 bits are not."""
    if version(name) is None or not is_whole_stage(name):
        return version(name) is not None
    instructions = _instructions()
    bfloat16 = bool({"avx512_bf16", "amx_bf16"} & instructions)
    return bfloat16 if dtype == "bfloat16" else "avx2" in instructions and not bfloat16


@cache
def _instructions() -> frozenset[str]:
    """Of the processor, as Linux lists them; elsewhere they are not known, and taken as absent."""
    with contextlib.suppress(OSError):
        return frozenset(Path("/proc/cpuinfo").read_text().split())
    return frozenset()


def candidates(
    kind: str,
    dtype: str,
    quant: QuantConfig,
    linears: Sequence[tuple[str, int, int]] = (),
    spec: DecoderSpec | None = None,
) -> list[str]:
    """Kernels that could run here on this kind of device, `dequantize` last: what is worth measuring."""
    able = [name for name in KERNELS if runs_here(name, dtype) and problem(name, kind, dtype, quant, spec) is None]
    return [*(name for name in able if shrinks(name, linears)), DEQUANTIZE]


def shrinks(name: str, linears: Sequence[tuple[str, int, int]]) -> bool:
    """False where a layer at 4 bits would take more than its plain weights: what a kernel holds beside tiny ones."""
    weights = sum(linear[1] * linear[2] for linear in linears)
    return not weights or layer_linear_bytes(name, linears, 4, Groups(), 2) <= 2 * weights


def label(name: str) -> str:
    """The kernel with its library's version, as a profile notes it."""
    return f"{name} ({KERNELS[name].library} {version(name)})" if name in KERNELS else name


def runs(name: str, out_features: int, in_features: int, bits: int, groups: Groups) -> str:
    """What really runs a linear where kernel `name` is chosen: `dequantize` for widths, shapes and whole rows that it
    cannot take."""
    if name == DEQUANTIZE or bits == UNQUANTIZED_BITS:
        return DEQUANTIZE
    kernel = KERNELS[name]
    fits = out_features % kernel.out_multiple == 0 and in_features % kernel.in_multiple == 0
    fits &= kernel.per_channel or bits not in groups.per_channel_bits
    return name if bits in kernel.carried and fits else DEQUANTIZE


def grouped(
    name: str, linears: Sequence[tuple[str, int, int]], bits: int, groups: Groups
) -> list[list[tuple[str, int, int]]]:
    """Linears (dotted name, out, in features) of one decoder layer as they run: those of one input together."""
    unquantized = bits == UNQUANTIZED_BITS
    if name not in KERNELS or not KERNELS[name].fused or (unquantized and not KERNELS[name].whole_stage):
        return [[linear] for linear in linears]
    # in a graph, gate and up apart take the activation into their products
    shared_input = SHARED_INPUT[:1] if KERNELS[name].whole_stage else SHARED_INPUT
    together: dict[tuple[str, str], list[tuple[str, int, int]]] = {}
    for linear in linears:
        parent, _, own = linear[0].rpartition(".")
        shared = next((str(names) for names in shared_input if own in names), own)
        able = unquantized or runs(name, linear[1], linear[2], bits, groups) == name
        together.setdefault((parent, shared if able else own), []).append(linear)
    return list(together.values())


def held_bytes(name: str, out_features: int, in_features: int, bits: int, group_size: int, dtype_bytes: int) -> int:
    """Bytes of one weight (or of several as one) in kernel `name`'s own layout, without bias; axis 1.

    openvino: codes, a float32 scale and an 8-bit zero a group, a float32 correction for what rounding the zero left
    out, and what a compiled model and its buffers take (measured). openvino_graph: the same without those, for one
    graph has buffers for all. torch_int4, gemlite: codes, scale and zero.
    """
    kernel = KERNELS[name]
    weights = out_features * in_features
    codes, groups = weights * kernel.carried[bits] // 8, weights // group_size
    if name == "openvino":
        row = _OPENVINO_ROW_BYTES_OUT * out_features + _OPENVINO_ROW_BYTES_IN * in_features
        return codes + 9 * groups + _OPENVINO_MODEL_BYTES + round(OPENVINO_ROWS * row)
    if name == "openvino_graph":
        return codes + 9 * groups
    return codes + 2 * groups * dtype_bytes


def graph_workspace_bytes(token_width: int) -> int:
    """What the graph of a stage takes beside its layers, whose tensors have `token_width` elements a token together: in
    32 bits, for as many tokens as run at a time."""
    return _GRAPH_BYTES + GRAPH_TOKENS * token_width * 4


def read_bytes(name: str, out_features: int, in_features: int, bits: int, group_size: int, dtype_bytes: int) -> int:
    """Bytes of a weight that one product reads: `held_bytes` without what is no weight."""
    weights = out_features * in_features
    a_group = 9 if KERNELS[name].library == "openvino" else 2 * dtype_bytes
    return weights * KERNELS[name].carried[bits] // 8 + a_group * (weights // group_size)


def layer_linear_bytes(
    name: str, linears: Sequence[tuple[str, int, int]], bits: int, groups: Groups, dtype_bytes: int
) -> int:
    """Bytes that the weights of one decoder layer's linears take at `bits`, however they run."""
    total = _GRAPH_LAYER_BYTES if is_whole_stage(name) else 0
    for group in grouped(name, linears, bits, groups):
        out, into = sum(entry[1] for entry in group), group[0][2]
        if runs(name, out, into, bits, groups) == DEQUANTIZE:
            total += packed_linear_bytes(out, into, bits, groups, dtype_bytes)
        else:
            total += held_bytes(name, out, into, bits, groups.of(bits, into), dtype_bytes)
    return total


def lm_head_bytes(name: str, out_features: int, in_features: int, bits: int, groups: Groups, dtype_bytes: int) -> int:
    """Bytes of the matrix behind the last layer at `bits`: multiplied as one where a kernel takes it, else kept in
    `row_blocks`."""
    name = alone(name)
    if runs(name, out_features, in_features, bits, groups) != DEQUANTIZE:
        return held_bytes(name, out_features, in_features, bits, groups.of(bits, in_features), dtype_bytes)
    blocks = row_blocks(out_features, in_features)
    return sum(packed_linear_bytes(rows, in_features, bits, groups, dtype_bytes) for rows in blocks)
