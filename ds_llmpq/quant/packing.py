"""What HQQ 0.2.8 allocates for a quantized weight, and which weights it can pack.

HQQ reshapes a weight [out, in] into a matrix of groups (axis 1: [weights / group, group]; axis 0: [group, weights /
group]) and packs it along dimension 0: the rows are cut into as many equal parts as fit in one stored integer. Each
group has one scale and one zero in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ds_llmpq.errors import UserError
from ds_llmpq.models.shape import ModelShape
from ds_llmpq.quant.config import QuantConfig

UNQUANTIZED_BITS = 16  # means the compute dtype, even float32
PACKED_BITS = (1, 2, 3, 4, 8)
_WEIGHTS_PER_INTEGER = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
_INTEGER_BYTES = {8: 1, 4: 1, 3: 4, 2: 1, 1: 1}
# lm_head is quantized in blocks of rows, because HQQ makes several 32-bit copies of a weight
_BLOCK_WEIGHTS = 1 << 24
_BLOCK_ROWS = 256  # all blocks but the last are multiples, so that groups along the output fit


def cut_row_blocks(out_features: int, in_features: int) -> list[int]:
    """Rows of each block of an lm_head [out_features, in_features], in order."""
    rows = max(_BLOCK_ROWS, _BLOCK_WEIGHTS // in_features // _BLOCK_ROWS * _BLOCK_ROWS)
    return [min(rows, out_features - start) for start in range(0, out_features, rows)]


@dataclass(frozen=True)
class Groups:
    """Which weights share a scale and a zero: `group_size` of them along `axis` (1: in_features, 0: out_features), or a
    whole row at the bit widths `per_channel_bits` (ascending; only with axis 1); and whether zeros are `whole` numbers
    or `real` ones."""

    group_size: int = 64
    axis: int = 1
    per_channel_bits: tuple[int, ...] = ()
    zeros: str = "real"

    def of(self, bits: int, in_features: int) -> int:
        """Weights per group in a linear with `in_features` at `bits`."""
        return in_features if bits in self.per_channel_bits else self.group_size

    def to_json(self) -> dict[str, Any]:
        """The form in files, with the names of `QuantConfig`."""
        groups = {"group_size": self.group_size, "axis": self.axis, "per_channel_bits": list(self.per_channel_bits)}
        return groups | {"zeros": self.zeros}


def make_groups(quant: QuantConfig) -> Groups:
    """`UserError`: no such group size or axis; `per_channel_bits` is no list of packed bit widths, or does not fit the
    axis."""
    axis, widths = quant.axis, quant.per_channel_bits
    if quant.group_size < 1:
        raise UserError(f"quant.group_size is {quant.group_size} but must be at least 1.")
    if axis not in (0, 1):
        raise UserError(f"quant.axis is {axis} but must be 1 (groups along the input) or 0 (along the output).")
    known = isinstance(widths, list) and all(width in PACKED_BITS for width in widths)
    if not known or len(set(widths)) < len(widths):
        each = ", ".join(map(str, PACKED_BITS))
        raise UserError(f"quant.per_channel_bits={widths}: list each width once, of {each}")
    if widths and axis != 1:
        raise UserError(
            f"quant.per_channel_bits={widths} needs groups along the input, not axis {axis}; set quant.axis=1, or "
            "quant.per_channel_bits=[]"
        )
    # an `auto` that no kernel has resolved runs by HQQ's own forward
    return Groups(quant.group_size, axis, tuple(sorted(widths)), "whole" if quant.zeros == "whole" else "real")


def find_packing_problem(out_features: int, in_features: int, bits: int, group_size: int, axis: int) -> str | None:
    """Why HQQ cannot pack a weight [out_features, in_features] in this way, or None. HQQ itself raises only in some of
    these cases; if rows do not divide, it silently drops weights."""
    if bits == UNQUANTIZED_BITS:
        return None
    if bits not in PACKED_BITS:
        return f"{bits} bits is not a packed width (those are {', '.join(map(str, PACKED_BITS))})"
    if axis not in (0, 1):
        return f"axis {axis} is neither 0 nor 1"
    if group_size < 8 or group_size % 8:
        return f"group size {group_size} is not a positive multiple of 8"
    weights = out_features * in_features
    if weights % group_size:
        return f"{out_features} x {in_features} weights do not divide into groups of {group_size}"
    rows = weights // group_size if axis == 1 else group_size
    parts = _WEIGHTS_PER_INTEGER[bits]
    if bits != 3 and rows % parts:  # at 3 bits HQQ pads the rows instead
        return f"{rows} rows of groups do not divide into {parts} parts of one byte"
    return None


def find_quantization_problem(out_features: int, in_features: int, bits: int, groups: Groups) -> str | None:
    """Why this package does not quantize such a weight: `find_packing_problem`, or groups that span two rows, which
    only HQQ's own forward can read."""
    group_size = groups.of(bits, in_features)
    problem = find_packing_problem(out_features, in_features, bits, group_size, groups.axis)
    if problem or bits == UNQUANTIZED_BITS:
        return problem
    grouped = in_features if groups.axis == 1 else out_features
    if grouped % group_size:
        return f"group size {group_size} does not divide the grouped side, {grouped}, of {out_features} x {in_features}"
    return None


def find_lm_head_problem(out_features: int, in_features: int, bits: int, groups: Groups) -> str | None:
    """Why lm_head cannot be quantized to `bits`, block by block, or None."""
    blocks = set(cut_row_blocks(out_features, in_features))
    reasons = (find_quantization_problem(rows, in_features, bits, groups) for rows in blocks)
    return next(filter(None, reasons), None)


def check_lm_head(out_features: int, in_features: int, quant: QuantConfig) -> None:
    """`UserError`: `quant.lm_head_bits` is no bit width, or lm_head cannot be packed with it."""
    width, known = quant.lm_head_bits, (*PACKED_BITS, UNQUANTIZED_BITS)
    if width not in known:
        raise UserError(f"quant.lm_head_bits={width}; it must be one of {', '.join(map(str, known))}")
    if reason := find_lm_head_problem(out_features, in_features, width, make_groups(quant)):
        raise UserError(
            f"quant.lm_head_bits={width}: lm_head of {out_features} x {in_features} cannot be packed ({reason})"
            f"; set quant.lm_head_bits={UNQUANTIZED_BITS}"
        )


def count_packed_weight_bytes(out_features: int, in_features: int, bits: int, group_size: int, axis: int) -> int:
    """Bytes of the packed integers alone."""
    problem = find_packing_problem(out_features, in_features, bits, group_size, axis)
    if problem or bits == UNQUANTIZED_BITS:
        raise UserError(f"a weight {out_features} x {in_features} cannot be packed: {problem or 'it is unquantized'}")
    groups = out_features * in_features // group_size
    rows, columns = (groups, group_size) if axis == 1 else (group_size, groups)
    return -(-rows // _WEIGHTS_PER_INTEGER[bits]) * columns * _INTEGER_BYTES[bits]


def count_metadata_bytes(out_features: int, in_features: int, group_size: int, dtype_bytes: int) -> int:
    """Bytes of scales and zeros: one each per group, in the compute dtype."""
    return 2 * (out_features * in_features // group_size) * dtype_bytes


def count_packed_linear_bytes(out_features: int, in_features: int, bits: int, groups: Groups, dtype_bytes: int) -> int:
    """Bytes of a linear's weight without its bias; 16 bits means the plain weight in the compute dtype. `UserError`:
    HQQ cannot pack it."""
    if bits == UNQUANTIZED_BITS:
        return out_features * in_features * dtype_bytes
    group_size = groups.of(bits, in_features)
    packed = count_packed_weight_bytes(out_features, in_features, bits, group_size, groups.axis)
    return packed + count_metadata_bytes(out_features, in_features, group_size, dtype_bytes)


def count_bits_per_weight(shape: ModelShape, bits: Sequence[int], groups: Groups, lm_head_bits: int) -> float:
    """Mean over the weights of all decoder layers, at `bits` each, and of lm_head, scales and zeros of 16 bits counted.
    Without the embedding, norms and biases, which nothing quantizes."""
    head = shape.lm_head
    sizes = [(linear.out_features, linear.in_features, width) for width in bits for linear in shape.linears]
    sizes += [(rows, head.in_features, lm_head_bits) for rows in cut_row_blocks(head.out_features, head.in_features)]
    stored = sum(count_packed_linear_bytes(*size, groups, dtype_bytes=2) for size in sizes)
    return 8 * stored / sum(rows * columns for rows, columns, _ in sizes)
