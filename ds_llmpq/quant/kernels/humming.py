"""humming on NVIDIA GPUs: products with HQQ's codes, scales and real-valued zeros as they are.

Its kernels are compiled on the host that runs them (`humming_product`), once: humming keeps them in ~/.humming/cache,
or in $HUMMING_CACHE_DIR.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, ClassVar

from ds_llmpq.cluster.detect import query_gpus
from ds_llmpq.errors import UserError
from ds_llmpq.quant.kernels.base import SHARED_INPUTS, Kernel, Show
from ds_llmpq.quant.packing import Groups

if TYPE_CHECKING:
    import torch

    from ds_llmpq.quant.kernels.humming_product import HummingProduct
    from ds_llmpq.quant.unpacked_weight import UnpackedWeight

# Where noise made a figure rise with the rows, neighbours have their mean.
_FOUR_BITS = {8: 2.0, 16: 1.86, 32: 1.46, 64: 1.46, 128: 1.24, 256: 0.955}
_EIGHT_BITS = {8: 1.5, 16: 1.36, 32: 1.19, 64: 1.19, 128: 1.09, 256: 0.835}
_NO_BACKGROUND_BUILD = "HUMMING_DISABLE_PARALLEL_BUILD"
_LOCK_BYTES = 2048 * 4  # of each weight, for sums that several blocks of threads share
# compute dtype -> compute capability from which its kernels exist
_LEAST_CAPABILITY = {"float16": (7, 5), "bfloat16": (8, 0)}


class Humming(Kernel):
    name = "humming"
    source = (
        "measured: humming 0.1.19 on an H200 in CUDA graphs, 28672 x 4096, groups of 64, at 4 and 8 bits (3, 2: "
        "assumed as 4)"
    )
    library = "humming-kernels"
    kinds = ("cuda",)
    dtypes = ("bfloat16", "float16")
    storage_bits: ClassVar[Mapping[int, int]] = {2: 2, 3: 3, 4: 4, 8: 8}
    group_sizes = (32, 64, 128)
    out_multiple = 128
    in_multiple = 64
    shared_inputs = SHARED_INPUTS
    speedups = MappingProxyType({"cuda": {8: _EIGHT_BITS, **dict.fromkeys((4, 3, 2), _FOUR_BITS)}})

    def weight_bytes(self, out_features: int, in_features: int, bits: int, groups: Groups, dtype_bytes: int) -> int:
        return self.read_bytes(out_features, in_features, bits, groups, dtype_bytes) + _LOCK_BYTES

    def unusable_reason(self, dtype: str) -> str | None:
        if self.version is None:
            return f"{self.library} is not installed (pip install 'ds_llmpq[cuda]')"
        return next((reason for each in _capabilities() if (reason := explain_capability(each, dtype))), None)

    def compile_products(
        self, products: Sequence[tuple[int, int, int]], group_size: int, dtype: torch.dtype, show: Show
    ) -> None:
        _load_products().compile_products(products, group_size, dtype, show)

    def build(self, weight: UnpackedWeight, bits: int, dtype: torch.dtype) -> HummingProduct:
        """`UserError`: the GPU is too old."""
        import torch

        if weight.codes.is_cuda:
            capability = torch.cuda.get_device_capability(weight.codes.device)
            if reason := explain_capability(capability, str(dtype).removeprefix("torch.")):
                raise UserError(f"quant.kernel={self.name} cannot run here: {reason}; use quant.kernel=dequantize.")
        return _load_products().HummingProduct(weight, bits, dtype)


def explain_capability(capability: tuple[int, int], dtype: str) -> str | None:
    """Why a GPU of this compute capability has no kernels in `dtype`, or None."""
    least = _LEAST_CAPABILITY.get(dtype)
    if least is None or capability >= least:
        return None
    has, needs = ("{}.{}".format(*each) for each in (capability, least))
    return f"it computes in {dtype} from compute capability {needs} on, and this GPU has {has}"


def _load_products() -> ModuleType:
    """`humming_product`, without the processes that humming starts when it is imported, to build what its wheel has
    already. The variable must not stay: humming would compile one kernel after another."""
    before = os.environ.get(_NO_BACKGROUND_BUILD)
    os.environ[_NO_BACKGROUND_BUILD] = "1"
    try:
        from ds_llmpq.quant.kernels import humming_product
    finally:
        del os.environ[_NO_BACKGROUND_BUILD]
        if before is not None:
            os.environ[_NO_BACKGROUND_BUILD] = before
    return humming_product


@cache
def _capabilities() -> list[tuple[int, int]]:
    """Of this host's GPUs; those that nvidia-smi does not name are left out."""
    named = [gpu.compute_capability.split(".") for gpu in query_gpus()]
    return [(int(each[0]), int(each[1])) for each in named if len(each) == 2 and all(map(str.isdecimal, each))]


HUMMING = Humming()
