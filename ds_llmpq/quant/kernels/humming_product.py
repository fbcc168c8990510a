"""Products by humming's kernels, and their compilation."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import pairwise

import torch
from humming.kernel.humming import HummingKernel
from humming.layer import HummingLayer
from humming.ops import launch_kernel, pack_weight
from humming.schema import HummingWeightSchema
from humming.transform import prepare_layer_config
from humming.tune import get_heuristics_config
from torch import nn

from ds_llmpq.quant.kernels.base import Show
from ds_llmpq.quant.unpacked_weight import UnpackedWeight

# A kernel for rows up to each of these, tuned for that many, and one for more. humming's own choice has 33 for each
# shape, which take four times as long to compile, and differ only between these.
ROWS = (8, 16, 32, 64, 128, 256, 512)
_MANY_ROWS, _MOST_ROWS = 4096, 1 << 30
_QUIET_SECONDS = 2.0  # kernels that lie on disk are loaded within it


class HummingProduct(nn.Module):
    """Multiplies inputs [rows, in] with one weight [out, in], which may be stacked from linears of one input."""

    compiles = True

    def __init__(self, weight: UnpackedWeight, bits: int, dtype: torch.dtype):
        super().__init__()
        self.out_features, in_features = weight.codes.shape
        device = weight.codes.device
        with torch.device(device):
            layer = HummingLayer(
                shape_n=self.out_features, shape_k=in_features, torch_dtype=dtype,
                weight_config=_describe(bits, weight.group_size),
            )  # fmt: skip
        layer.load_from_tensors(
            {
                "weight": pack_weight(weight.codes.to(torch.int32).contiguous(), bits),
                "weight_scale": weight.scale.to(dtype).contiguous(),
                "zero_point": weight.zero.to(dtype).contiguous(),
            }
        )
        layer.transform()
        self.configs = _prepare_kernels(layer.humming_config, device)
        names = ("weight", "weight_scale", "zero_point", "locks")
        for name in names:
            self.register_parameter(name, nn.Parameter(getattr(layer, name).data, requires_grad=False))
        self.held_bytes = sum(getattr(self, name).nbytes for name in names)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[rows, in] -> [rows, out] in the compute dtype."""
        multiply = _multiply_opaquely if torch.compiler.is_compiling() else _multiply
        tensors = (self.configs, self.weight, self.weight_scale, self.zero_point, self.locks)
        return multiply(inputs, *tensors, self.out_features)


def compile_products(products: Sequence[tuple[int, int, int]], group_size: int, dtype: torch.dtype, show: Show) -> None:
    """Compiles the kernels of all `products` (out, in features, bits) in parallel, or loads them from disk."""
    device = torch.device("cuda", torch.cuda.current_device())
    configs = [
        prepare_layer_config(
            shape_n=out, shape_k=into, weight_schema=_describe(bits, group_size), torch_dtype=dtype, device=device
        )
        for out, into, bits in dict.fromkeys(products)
    ]
    began = time.monotonic()
    at_once = max(1, (os.cpu_count() or 1) // (len(ROWS) + 1))  # each compiles its kernels in parallel
    with ThreadPoolExecutor(at_once) as pool:
        waiting = [pool.submit(_prepare_kernels, config, device) for config in configs]
        for done, future in enumerate(as_completed(waiting), 1):
            future.result()
            seconds = time.monotonic() - began
            if seconds > _QUIET_SECONDS:
                show(
                    f"humming compiles its kernels, once on this host: {done} of {len(configs)} shapes, {seconds:.0f} s"
                )


def _describe(bits: int, group_size: int) -> HummingWeightSchema:
    """HQQ's formula: (code - zero) x scale, with a zero that is no integer."""
    return HummingWeightSchema(
        b_dtype=f"uint{bits}", weight_scale_group_size=group_size, has_zero_point=True, is_fp_zero_point=True
    )


def _prepare_kernels(config: object, device: torch.device) -> torch.Tensor:
    """int64 [4 x kernels] on the host: (above, up to) so many rows, kernel, processors to use; 0: all of them."""
    tuned = [
        [low, high, get_heuristics_config(config, shape_m=min(high, _MANY_ROWS), device=device)]
        for low, high in pairwise((0, *ROWS, _MOST_ROWS))
    ]
    return HummingKernel.prepare_kernels(config.to_str(), None, tuned, device)


def _multiply(
    inputs: torch.Tensor, configs: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor,
    locks: torch.Tensor, out_features: int,
) -> torch.Tensor:  # fmt: skip
    return launch_kernel(
        configs=configs, inputs=inputs.contiguous(), weight=weight, weight_scale=scale, zero_point=zero, locks=locks
    )


# one operator that the compiler calls and does not look into
_multiply_opaquely = torch.library.custom_op("ds_llmpq::multiply_by_humming", _multiply, mutates_args=())


@_multiply_opaquely.register_fake
def _(inputs, configs, weight, scale, zero, locks, out_features):
    return inputs.new_empty(inputs.shape[0], out_features)
