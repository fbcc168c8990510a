"""Which library multiplies with a quantized weight: a table of kernels, what each can take, and what each holds.

HQQ quantizes; a kernel runs the very same codes, scales and zeros (`quant.convert`). `dequantize` is HQQ's own forward
and takes everything; the others are gates: device kind, compute type, width, axis, group size, shape, and the library
being installed. Imports no torch: plans are made from this table alone. `docs/kernels.md` has the measurements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata

from ds_llmpq.errors import UserError
from ds_llmpq.quant.packing import UNQUANTIZED_BITS, Groups, packed_linear_bytes
from ds_llmpq.schema import QuantConfig

AUTO = "auto"
DEQUANTIZE = "dequantize"
# Linears of a decoder layer that read the same input, by the last part of their names: where a kernel can, they are one
# matrix product.
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

OPENVINO_ROWS = 32  # multiplied at a time: what OpenVINO keeps for itself grows with them, speed hardly does
# Measured by resident memory over 64 to 10752 outputs and 1536 to 5632 inputs: a compiled model as such, and, for each
# of `OPENVINO_ROWS`, its outputs (of the product, of the correction, their sum) and its quantized input.
_OPENVINO_MODEL_BYTES = 550_000
_OPENVINO_ROW_BYTES_OUT = 12.2
_OPENVINO_ROW_BYTES_IN = 1.1


@dataclass(frozen=True)
class Kernel:
    """One way to run quantized linears. `carried`: width -> bits in which its codes are held.

    integer_activations: inputs are rounded to 8 bits by groups, and sums are taken in integers.
    whole_rows: it also takes one group a row, whatever its length. fused: linears of one input are held and run as one.
    """

    name: str
    library: str | None
    kinds: tuple[str, ...]
    dtypes: tuple[str, ...]
    carried: Mapping[int, int]
    group_sizes: tuple[int, ...]
    out_multiple: int = 1
    in_multiple: int = 1
    whole_rows: bool = False
    integer_activations: bool = False
    fused: bool = False


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            "openvino", "openvino", ("cpu",), ("bfloat16",), {1: 2, 2: 2, 3: 4, 4: 4, 8: 8}, (32, 64, 128, 256),
            whole_rows=True, integer_activations=True, fused=True,
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


def problem(name: str, kind: str, dtype: str, quant: QuantConfig) -> str | None:
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
    return None


def resolved(
    quant: QuantConfig,
    kinds: Sequence[str],
    dtype: str,
    linears: Sequence[tuple[str, int, int]] = (),
    measured: str | None = None,
) -> QuantConfig:
    """`quant` with `auto` replaced by what will run on all of these device kinds.

    linears: those of one decoder layer. measured: the kernel that a profile found fastest. Without one, the first of
    the table that takes this setting, whose library is installed here, and under which quantizing a layer still makes
    it smaller; the table is in the order of what measured fastest. `UserError`: a kernel was asked for that cannot run
    so.
    """
    name = quant.kernel
    if name != AUTO:
        check_name(name)
        for kind in kinds:
            if reason := problem(name, kind, dtype, quant):
                raise UserError(f"quant.kernel={name} cannot be used: {reason}; set quant.kernel={AUTO}.")
        return quant
    there = [measured] if measured else [name for name in KERNELS if version(name) and shrinks(name, linears)]
    for candidate in there:
        if all(problem(check_name(candidate), kind, dtype, quant) is None for kind in kinds):
            return replace(quant, kernel=candidate)
    return replace(quant, kernel=DEQUANTIZE)


def candidates(
    kind: str, dtype: str, quant: QuantConfig, linears: Sequence[tuple[str, int, int]] = ()
) -> list[str]:  # fmt: skip
    """Kernels that could run here on this kind of device, `dequantize` last: what is worth measuring."""
    able = [name for name in KERNELS if version(name) and problem(name, kind, dtype, quant) is None]
    return [*(name for name in able if shrinks(name, linears)), DEQUANTIZE]


def shrinks(name: str, linears: Sequence[tuple[str, int, int]]) -> bool:
    """False where a layer at 4 bits would take more than unquantized: what a kernel holds beside tiny weights."""
    weights = sum(linear[1] * linear[2] for linear in linears)
    return layer_linear_bytes(name, linears, 4, Groups(), 2) <= 2 * weights


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
    fits &= kernel.whole_rows or bits not in groups.whole_rows
    return name if bits in kernel.carried and fits else DEQUANTIZE


def grouped(
    name: str, linears: Sequence[tuple[str, int, int]], bits: int, groups: Groups
) -> list[list[tuple[str, int, int]]]:
    """Linears (dotted name, out, in features) of one decoder layer as they run: those of one input together."""
    if name not in KERNELS or not KERNELS[name].fused or bits == UNQUANTIZED_BITS:
        return [[linear] for linear in linears]
    together: dict[tuple[str, str], list[tuple[str, int, int]]] = {}
    for linear in linears:
        parent, _, own = linear[0].rpartition(".")
        shared = next((str(names) for names in SHARED_INPUT if own in names), own)
        able = runs(name, linear[1], linear[2], bits, groups) == name
        together.setdefault((parent, shared if able else own), []).append(linear)
    return list(together.values())


def held_bytes(name: str, out_features: int, in_features: int, bits: int, group_size: int, dtype_bytes: int) -> int:
    """Bytes of one weight (or of several as one) in kernel `name`'s own layout, without bias; axis 1.

    openvino: codes, a float32 scale and an 8-bit zero a group, a float32 correction for what rounding the zero left
    out, and what a compiled model and its buffers take (measured). torch_int4, gemlite: codes, scale and zero.
    """
    kernel = KERNELS[name]
    weights = out_features * in_features
    codes, groups = weights * kernel.carried[bits] // 8, weights // group_size
    if name == "openvino":
        row = _OPENVINO_ROW_BYTES_OUT * out_features + _OPENVINO_ROW_BYTES_IN * in_features
        return codes + 9 * groups + _OPENVINO_MODEL_BYTES + round(OPENVINO_ROWS * row)
    return codes + 2 * groups * dtype_bytes


def read_bytes(name: str, out_features: int, in_features: int, bits: int, group_size: int, dtype_bytes: int) -> int:
    """Bytes of a weight that one product reads: `held_bytes` without what is no weight."""
    weights = out_features * in_features
    a_group = 9 if name == "openvino" else 2 * dtype_bytes
    return weights * KERNELS[name].carried[bits] // 8 + a_group * (weights // group_size)


def layer_linear_bytes(
    name: str, linears: Sequence[tuple[str, int, int]], bits: int, groups: Groups, dtype_bytes: int
) -> int:
    """Bytes that the weights of one decoder layer's linears take at `bits`, however they run."""
    total = 0
    for group in grouped(name, linears, bits, groups):
        out, into = sum(entry[1] for entry in group), group[0][2]
        if runs(name, out, into, bits, groups) == DEQUANTIZE:
            total += packed_linear_bytes(out, into, bits, groups, dtype_bytes)
        else:
            total += held_bytes(name, out, into, bits, groups.of(bits, into), dtype_bytes)
    return total
