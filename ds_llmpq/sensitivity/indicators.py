"""Indicators of what each layer would lose at each width: tables of layers x widths, each in its own unit.

`make.scale_to_loss` scales them to nats per token. All take a `Layerwise` model; `progress` keeps finished layers
across restarts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ds_llmpq.quant.config import QuantConfig
from ds_llmpq.quant.hqq import list_linears
from ds_llmpq.quant.packing import UNQUANTIZED_BITS, make_groups
from ds_llmpq.sensitivity.layerwise import Layerwise, measure
from ds_llmpq.sensitivity.resume import Progress

Table = list[list[float]]
OnLayer = Callable[[int, int], None]


def list_quantized_bits(bits: Sequence[int]) -> list[int]:
    """The widths below 16, in the given order."""
    return [width for width in bits if width != UNQUANTIZED_BITS]


# -- variance: Theorem 1 and Proposition 1 of LLM-PQ (arXiv 2403.01136)


def estimate_variance(
    model: Layerwise, widths: list[int], quant: QuantConfig, progress: Progress, on_layer: OnLayer
) -> Table:
    """Variance that quantization adds to an output of each linear, summed over the linears of a layer.

    Theorem 1 gives the added variance D S^2 G(X), with G(X) = Var[X] / 4 for deterministic rounding (Proposition 1).
    Here it is applied to each group of weights, whose step S = (max - min) / (2^bits - 1) is exactly HQQ's, and to each
    input channel: the sum over groups of S^2 / 4 x the sum of the channels' variances, averaged over outputs. Takes one
    pass over the rows, with one layer in memory.
    """
    rows, hidden = progress.resume(model.embed)
    for index in range(len(rows), model.layers):
        layer = model.layer(index)
        statistics = _Statistics(layer)
        hidden = model.run_layer(layer, hidden)
        rows.append(statistics.added_variance(widths, quant))
        progress.keep(rows, hidden)
        on_layer(index + 1, model.layers)
    return rows


class _Statistics:
    """Moments of each linear's inputs by channel, gathered by hooks."""

    def __init__(self, layer: nn.Module):
        self.linears = {name: layer.get_submodule(name) for name in list_linears(layer)}
        self.sums: dict[str, torch.Tensor] = {}  # [2, channels]: sum and sum of squares
        self.counts: dict[str, int] = {}
        self._last: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        for name, linear in self.linears.items():
            linear.register_forward_pre_hook(lambda _, inputs, name=name: self._add(name, inputs[0]))

    def _add(self, name: str, entered: torch.Tensor) -> None:
        if self._last[0] is not entered:  # queries, keys and values share their input
            flat = entered.flatten(0, -2).float()
            self._last = (entered, torch.stack([flat.sum(0), flat.square().sum(0)]).double())
        moments = self._last[1]
        self.sums[name] = self.sums[name] + moments if name in self.sums else moments
        self.counts[name] = self.counts.get(name, 0) + entered[..., 0].numel()

    def added_variance(self, widths: list[int], quant: QuantConfig) -> list[float]:
        found, groups = dict.fromkeys(widths, 0.0), make_groups(quant)
        for name, linear in self.linears.items():
            mean, square = self.sums[name] / self.counts[name]
            spread = (square - mean.square()).clamp_min(0).float()
            sizes = {width: groups.of(width, linear.in_features) for width in widths}
            ranges = {
                size: weighted_squared_range(linear.weight, spread, size, quant.axis) for size in set(sizes.values())
            }
            for width, size in sizes.items():
                found[width] += ranges[size] / 4 / linear.out_features / (2**width - 1) ** 2
        return list(found.values())


def weighted_squared_range(weight: torch.Tensor, spread: torch.Tensor, size: int, axis: int) -> float:
    """Sum over HQQ's groups of `size` of (max - min)^2 x the sum of `spread` [in_features] over the group's weights."""
    rows, columns = weight.shape
    if axis == 1:
        groups = weight.float().reshape(rows, columns // size, size)
        per_group = spread.reshape(columns // size, size).sum(-1)
        ranges = groups.amax(-1) - groups.amin(-1)
    else:  # HQQ reshapes to [size, -1]: a group takes every (rows / size)-th row of one column
        groups = weight.float().reshape(size, rows // size, columns)
        per_group = spread * size
        ranges = groups.amax(0) - groups.amin(0)
    return float((ranges.square() * per_group).sum())


# -- hessian


def estimate_hessian(
    model: Layerwise, widths: list[int], progress: Progress, on_layer: OnLayer, rows: int, estimate: str, seed: int
) -> Table:
    """The second-order loss 1/2 lambda ||dW||^2. lambda is the top eigenvalue of the loss's Hessian over all linears of
    a layer, by Lanczos iteration on Hessian-vector products (`eigenvalue`), or each linear's mean eigenvalue, by
    Hutchinson's estimator (`trace`). Needs all layers from this one to the head, and their graph, in memory.
    """
    from ds_llmpq.sensitivity.curvature import Curvature

    layers = [model.layer(index) for index in range(model.layers)]
    head, hidden = model.head(), model.embed()[:rows]
    table, _ = progress.resume(lambda: hidden)
    for index, layer in enumerate(layers):
        if index >= len(table):
            curvature = Curvature(model, layers[index:], head, hidden.clone(), seed)
            weights = curvature.eigenvalue() if estimate == "eigenvalue" else curvature.traces()
            table.append([0.5 * _weighted_error(model, index, layer, width, weights) for width in widths])
            progress.keep(table, hidden)
        hidden = model.run_layer(layer, hidden)
        on_layer(index + 1, model.layers)
    return table


def _weighted_error(model: Layerwise, index: int, layer: nn.Module, bits: int, weights: dict[str, float]) -> float:
    quantized = model.layer(index, bits)
    errors = {
        name: (layer.get_submodule(name).weight - quantized.get_submodule(name).dequantize()).square().sum()
        for name in list_linears(layer)
    }
    return sum(float(error) * max(weights[name], 0.0) for name, error in errors.items())


# -- random, measured


def draw_table(layers: int, widths: list[int], seed: int) -> Table:
    """A uniform random weight for each layer; from width to width, variance grows with the squared step."""
    generator = random.Random(seed)
    weights = [generator.random() for _ in range(layers)]
    return [[weight / (2**width - 1) ** 2 for width in widths] for weight in weights]


def measure_each_layer(
    model: Layerwise, widths: list[int], progress: Progress, on_layer: OnLayer, state_bytes: int
) -> Table:
    """KL(full || model with this one layer at this width), in nats per token: the ground truth, from L x b evaluations.

    KL instead of the loss itself, because its expectation is the same for a model that fits its data, it is never
    negative, and it has far less noise on few tokens. Layers are measured, and kept, from the last to the first.
    """
    table: dict[int, list[float]] = progress.read_rows()
    order = [index for index in reversed(range(model.layers)) if index not in table]
    for done, index in enumerate(order):
        variants = [_one_layer(model.layers, index, width) for width in widths]
        found = measure(model, variants, state_bytes=state_bytes)
        table[index] = [found[variant].kl for variant in variants]
        progress.keep_rows(table)
        on_layer(model.layers - len(order) + done + 1, model.layers)
    return [table[index] for index in range(model.layers)]


def _one_layer(layers: int, index: int, width: int) -> tuple[int, ...]:
    return tuple(width if layer == index else UNQUANTIZED_BITS for layer in range(layers))
