"""A kernel of a test's own: one object, registered by one line, known to no other file of the package."""

import torch

from ds_llmpq.quant.kernels.base import Kernel
from ds_llmpq.quant.kernels.registry import KERNELS


class Fake(Kernel):
    """Holds 4 bits as whole bytes with float32 scales and zeros, and multiplies as HQQ does, to the bit."""

    name = "fake"
    source = "made up"
    kinds = ("cpu",)
    dtypes = ("float32",)
    storage_bits = {4: 8, 8: 8}  # noqa: RUF012
    group_sizes = (32, 64)
    cache_block = 8

    def workspace_bytes(self, products, dtype_bytes):
        return 1000

    def build(self, weight, bits, dtype):
        return FakeProduct(weight, dtype)


class FakeProduct:
    built = 0

    def __init__(self, weight, dtype):
        self.matrix = weight.dequantize().to(dtype)
        self.held_bytes = weight.codes.nbytes + weight.scale.nbytes + weight.zero.nbytes
        FakeProduct.built += 1

    def __call__(self, inputs):
        return torch.matmul(inputs, self.matrix.t())


FAKE = Fake()


def register():
    KERNELS[FAKE.name] = FAKE
