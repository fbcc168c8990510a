"""Builds one pipeline layer from the checkpoint: structure on `meta`, then its tensors, each quantized on arrival.

A rank calls this for its own layers only, so its peak memory is its share plus one tensor in flight. From a quantized
checkpoint the stored layers are taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hqq.core.quantize import HQQLinear
from torch import nn

from ds_llmpq.models.architecture import Architecture, architecture_of, check_shape, fill
from ds_llmpq.models.checkpoint import Checkpoint
from ds_llmpq.quant.checkpoint import QuantizedCheckpoint
from ds_llmpq.quant.convert import converted
from ds_llmpq.quant.dense import pack_linears
from ds_llmpq.quant.hqq import linear_names, quantize_linear
from ds_llmpq.quant.kernels import AUTO, DEQUANTIZE, check_name, grouped, problem, runs
from ds_llmpq.quant.packing import UNQUANTIZED_BITS, groups_of
from ds_llmpq.schema import QuantConfig


@dataclass
class LayerLoader:
    """Reads pipeline layers of `checkpoint` in `dtype` onto `device`.

    `bits` holds every decoder layer's width. `quant.kernel` runs quantized linears; `auto`, where nobody resolved it
    (`quant.kernels.resolved`), is HQQ's own forward. `on_loaded` is called after each layer, for a progress bar.
    `packed`: unquantized linears as they are multiplied fastest (`quant.dense`), good for inference alone.
    """

    checkpoint: Checkpoint
    bits: list[int]
    quant: QuantConfig
    dtype: torch.dtype
    device: torch.device
    on_loaded: Callable[[str], None] = lambda name: None
    packed: bool = False
    _shared: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def kernel(self) -> str:
        """The kernel of quantized linears; `dequantize` for a compute type or setting that it cannot take."""
        name = DEQUANTIZE if self.quant.kernel == AUTO else check_name(self.quant.kernel)
        dtype = str(self.dtype).removeprefix("torch.")
        return DEQUANTIZE if problem(name, self.device.type, dtype, self.quant) else name

    @property
    def config(self):
        return self.checkpoint.config

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self.config)

    def embedding(self) -> nn.Module:
        with torch.device("meta"):
            module = self.architecture.embedding(self.config)
        names = self.architecture.embedding_tensors(self.config)
        self._fill(module, names)
        # a tied head on the same stage uses this very tensor
        for parameter, tensor_name in names.items():
            self._shared[tensor_name] = module.get_parameter(parameter)
        return self._ready(module, "embedding")

    def head(self) -> nn.Module:
        with torch.device("meta"):
            module = self.architecture.head(self.config)
        names = self.architecture.head_tensors(self.config)
        shared = {local: self._shared[name].data for local, name in names.items() if name in self._shared}
        self._fill(module, {local: name for local, name in names.items() if local not in shared})
        fill(module, shared)
        # a tied one stays as the embedding has it, so that it is not held twice
        return self._ready(module, "head", packed=self.packed and not shared)

    def decoder_layer(self, index: int) -> nn.Module:
        with torch.device("meta"):
            module = self.architecture.layer(self.config, index)
        prefix = self.architecture.layer_prefix(index)
        if isinstance(self.checkpoint, QuantizedCheckpoint):
            self.checkpoint.check_layer(index, self.bits[index], self.quant)
        if self.bits[index] < UNQUANTIZED_BITS:
            self._quantize_all(module.layer, prefix, self.bits[index])
        names = {
            f"layer.{name}": prefix + name
            for name, parameter in module.layer.named_parameters()
            if parameter.device.type == "meta"
        }
        self._fill(module, names)
        return self._ready(module, f"layer {index}", packed=self.packed)

    def _fill(self, module: nn.Module, names: dict[str, str]) -> None:
        local = {tensor: parameter for parameter, tensor in names.items()}
        for tensor_name, tensor in self.checkpoint.tensors(list(local)):
            fill(module, {local[tensor_name]: self._converted(tensor)})

    def _quantize_all(self, layer: nn.Module, prefix: str, bits: int) -> None:
        kernel, groups = self.kernel, groups_of(self.quant)
        linears = [(name, layer.get_submodule(name)) for name in linear_names(layer)]
        sizes = [(name, linear.out_features, linear.in_features) for name, linear in linears]
        for group in grouped(kernel, sizes, bits, groups):
            names = [name for name, _, _ in group]
            out, into = sum(entry[1] for entry in group), group[0][2]
            by_kernel = runs(kernel, out, into, bits, groups) != DEQUANTIZE
            # scales and zeros stay as exact as they are stored until the kernel has taken them
            dtype = torch.float32 if by_kernel else self.dtype
            quantized = [self._quantized(layer, name, prefix, bits, dtype) for name in names]
            modules = converted(kernel, quantized, bits, groups, self.dtype)
            for name, module in zip(names, modules, strict=True):
                layer.set_submodule(name, module)

    def _quantized(self, layer: nn.Module, name: str, prefix: str, bits: int, dtype: torch.dtype) -> HQQLinear:
        linear, path = layer.get_submodule(name), prefix + name
        bias = None
        if linear.bias is not None:
            bias = self._converted(self._tensor(f"{path}.bias"))
        if isinstance(self.checkpoint, QuantizedCheckpoint):
            shape = (linear.out_features, linear.in_features)
            return self.checkpoint.linear(path, shape, bias, bits, dtype, self.device)
        weight = self._tensor(f"{path}.weight")
        check_shape(f"{path}.weight", weight, linear.weight.shape)
        return quantize_linear(weight, bias, bits, self.quant, dtype, self.device)

    def _tensor(self, name: str) -> torch.Tensor:
        return next(tensor for _, tensor in self.checkpoint.tensors([name]))

    def _converted(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=self.device, dtype=self.dtype)

    def _ready(self, module: nn.Module, name: str, packed: bool = False) -> nn.Module:
        module.eval()
        if packed:
            pack_linears(module)
        self.on_loaded(name)
        return module
